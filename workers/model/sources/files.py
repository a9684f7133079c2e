"""Which of a checkpoint's files are needed, and for what. No pickles, no other formats of the same weights, no training state.

Imports the checkpoint's fields.
"""

import json
from enum import IntEnum
from fnmatch import fnmatchcase
from pathlib import Path

from workers.model.config.fields import CheckpointError

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MODULES_FILE = "modules.json"

SETTING_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
"""Settings, tokenizers, chat templates: small, and all of them. `*` also matches slashes, here and at Hugging Face."""

OTHER_FILES = (
    "*/*.json", "*/*.model", "*/*.txt", "*/*.tiktoken", "*.bin.index.json", "*.msgpack.index.json", "trainer_state.json",
)  # fmt: skip
"""Of the same patterns: those of folders below (but templates), and what goes with formats that are not read."""


class Need(IntEnum):
    """What a process wants to read. Each has all that stands before it."""

    CONFIG = 0
    SETTINGS = 1
    WEIGHTS = 2


def is_setting(name: str) -> bool:
    return any(fnmatchcase(name, each) for each in SETTING_FILES) and not any(fnmatchcase(name, each) for each in OTHER_FILES)


def module_files(folder: Path) -> list[str]:
    """Settings of sentence-transformers' modules, each in a folder of its own. Errors: CheckpointError."""
    path = folder / MODULES_FILE
    if not path.is_file():
        return []
    try:
        paths = [str(module["path"]) for module in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error!r}): repair or download the file again") from error
    return [f"{below}/{CONFIG_FILE}" for below in paths if below]


def weight_files(folder: Path) -> list[str]:
    """As `Checkpoint` reads them: one, or those that the index names. Errors: CheckpointError."""
    index = folder / INDEX_FILE
    if (folder / SINGLE_FILE).is_file() or not index.is_file():
        return [SINGLE_FILE]
    try:
        return sorted({str(file) for file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} cannot be read ({error!r}): download the file again") from error


def lacking(folder: Path, need: Need) -> list[str]:
    """What a checkpoint must have, and this folder has not. Errors: CheckpointError."""
    names = [CONFIG_FILE, *(weight_files(folder) if need == Need.WEIGHTS else ())]
    return [name for name in names if not (folder / name).is_file()]
