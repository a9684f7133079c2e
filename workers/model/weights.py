"""Reads a checkpoint's safetensors straight into one rank's shard: each rank touches only the slices that it holds.

Imports torch and safetensors. Never holds more than one slice beside the model, and checks every name and shape of a
part before it reads the first byte of it.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from torch import Tensor

from workers.model.architectures import CheckpointError

Progress = Callable[[int, int], None]
"""Called as (done_bytes, total_bytes) while loading: bytes of this rank's share."""

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Piece:
    """One slice of one tensor of the checkpoint, and where it goes.

    shape: what the whole tensor must have. start: the first row (or column) of the slice; `dim` says which; the slice
    is as long as `target` is there.
    """

    target: Tensor
    name: str
    shape: tuple[int, ...]
    start: int = 0
    dim: int = 0


class Part(Protocol):
    """Something that is filled as one: the embedding, a layer, the head."""

    def pieces(self) -> list[Piece]: ...

    def filled(self) -> None:
        """All pieces are in place: reorder the weights for speed."""
        ...


class Checkpoint:
    """The tensors of a folder, by name. A context manager: closing it drops the memory maps.

    Reads `model.safetensors`, or the files that `model.safetensors.index.json` names.
    Errors: CheckpointError for a missing or truncated file, a missing tensor or a shape that config.json contradicts.
    """

    def __init__(self, path: str | Path) -> None:
        self._folder = Path(path)
        self._open_files: dict[str, Any] = {}
        self._file_of = self._find_tensors()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._open_files.values():
            handle.__exit__(kind, error, trace)
        self._open_files.clear()

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def load(self, parts: Sequence[Part], progress: Progress | None = None) -> None:
        """Fill `parts` one after another, so that at most one of them exists twice while it is being packed."""
        plan = [part.pieces() for part in parts]
        for pieces in plan:
            self._check(pieces)
        total = sum(piece.target.nbytes for pieces in plan for piece in pieces)
        done = 0
        while plan:
            part, pieces = parts[-len(plan)], plan.pop(0)
            for piece in pieces:
                self._fill(piece)
                done += piece.target.nbytes
                if progress is not None:
                    progress(done, total)
            del piece, pieces  # the last references to the plain weights, which `filled` may free
            part.filled()

    def _find_tensors(self) -> dict[str, str]:
        index = self._folder / INDEX_FILE
        if not index.exists():
            handle = self._file(SINGLE_FILE)
            return dict.fromkeys(handle.keys(), SINGLE_FILE)
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return {str(name): str(file) for name, file in weight_map.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} cannot be read ({error!r}): download the file again") from error

    def _file(self, name: str) -> Any:
        handle = self._open_files.get(name)
        if handle is None:
            path = self._folder / name
            if not path.exists():
                where = f"neither {SINGLE_FILE} nor {INDEX_FILE} is" if name == SINGLE_FILE else f"{name} is not"
                raise CheckpointError(f"{where} in {self._folder}: only safetensors are read, download them")
            try:
                handle = safe_open(str(path), framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} is truncated or damaged ({error}): download it again") from error
            self._open_files[name] = handle
        return handle

    def _check(self, pieces: Iterable[Piece]) -> None:
        for piece in pieces:
            if piece.name not in self._file_of:
                raise CheckpointError(
                    f"tensor {piece.name} is missing from {self._folder}: config.json promises it, "
                    f"so one of the two is from another model; download both again"
                )
            found = tuple(self._slice(piece.name).get_shape())
            if found != piece.shape:
                raise CheckpointError(
                    f"tensor {piece.name} in {self._folder} has shape {list(found)} but config.json asks for "
                    f"{list(piece.shape)}: one of the two is from another model; download both again"
                )

    def _slice(self, name: str) -> Any:
        file = self._file_of[name]
        try:
            return self._file(file).get_slice(name)
        except SafetensorError as error:
            raise CheckpointError(
                f"tensor {name} is not in {self._folder / file}, where {INDEX_FILE} places it: download both again"
            ) from error

    def _fill(self, piece: Piece) -> None:
        view = self._slice(piece.name)
        if not piece.target.numel():
            return
        stop = piece.start + piece.target.shape[piece.dim]
        whole = piece.start == 0 and stop == piece.shape[piece.dim]
        rows = slice(None) if whole else slice(piece.start, stop)
        piece.target.copy_(view[rows] if piece.dim == 0 else view[:, rows])
