"""Tensors that lie in files as they are, read by several threads straight to where they belong.

    file ──pread──▶ the tensor itself                              on a CPU, of the type it is stored in
         ──pread──▶ a buffer of the thread's ──copy──▶ the tensor  else: converted, or of columns; pinned for a GPU, and copied
                                                                   by a stream of the thread's while the next stretch is read

Nothing is mapped: a page fault for every 4 KiB to 64 KiB is what maps cost. Imports torch and what an error is.
"""

import contextlib
import json
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from workers.model.config.fields import CheckpointError

STRETCH_BYTES = 8 << 20
"""What a thread reads at a time: milliseconds, and small beside a shard."""

RUN_BYTES = 64 << 10
"""Parts of rows that are shorter are not read one by one: their rows are read whole, and the columns taken in memory."""

THREADS = 8
BUFFERS = 2
"""Of a thread, for a GPU: one is read into while the other is copied."""


@dataclass(frozen=True, slots=True)
class Extent:
    """Where a tensor lies. offset: bytes into the file."""

    file: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Wanted:
    """A slice of a tensor in a file, and where it goes: from `start` in dimension `dim`, as long as the target is there."""

    target: Tensor
    extent: Extent
    start: int
    dim: int


@dataclass(frozen=True, slots=True)
class Stretch:
    """What one thread reads at a time: rows of `width` numbers from `offset` on, of which the columns from `column` on go to
    target [rows, columns]."""

    target: Tensor
    file: Path
    offset: int
    dtype: torch.dtype
    width: int
    column: int = 0

    @property
    def as_it_is(self) -> bool:
        """The target has the very bytes that are read, one after another."""
        whole = self.target.shape[1] == self.width and self.target.dtype == self.dtype
        return whole and self.target.is_contiguous() and self.target.stride(1) == 1

    @property
    def read_bytes(self) -> int:
        return self.target.shape[0] * self.width * self.dtype.itemsize


def extents(file: Path, dtypes: Mapping[str, torch.dtype]) -> dict[str, Extent]:
    """Of the tensors in a safetensors file, by name, whose stored type is one of `dtypes`. The file has been looked through by
    safetensors. Errors: OSError."""
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header: dict[str, Any] = json.loads(opened.read(size))
    return {
        name: Extent(file, 8 + size + told["data_offsets"][0], dtypes[told["dtype"]], tuple(told["shape"]))
        for name, told in header.items()
        if name != "__metadata__" and told["dtype"] in dtypes
    }


def stretches(wanted: Wanted) -> Iterator[Stretch]:
    """Together the whole slice, each of it once. At most `STRETCH_BYTES` are read for one, or a part of one row."""
    target, extent, start, dim = wanted.target, wanted.extent, wanted.start, wanted.dim
    if not target.numel():
        return
    if target.dim() > 1 and not target.is_contiguous():
        yield from _of_matrix(wanted) if target.dim() == 2 else _one_by_one(wanted)
        return
    shape = extent.shape or (1,)
    kept = target.numel() // math.prod(shape[:dim])  # of each row
    width, column = math.prod(shape[dim:]), start * math.prod(shape[dim + 1 :])
    rows = target.reshape(-1, kept)  # always a view: what is not contiguous here is a vector, one row
    if kept == width:
        yield from _of_run(rows.reshape(1, -1), extent, extent.offset)
    else:
        yield from _of_rows(rows, extent, extent.offset, width, column)


def _one_by_one(wanted: Wanted) -> Iterator[Stretch]:
    """Along the first dimension, of a target that is itself a part of something."""
    extent, inside = wanted.extent, wanted.dim > 0
    each_bytes = math.prod(extent.shape[1:]) * extent.dtype.itemsize
    first = 0 if inside else wanted.start
    for number, target in enumerate(wanted.target):
        offset = extent.offset + (first + number) * each_bytes
        one = Extent(extent.file, offset, extent.dtype, extent.shape[1:])
        yield from stretches(Wanted(target, one, wanted.start, wanted.dim - 1) if inside else Wanted(target, one, 0, 0))


def _of_matrix(wanted: Wanted) -> Iterator[Stretch]:
    """Of one that lies transposed, or is a part of a larger one: rows of the file, several at a time where they are short."""
    extent, width = wanted.extent, wanted.extent.shape[1]
    first, column = (0, wanted.start) if wanted.dim else (wanted.start, 0)
    yield from _of_rows(wanted.target, extent, extent.offset + first * width * extent.dtype.itemsize, width, column)


def _of_rows(rows: Tensor, extent: Extent, offset: int, width: int, column: int) -> Iterator[Stretch]:
    """rows [rows, columns]: of each `width` numbers in the file those from `column` on. offset: of the first row's first."""
    size, kept = extent.dtype.itemsize, rows.shape[1]
    row_bytes = width * size
    if len(rows) == 1 or row_bytes > STRETCH_BYTES or RUN_BYTES <= kept * size < row_bytes:
        for number, row in enumerate(rows):
            yield from _of_run(row[None], extent, offset + number * row_bytes + column * size)
    else:
        for at, part in enumerate(torch.split(rows, many := STRETCH_BYTES // row_bytes)):
            yield Stretch(part, extent.file, offset + at * many * row_bytes, extent.dtype, width, column)


def _of_run(row: Tensor, extent: Extent, offset: int) -> Iterator[Stretch]:
    """row [1, columns], of which all lies in one run."""
    many = STRETCH_BYTES // extent.dtype.itemsize
    for at, part in enumerate(torch.split(row, many, dim=1)):
        yield Stretch(part, extent.file, offset + at * STRETCH_BYTES, extent.dtype, part.shape[1])


class StretchReader:
    """A context manager: its threads, buffers and files are there until it is left."""

    def __init__(self, threads: int = THREADS) -> None:
        self._pool = ThreadPoolExecutor(min(threads, os.cpu_count() or 1), thread_name_prefix="manta-read")
        self._own = threading.local()
        self._lanes: list[_Lane] = []
        self._files: dict[Path, int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> "StretchReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
        for descriptor in self._files.values():
            os.close(descriptor)

    def ahead(self, wanted: Sequence[Wanted]) -> None:
        """Says to the kernel that this will be read soon. Does not wait."""
        for each in wanted:
            extent = each.extent
            start, length = 0, extent.shape[0] if extent.shape else 1
            if each.dim == 0 and each.target.shape != extent.shape:
                start, length = each.start, each.target.shape[0]
            row_bytes = math.prod(extent.shape[1:]) * extent.dtype.itemsize
            with contextlib.suppress(OSError):  # it is advice
                offset = extent.offset + start * row_bytes
                os.posix_fadvise(self._file(extent.file), offset, length * row_bytes, os.POSIX_FADV_WILLNEED)

    def read(self, wanted: Sequence[Wanted], done: Callable[[int], None], beside: Callable[[], None] = lambda: None) -> None:
        """Fills all targets. done: told of so many bytes of them more, by the caller's thread. beside: what that does while the
        others read. Errors: CheckpointError for a file that ends before its time, OSError, torch's."""
        ready = _event(wanted)  # of what is under way on the targets
        reads = [self._pool.submit(self._read, each, ready) for one in wanted for each in stretches(one)]
        try:
            beside()
            for each in as_completed(reads):
                done(each.result())
        except BaseException:
            for each in reads:
                each.cancel()
            raise
        for lane in self._lanes:
            lane.settle()

    def _read(self, stretch: Stretch, ready: "torch.cuda.Event | None") -> int:
        """In a thread. Bytes of the target."""
        target = stretch.target
        with torch.inference_mode():
            if target.device.type == "cpu" and stretch.as_it_is:
                self._fill(target.view(-1).view(torch.uint8), stretch)
            else:
                self._lane(target.device).copy(stretch, ready, self._fill)
        return target.nbytes

    def _fill(self, buffer: Tensor, stretch: Stretch) -> None:
        """buffer [bytes] uint8 on the host."""
        descriptor, view, offset = self._file(stretch.file), buffer.numpy().data, stretch.offset
        while view:
            count = os.preadv(descriptor, [view], offset)
            if not count:
                raise CheckpointError(f"{stretch.file} ends before its tensors do: download it again")
            view, offset = view[count:], offset + count

    def _file(self, path: Path) -> int:
        with self._lock:
            if path not in self._files:
                self._files[path] = os.open(path, os.O_RDONLY)
            return self._files[path]

    def _lane(self, device: torch.device) -> "_Lane":
        lanes: dict[torch.device, _Lane] = self._own.__dict__.setdefault("lanes", {})
        if device not in lanes:
            lanes[device] = _Lane(device)
            with self._lock:
                self._lanes.append(lanes[device])
        return lanes[device]


class _Lane:
    """A thread's buffers for one device and, for a GPU, its stream."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._device = device
        many = BUFFERS if self._on_gpu else 1
        self._buffers = [torch.empty(0, dtype=torch.uint8) for _ in range(many)]
        self._copied: list[torch.cuda.Event | None] = [None] * many
        self._stream = torch.cuda.Stream(device) if self._on_gpu else None  # type: ignore[no-untyped-call]
        self._turn = 0

    def copy(self, stretch: Stretch, ready: "torch.cuda.Event | None", fill: Callable[[Tensor, Stretch], None]) -> None:
        self._turn = (self._turn + 1) % len(self._buffers)
        if (copied := self._copied[self._turn]) is not None:
            copied.synchronize()
        raw = self._buffer(stretch.read_bytes)
        fill(raw, stretch)
        if self._stream is None:
            stretch.target.copy_(_kept(raw, stretch))
            return
        assert ready is not None
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            if stretch.as_it_is:
                stretch.target.copy_(_kept(raw, stretch), non_blocking=True)
            else:  # the device converts, and takes the columns
                stretch.target.copy_(_kept(raw.to(self._device, non_blocking=True), stretch))
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self._copied[self._turn] = event

    def settle(self) -> None:
        """All that was copied is in place."""
        if self._stream is not None:
            self._stream.synchronize()

    def _buffer(self, size: int) -> Tensor:
        """[size] uint8 on the host."""
        if self._buffers[self._turn].shape[0] < size:
            self._buffers[self._turn] = torch.empty(max(size, STRETCH_BYTES), dtype=torch.uint8, pin_memory=self._on_gpu)
        return self._buffers[self._turn][:size]


def _kept(raw: Tensor, stretch: Stretch) -> Tensor:
    """raw [bytes] uint8, all that was read -> [rows, columns]"""
    rows = raw.view(stretch.dtype).view(-1, stretch.width)
    return rows.narrow(1, stretch.column, stretch.target.shape[1])


def _event(wanted: Sequence[Wanted]) -> "torch.cuda.Event | None":
    if not any(each.target.device.type == "cuda" for each in wanted):
        return None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event
