"""A checkpoint's JSON files, read field by field. Imports nothing of Manta."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class CheckpointError(ValueError):
    """The checkpoint cannot be served as asked; the message says what to change."""


class Fields:
    """The raw JSON object, read field by field with errors that name file and field. A null counts as left out."""

    def __init__(self, raw: dict[str, Any], path: Path) -> None:
        self._raw, self._path = raw, path

    def error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self._path}: {problem}")

    def get(self, name: str, default: Any = None) -> Any:
        value = self._raw.get(name)
        return default if value is None else value

    def has(self, name: str) -> bool:
        return name in self._raw

    def over(self, usual: Mapping[str, Any]) -> "Fields":
        """The same, with these where a field is left out."""
        return Fields(self._raw | {name: value for name, value in usual.items() if self.get(name) is None}, self._path)

    @property
    def size(self) -> int:
        """How many fields there are."""
        return len(self._raw)

    def names(self) -> list[str]:
        """Of the fields that are not left out."""
        return [name for name, value in self._raw.items() if value is not None]

    def objects(self) -> list[str]:
        """Names of the fields that hold objects themselves."""
        return [name for name, value in self._raw.items() if isinstance(value, dict)]

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.error(f"{name} must be a positive integer, found {value!r}: repair or download the file again")
        return value

    def number(self, name: str, default: float) -> float:
        value = self.get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.error(f"{name} must be a number, found {value!r}: repair or download the file again")
        return float(value)

    def switch(self, name: str, fixed: bool | None) -> bool:
        return bool(self.get(name, False)) if fixed is None else fixed

    def nested(self, name: str) -> "Fields":
        value = self.get(name, {})
        if not isinstance(value, dict):
            raise self.error(f"{name} must be an object, found {value!r}: repair or download the file again")
        return Fields(value, self._path)


def read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: the checkpoint is incomplete, download it again") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): repair or download the file again") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} holds no JSON object: repair or download the file again")
    return raw
