"""Integers that checkpoints pack several to a word, in the three layouts that there are, and what belongs to their groups.

Imports torch.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

CPU = torch.device("cpu")

Span = tuple[int, int]
"""[start, stop) in one dimension."""

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word AWQ has each of eight neighbours, in fours of bits from the low end."""


class Stored(Protocol):
    """A tensor of the checkpoint, of which parts are read. A `PySafeSlice` is one."""

    def get_shape(self) -> Sequence[int]: ...

    def get_dtype(self) -> str: ...

    def __getitem__(self, index: Any) -> Tensor: ...


class Words(Protocol):
    """Integers of a matrix [out, in], several in a word, and what belongs to groups of columns."""

    shape: tuple[int, int]
    groups: int

    def codes(self, rows: Span, columns: Span, device: torch.device = CPU) -> Tensor:
        """[rows, columns] int32, from 0, taken apart on that device."""
        ...

    def zeros(self, rows: Span, groups: Span) -> Tensor:
        """Which code is nought, [rows, groups] or such that it broadcasts."""
        ...

    def scales(self, rows: Span, groups: Span) -> Tensor:
        """[rows, groups]"""
        ...


class PackedWords:
    """compressed-tensors' `pack-quantized`: weight_packed [out, in / in a word], weight_scale [out, groups], weight_zero_point
    [out / in a word, groups]. Both are stored from 0, where they mean from -2^(bits - 1)."""

    def __init__(
        self, bits: int, shape: tuple[int, int], groups: int, packed: Stored, scale: Stored, zero: Stored | None
    ) -> None:
        self.shape, self.groups = shape, groups
        self._bits, self._packed, self._scale, self._zero = bits, packed, scale, zero

    def codes(self, rows: Span, columns: Span, device: torch.device = CPU) -> Tensor:
        words, skipped = words_of(columns, self._bits)
        found = unpacked(self._packed[slice(*rows), slice(*words)].to(device), self._bits)
        return found[:, skipped : skipped + columns[1] - columns[0]]

    def zeros(self, rows: Span, groups: Span) -> Tensor:
        if self._zero is None:
            return torch.tensor(1 << (self._bits - 1))
        words, skipped = words_of(rows, self._bits)
        found = unpacked(self._zero[slice(*words), slice(*groups)].T, self._bits)
        return found[:, skipped : skipped + rows[1] - rows[0]].T

    def scales(self, rows: Span, groups: Span) -> Tensor:
        return self._scale[slice(*rows), slice(*groups)]


class GptqWords:
    """qweight [in / in a word, out], qzeros [groups, out / in a word], scales [groups, out]."""

    def __init__(self, bits: int, shift: int, qweight: Stored, qzeros: Stored, scales: Stored) -> None:
        self._bits, self._shift, self._qweight, self._qzeros, self._scales = bits, shift, qweight, qzeros, scales
        words, out = qweight.get_shape()
        self.shape, self.groups = (out, words * (32 // bits)), scales.get_shape()[0]

    def codes(self, rows: Span, columns: Span, device: torch.device = CPU) -> Tensor:
        words, skipped = words_of(columns, self._bits)
        found = unpacked(self._qweight[slice(*words), slice(*rows)].to(device).T, self._bits)
        return found[:, skipped : skipped + columns[1] - columns[0]]

    def zeros(self, rows: Span, groups: Span) -> Tensor:
        words, skipped = words_of(rows, self._bits)
        found = unpacked(self._qzeros[slice(*groups), slice(*words)], self._bits) + self._shift
        return found[:, skipped : skipped + rows[1] - rows[0]].T

    def scales(self, rows: Span, groups: Span) -> Tensor:
        return self._scales[slice(*groups), slice(*rows)].T


class AwqWords:
    """qweight [in, out / 8], qzeros [groups, out / 8], scales [groups, out]."""

    bits = 4

    def __init__(self, qweight: Stored, qzeros: Stored, scales: Stored) -> None:
        self._qweight, self._qzeros, self._scales = qweight, qzeros, scales
        width, words = qweight.get_shape()
        self.shape, self.groups = (words * 8, width), scales.get_shape()[0]

    def codes(self, rows: Span, columns: Span, device: torch.device = CPU) -> Tensor:
        return self._part(self._qweight, rows, columns, device)

    def zeros(self, rows: Span, groups: Span) -> Tensor:
        return self._part(self._qzeros, rows, groups)

    def scales(self, rows: Span, groups: Span) -> Tensor:
        return self._scales[slice(*groups), slice(*rows)].T

    def _part(self, stored: Stored, rows: Span, others: Span, device: torch.device = CPU) -> Tensor:
        words, skipped = words_of(rows, self.bits)
        found = unpacked(stored[slice(*others), slice(*words)].to(device), self.bits)
        found = found.view(len(found), -1, 8)[:, :, list(AWQ_ORDER)].flatten(1)
        return found[:, skipped : skipped + rows[1] - rows[0]].T


def unpacked(words: Tensor, bits: int) -> Tensor:
    """words [n, m] int32 -> [n, m * 32 / bits] int32, from the low end of each."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    return ((words[..., None] >> shifts) & ((1 << bits) - 1)).flatten(1)


def blocks_of(span: Span, size: int) -> Span:
    """The blocks that a span touches."""
    return span[0] // size, -(-span[1] // size)


def words_of(span: Span, bits: int) -> tuple[Span, int]:
    """The words that hold a span, and how many numbers before it they hold."""
    each = 32 // bits
    words = blocks_of(span, each)
    return words, span[0] - words[0] * each
