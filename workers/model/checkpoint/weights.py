"""Reads a checkpoint's safetensors straight into one rank's shard: each rank touches only the slices that it holds.

Imports torch and safetensors. Never holds more on the host beside the model than what its threads read at a time
(`stretches`), or one slice. Before the first byte is read, every name,
shape and stored type has been checked, and no tensor is left over that nothing reads: a scale, an adapter or the rest of
another model would change what the others mean.
"""

import json
import logging
import math
import re
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from workers.model.checkpoint.stretches import THREADS, Extent, StretchReader, Wanted, extents
from workers.model.config.fields import CheckpointError
from workers.model.config.quantization import Scheme
from workers.model.quantization.checkpoint import Weights, quantised
from workers.model.quantization.stored import Quantised
from workers.model.sources.files import INDEX_FILE, SINGLE_FILE
from workers.model.sources.progress import Progress

logger = logging.getLogger(__name__)

ADAPTER_FILE = "adapter_config.json"

BODY, BARE_BODY = "model.", re.compile(r"(embed_tokens|layers|norm)\.")
"""What a decoder's tensors are called by; and those of one that was saved by itself, as those for embeddings are."""

STORED_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""What safetensors calls the types that are numbers by themselves: all others need a scale, or a table, from elsewhere."""

LEFTOVERS = re.compile(r"(^|\.)(rotary_emb\.(inv_freq|cos_cached|sin_cached)|position_ids|attn\.masked_bias)$")
"""Buffers that older releases of transformers saved, and that are computed from config.json."""

NAMED_LEFTOVERS = 5
COMPARED_ROWS = 8192


class Sink(Protocol):
    """What a slice goes into that is not kept as plain numbers."""

    shape: torch.Size
    nbytes: int

    def numel(self) -> int: ...

    def take(self, stored: Any, index: Any) -> None:
        """stored: the whole tensor, of which parts can be read; index: of the slice in it."""
        ...


Target: TypeAlias = Tensor | Sink


@dataclass(frozen=True, slots=True)
class Piece:
    """One slice of one tensor of the checkpoint, and where it goes.

    shape: what the whole tensor must have. start: where the slice begins in dimension `dim`; it is as long as `target` is
    there.
    """

    target: Target
    name: str
    shape: tuple[int, ...]
    start: int = 0
    dim: int = 0

    def index(self) -> Any:
        """Of the slice in the whole tensor."""
        if self.target.shape == self.shape:
            return ...
        return (*(slice(None),) * self.dim, slice(self.start, self.start + self.target.shape[self.dim]))


@dataclass(frozen=True, slots=True)
class StoredNumbers:
    """What a checkpoint holds. dtype: of most of its numbers. numbers: how many there are."""

    dtype: torch.dtype
    numbers: int


class ModelPart(Protocol):
    """Something that is filled as one: the embedding, a layer, the head."""

    def pieces(self) -> list[Piece]: ...

    def filled(self) -> None:
        """All pieces are in place: reorder the weights for speed."""
        ...


class _ProgressSum:
    """Sums up what is told as progress."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._done, self._total = progress, 0, total

    def more(self, count: int) -> None:
        self._done += count
        if self._progress is not None and count:
            self._progress(self._done, self._total)


class Checkpoint:
    """The tensors of a folder, by name. A context manager: closing it drops the memory maps.

    Reads `model.safetensors`, or where there is none the files that `model.safetensors.index.json` names, as transformers
    does. Weights that config.json says are quantised have the names and shapes that plain ones would have, and are made into
    numbers as they are read. Errors: CheckpointError for a missing or truncated file, a missing tensor, one that nothing reads,
    a shape that config.json contradicts, or numbers of fewer than 16 bits of which it does not say how they are quantised.
    """

    def __init__(self, path: str | Path, scheme: Scheme | None = None) -> None:
        """scheme: of config.json; None: its weights are plain."""
        self._folder = Path(path)
        self._open_files: dict[str, Any] = {}
        self._compared: set[str] = set()
        self._extents: dict[str, dict[str, Extent]] = {}  # by file, then by name
        found = self._find_tensors()
        self._bare = not any(name.startswith(BODY) for name in found)
        self._file_of = {self._full_name(name): file for name, file in found.items()}
        self._quantised = Weights() if scheme is None or scheme.made else quantised(scheme, self._file_of, self._slice_of_file)
        kept = [name for name in self._file_of if name not in self._quantised.parts]
        self._names = dict.fromkeys([*kept, *self._quantised.made])

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._open_files.values():
            handle.__exit__(kind, error, trace)
        self._open_files.clear()

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def is_quantised(self, module: str) -> bool:
        """Whether that module's weight, or a stack of experts of that name, is stored so, as config.json says how."""
        return not self._quantised.made.keys().isdisjoint((module, f"{module}.weight"))

    def names(self) -> list[str]:
        """Of all tensors but such as are computed from config.json."""
        return [name for name in self._names if not LEFTOVERS.search(name)]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def whole(self, name: str) -> Tensor:
        """A small tensor as it is stored. Errors: CheckpointError for numbers of fewer than 16 bits."""
        view = self._slice(name)
        if (kind := str(view.get_dtype())) not in STORED_DTYPES:
            raise CheckpointError(f"tensor {name} in {self._folder} is stored as {kind}: {_QUANTIZED}")
        tensor: Tensor = view[...]
        return tensor

    def stored(self) -> StoredNumbers:
        """Of what is quantised, how many numbers it stands for. Errors: CheckpointError if most of the rest is no 16-, 32- or
        64-bit floats."""
        sizes: dict[str, int] = {}
        for name in self.names():
            view = self._slice(name)
            kind = "" if name in self._quantised.made else str(view.get_dtype())
            sizes[kind] = sizes.get(kind, 0) + math.prod(view.get_shape())
        kind = max(filter(None, sizes), key=lambda name: sizes[name], default="F32")
        if kind not in STORED_DTYPES:
            raise CheckpointError(f"the weights in {self._folder} are stored as {kind}: {_QUANTIZED}")
        return StoredNumbers(STORED_DTYPES[kind], sum(sizes.values()))

    def same_rows(self, one: str, other: str, start: int, stop: int, dtype: torch.dtype) -> bool:
        """Whether two matrices have equal rows [start, stop), in `dtype`. A block of them is read at a time, and both count as
        read by this rank."""
        self._compared |= {one, other}
        first, second = self._slice(one), self._slice(other)
        if first.get_shape() != second.get_shape():
            return False
        stop = min(stop, first.get_shape()[0])
        blocks = ((at, min(at + COMPARED_ROWS, stop)) for at in range(start, stop, COMPARED_ROWS))
        return all(torch.equal(first[a:b].to(dtype), second[a:b].to(dtype)) for a, b in blocks)

    def load(
        self, parts: Sequence[ModelPart], progress: Progress | None = None, spare: Set[str] = frozenset(),
        threads: int = THREADS,
    ) -> None:  # fmt: skip
        """Fill `parts` one after another, so that at most one of them exists twice while it is being packed. Together they
        read every tensor of the checkpoint, on each rank a share of it, but for those that are known to be `spare`."""
        plan = [part.pieces() for part in parts]
        for pieces in plan:
            self._check(pieces)
        self._refuse_unread({piece.name for pieces in plan for piece in pieces} | self._compared | spare)
        told = _ProgressSum(progress, sum(piece.target.nbytes for pieces in plan for piece in pieces))
        with StretchReader(threads) as reader:
            while plan:
                part, pieces = parts[-len(plan)], plan.pop(0)
                self._read(reader, pieces, plan[0] if plan else [], told)
                del pieces  # the last references to the plain weights, which `filled` may free
                part.filled()

    def _read(self, reader: StretchReader, pieces: list[Piece], following: list[Piece], told: "_ProgressSum") -> None:
        """following: the pieces after these."""
        found = [(piece, self._wanted(piece)) for piece in pieces]

        def beside() -> None:
            reader.ahead([wanted for piece in following if (wanted := self._wanted(piece)) is not None])
            for piece in [piece for piece, wanted in found if wanted is None]:
                self._fill(piece)
                told.more(piece.target.nbytes)

        reader.read([wanted for _, wanted in found if wanted is not None], told.more, beside)

    def _wanted(self, piece: Piece) -> Wanted | None:
        """For those who read files as they are; None: it is made of what is read (`_slice`)."""
        if piece.name in self._quantised.made or not isinstance(piece.target, Tensor):
            return None
        file = self._file_of[piece.name]
        if file not in self._extents:
            self._extents[file] = extents(self._folder / file, STORED_DTYPES)
        extent = self._extents[file].get(self._stored_name(piece.name))
        return None if extent is None else Wanted(piece.target, extent, piece.start, piece.dim)

    def _find_tensors(self) -> dict[str, str]:
        if (self._folder / ADAPTER_FILE).exists():
            raise CheckpointError(
                f"an adapter ({ADAPTER_FILE}) lies beside the weights in {self._folder}: move its files to a folder of their "
                f"own, and name that with --lora"
            )
        index = self._folder / INDEX_FILE
        if (self._folder / SINGLE_FILE).exists() or not index.exists():
            if index.exists():
                logger.warning("%s: %s is read, and %s beside it is not", self._folder, SINGLE_FILE, INDEX_FILE)
            return dict.fromkeys(self._file(SINGLE_FILE).keys(), SINGLE_FILE)
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            placed = {str(name): str(file) for name, file in weight_map.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} cannot be read ({error!r}): download the file again") from error
        return self._with_unlisted(placed)

    def _with_unlisted(self, placed: dict[str, str]) -> dict[str, str]:
        """Adds what the files hold beside what the index says of them."""
        found = dict(placed)
        for file in sorted(set(placed.values())):
            for name in self._file(file).keys():  # noqa: SIM118 (a handle is no mapping)
                if found.setdefault(name, file) != file:
                    raise CheckpointError(
                        f"tensor {name} is in two files of {self._folder}, {found[name]} and {file}: "
                        f"one of them is of another version; download both again"
                    )
        return found

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
            if piece.name not in self._names:
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
            stored = str(self._slice(piece.name).get_dtype())
            if stored not in STORED_DTYPES:
                raise CheckpointError(f"tensor {piece.name} in {self._folder} is stored as {stored}: {_QUANTIZED}")

    def _refuse_unread(self, read: set[str]) -> None:
        spare = {name for name in self._quantised.biases - read if name in self._file_of and not self._slice(name)[...].any()}
        unread = sorted(set(self.names()) - read - spare)
        if unread:
            more = f" and {len(unread) - NAMED_LEFTOVERS} more" if len(unread) > NAMED_LEFTOVERS else ""
            raise CheckpointError(
                f"{self._folder} has tensors that the model of config.json does not read: "
                f"{', '.join(unread[:NAMED_LEFTOVERS])}{more}. The weights may be quantized, unmerged or another model's: "
                f"choose the checkpoint with its own config.json, merged, or in bfloat16, float16 or float32"
            )

    def _full_name(self, stored: str) -> str:
        """The name that is asked for."""
        return BODY + stored if self._bare and BARE_BODY.match(stored) else stored

    def _stored_name(self, name: str) -> str:
        return name.removeprefix(BODY) if self._bare else name

    def _slice(self, name: str) -> Any:
        """Of a tensor as it is asked for."""
        made = self._quantised.made.get(name)
        return self._slice_of_file(name) if made is None else made

    def _slice_of_file(self, name: str) -> Any:
        """Of a tensor as it is stored."""
        file = self._file_of[name]
        try:
            return self._file(file).get_slice(self._stored_name(name))
        except SafetensorError as error:
            raise CheckpointError(
                f"tensor {name} is not in {self._folder / file}, where {INDEX_FILE} places it: download both again"
            ) from error

    def _fill(self, piece: Piece) -> None:
        if not piece.target.numel():
            return
        view, index = self._slice(piece.name), piece.index()
        if not isinstance(piece.target, Tensor):
            piece.target.take(view, index)
        elif isinstance(view, Quantised):
            view.copy_to(piece.target, index)
        else:
            piece.target.copy_(view[index])


_QUANTIZED = (
    "config.json does not say how such weights are quantized; choose the checkpoint with its own config.json, or in bfloat16, "
    "float16 or float32"
)
