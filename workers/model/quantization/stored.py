"""Quantised weights of a checkpoint, each as if it stood there as numbers: a part that is asked for is read and made.

Everything here is a slice as safetensors has them: `get_shape`, `get_dtype`, and a part by its index. A part takes only those
rows and columns of scales and zero points that belong to it, so ranks may cut a weight anywhere. Imports torch.
"""

import math
from collections.abc import Iterator, Sequence
from types import EllipsisType

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.kernels.reduced import E8M0_BIAS, FP4, FP4_BLOCK
from workers.model.config.fields import CheckpointError
from workers.model.quantization.words import Span, Stored, Words, blocks_of

NUMBERS_AT_ONCE = 1 << 24
"""Of a weight that are made at once: 64 MB of them in float32."""

Index = EllipsisType | slice | tuple[slice, ...]


class Quantised:
    """A weight of the checkpoint that is stored in another form. Subclasses make parts of it."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape

    def get_shape(self) -> Sequence[int]:
        return self._shape

    def get_dtype(self) -> str:
        """In which its parts are made."""
        return "F32"

    def __getitem__(self, index: Index) -> Tensor:
        """A part in float32. index: of whole slices with a step of one."""
        spans = spans_of(index, self._shape)
        parts = [self.part(each) for each in in_pieces(spans)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def copy_to(self, target: Tensor, index: Index) -> None:
        """The same into `target`, rounded to its dtype, without all of it being there in float32."""
        at = 0
        for spans in in_pieces(spans_of(index, self._shape)):
            length = spans[0][1] - spans[0][0]
            target[at : at + length].copy_(self.near(spans, target.device))
            at += length

    def part(self, spans: tuple[Span, ...]) -> Tensor:
        """In float32. spans: one for each dimension."""
        raise NotImplementedError

    def near(self, spans: tuple[Span, ...], device: torch.device) -> Tensor:  # noqa: ARG002
        """The same, on that device where it can be made there."""
        return self.part(spans)


class Scales:
    """One number for each block of a matrix [out, in]."""

    def __init__(self, name: str, stored: Stored, shape: tuple[int, int], block: tuple[int | None, int | None] | None) -> None:
        """block: rows and columns of one, None for all; None by itself: one for the matrix or for each row, as their number
        says. Errors: CheckpointError where there are not as many as that."""
        self._stored, self._sizes = stored, tuple(stored.get_shape())
        count = math.prod(self._sizes)
        if block is None:
            block = (1, None) if count == shape[0] and count > 1 else (None, None)
        self.block = block[0] or shape[0], block[1] or shape[1]
        self.grid = -(-shape[0] // self.block[0]), -(-shape[1] // self.block[1])
        if count != math.prod(self.grid) or (len(self._sizes) == 2 and self._sizes != self.grid):
            raise CheckpointError(
                f"{name} has shape {list(self._sizes)}, but config.json asks for {list(self.grid)} of a weight of "
                f"{list(shape)}: one of the two is from another model; download both again"
            )

    def part(self, rows: Span, columns: Span) -> Tensor:
        """Of the blocks that these rows and columns touch, [of rows, of columns], in float32."""
        (first, last), (left, right) = blocks_of(rows, self.block[0]), blocks_of(columns, self.block[1])
        if len(self._sizes) == 2:
            return self._stored[first:last, left:right].float()
        return self._stored[...].float().reshape(self.grid)[first:last, left:right]

    def spread(self, rows: Span, columns: Span) -> Tensor:
        """The same, [rows, columns] or such that it broadcasts to that."""
        part = self.part(rows, columns)
        if self.grid[0] > 1 and self.block[0] > 1:
            part = part.index_select(0, _places(rows, self.block[0]))
        if self.grid[1] > 1:
            part = part.index_select(1, _places(columns, self.block[1]))
        return part


class Scaled(Quantised):
    """FP8 or int8: each number by itself, times its scale, less a zero point if there is one."""

    def __init__(self, values: Stored, scales: Scales, zeros: Scales | None = None) -> None:
        rows, columns = values.get_shape()
        super().__init__((rows, columns))
        self.values, self.scales, self._zeros = values, scales, zeros

    def part(self, spans: tuple[Span, ...]) -> Tensor:
        rows, columns = spans
        values = self.values[slice(*rows), slice(*columns)].float()
        if self._zeros is not None:
            values -= self._zeros.spread(rows, columns)
        return values.mul_(self.scales.spread(rows, columns))


class Grouped(Quantised):
    """Integers whose groups of columns have a scale and a zero point. order: each column's group, where they are mixed."""

    def __init__(self, words: Words, group: int | None, order: Stored | None = None) -> None:
        super().__init__(words.shape)
        self.words, self.group, self.order = words, group or words.shape[1], order

    def part(self, spans: tuple[Span, ...]) -> Tensor:
        rows, columns = spans
        if self.order is None:
            groups, places = blocks_of(columns, self.group), _places(columns, self.group)
        else:
            groups, places = (0, self.words.groups), self.order[slice(*columns)].long()
        codes = self.words.codes(rows, columns).float()
        zeros = self.words.zeros(rows, groups).float()
        codes -= zeros.index_select(1, places) if zeros.dim() else zeros
        return codes.mul_(self.words.scales(rows, groups).float().index_select(1, places))


class Mxfp4(Quantised):
    """blocks [experts, out, in / 32, 16] of two numbers in a byte, scales [experts, out, in / 32] of exponents; as a weight
    [experts, in, out], as gpt-oss has it."""

    def __init__(self, blocks: Stored, scales: Stored) -> None:
        experts, out, count, _ = blocks.get_shape()
        super().__init__((experts, count * FP4_BLOCK, out))
        self.blocks, self.scales = blocks, scales

    def codes(self, expert: int, rows: Span, columns: Span, device: torch.device) -> tuple[Tensor, Tensor]:
        """Of one expert's matrix [out, in], as they are stored: codes uint8 [rows, columns], scales uint8 [rows, blocks].
        columns: of whole blocks."""
        index = slice(expert, expert + 1), slice(*rows), slice(*blocks_of(columns, FP4_BLOCK))
        blocks, scales = self.blocks[index][0].to(device), self.scales[index][0].to(device)
        return torch.stack((blocks & 15, blocks >> 4), -1).flatten(1), scales

    def part(self, spans: tuple[Span, ...]) -> Tensor:
        return self.near(spans, torch.device("cpu"))

    def near(self, spans: tuple[Span, ...], device: torch.device) -> Tensor:
        experts, columns, rows = spans
        count = blocks_of(columns, FP4_BLOCK)
        index = slice(*experts), slice(*rows), slice(*count)
        blocks, exponents = (stored[index].to(device).int() for stored in (self.blocks, self.scales))
        # twice the numbers times half the scales: the largest scale by itself is no float32
        low, high = torch.meshgrid(*(2 * torch.tensor(FP4),) * 2, indexing="xy")
        powers = torch.ldexp(torch.ones(256), torch.arange(256) - E8M0_BIAS - 1)
        numbers = F.embedding(blocks, torch.stack((low, high), -1).view(256, 2).to(device)).flatten(3)
        numbers *= powers.to(device)[exponents][..., None]
        skipped = columns[0] - count[0] * FP4_BLOCK
        return numbers.flatten(2)[:, :, skipped : skipped + columns[1] - columns[0]].mT


def spans_of(index: Index, shape: tuple[int, ...]) -> tuple[Span, ...]:
    given = () if isinstance(index, EllipsisType) else index if isinstance(index, tuple) else (index,)
    found = [each.indices(size)[:2] for each, size in zip(given, shape, strict=False)]
    return (*found, *((0, size) for size in shape[len(found) :]))


def in_pieces(spans: tuple[Span, ...]) -> Iterator[tuple[Span, ...]]:
    """Cut in the first dimension."""
    (start, stop), others = spans[0], spans[1:]
    each = max(1, NUMBERS_AT_ONCE // max(1, math.prod(last - first for first, last in others)))
    for at in range(start, stop, each) or [start]:
        yield ((at, min(at + each, stop)), *others)


def _places(span: Span, size: int) -> Tensor:
    """Of each in the span, its block among those that the span touches."""
    return torch.arange(*span) // size - span[0] // size
