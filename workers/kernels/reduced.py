"""What is multiplied in fewer bits than sums are made in: matrices in FP8, four bits or MXFP4, with a scale for each row or
group of columns, and activations in FP8, with a scale for each token or group of its columns.

Imports torch.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST_FP8 = 448.0
BLOCK = 128  # rows and columns
PADDING = 4  # tokens: the library takes multiples of so many

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""What four bits mean in MXFP4: a sign, two bits of exponent, one of mantissa (OCP Microscaling Formats, 1.0)."""

FP4_BLOCK = 32  # columns that share a scale
FP4_SPAN = 4 * FP4_BLOCK
E8M0_BIAS = 127


@dataclass(frozen=True, slots=True)
class Reduced:
    """[rows, columns]. values: float8_e4m3fn [rows, columns], or int16 [rows, columns / 4], four codes of four bits each: the
    n-th lowest bits of a span's e-th element are the code of its column `n * span / 4 + e`. Elements of so many columns then
    become their quarters, each of columns that follow one another and share a scale. scales [rows, groups]: groups of columns
    of one size. zeros uint8 [rows, groups]: with four bits, which code is nought. All are contiguous, and may be filled after
    this has been made. blocks float32 [rows / 128, groups], contiguous: the scales of FP8 in blocks of 128 x 128, where
    `filled` has found that it is."""

    values: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    blocks: Tensor | None = None

    @classmethod
    def empty(cls, rows: int, columns: int, bits: int, group: int, scale: torch.dtype, device: torch.device) -> "Reduced":
        """bits: 8, FP8, or 4. group: columns that share a scale; it divides their number."""
        groups = columns // group
        scales = torch.empty(rows, groups, dtype=scale, device=device)
        if bits == 8:
            return cls(torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=device), scales)
        values = torch.empty(rows, columns // 4, dtype=torch.int16, device=device)
        return cls(values, scales, torch.empty(rows, groups, dtype=torch.uint8, device=device))

    @property
    def bits(self) -> int:
        return 8 if self.zeros is None else 4

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1] * (1 if self.bits == 8 else 4)

    @property
    def group(self) -> int:
        return self.shape[1] // self.scales.shape[1]

    @property
    def span(self) -> int:
        """Columns of a span, with four bits: those of four groups, or as many of them as divide a row."""
        columns = self.shape[1]
        return min(4 * self.group, columns & -columns)

    @property
    def by_row(self) -> bool:
        """FP8 with one scale for each row, which can be applied to its sums."""
        return self.bits == 8 and self.scales.shape[1] == 1

    @property
    def kind(self) -> str:
        return "fp8" if self.bits == 8 else "int4"

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes + (0 if self.zeros is None else self.zeros.nbytes)

    def rows(self, start: int, stop: int) -> "Reduced":
        """A part, of the same memory."""
        zeros = None if self.zeros is None else self.zeros[start:stop]
        return Reduced(self.values[start:stop], self.scales[start:stop], zeros)

    def fill(self, codes: Tensor, scales: Tensor, zeros: Tensor | None = None) -> None:
        """codes: float8_e4m3fn, or uint8 from 0 to 15, [rows, columns]. scales and zeros: broadcast to [rows, groups]."""
        self.scales.copy_(scales)
        if self.zeros is None:
            self.values.copy_(codes)
            return
        assert zeros is not None, "four bits have zero points"
        self.zeros.copy_(zeros)
        _pack(codes, self.values, self.span)

    def filled(self) -> "Reduced":
        """The same with `blocks`, where it turns out to be in such: kernels then read a scale once for 128 rows."""
        rows, columns = self.shape
        if self.bits == 4 or rows % BLOCK or columns % BLOCK or self.group != BLOCK:
            return self
        blocks = self.scales[::BLOCK]
        same = torch.equal(self.scales, blocks.repeat_interleave(BLOCK, 0))
        return replace(self, blocks=blocks.float().contiguous() if same else None)

    def round(self, numbers: Tensor) -> None:
        """The nearest of FP8 with the least scale for each row; numbers [rows, columns], of one group."""
        values, scales = rounded_rows(numbers)
        self.fill(values, scales)

    def numbers(self, dtype: torch.dtype) -> Tensor:
        """What it stands for, [rows, columns]."""
        if self.zeros is None:
            wide = self.values.float()
        else:
            wide = _codes(self.values, self.span).float() - self.zeros.float().repeat_interleave(self.group, 1)
        return wide.mul_(self.scales.float().repeat_interleave(self.group, 1)).to(dtype)


@dataclass(frozen=True, slots=True)
class Microscaled:
    """[rows, columns] in MXFP4. values: int16 [rows, padded / 4], codes as `Reduced` has them in spans of 128 columns, whose
    quarters are the blocks that share a scale; scales: uint8 [rows, padded / 32], exponents of two more `E8M0_BIAS`. What is
    behind the last column, as far as a span goes, is nought."""

    values: Tensor
    scales: Tensor
    columns: int

    @classmethod
    def empty(cls, rows: int, columns: int, device: torch.device) -> "Microscaled":
        """columns: a multiple of `FP4_BLOCK`."""
        spans = -(-columns // FP4_SPAN)
        values = torch.empty(rows, spans * FP4_SPAN // 4, dtype=torch.int16, device=device)
        return cls(values, torch.empty(rows, 4 * spans, dtype=torch.uint8, device=device), columns)

    @property
    def kind(self) -> str:
        return "mxfp4"

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.columns

    @property
    def group(self) -> int:
        return FP4_BLOCK

    @property
    def span(self) -> int:
        return FP4_SPAN

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes

    def rows(self, start: int, stop: int) -> "Microscaled":
        """A part, of the same memory."""
        return Microscaled(self.values[start:stop], self.scales[start:stop], self.columns)

    def fill(self, codes: Tensor, scales: Tensor) -> None:
        """codes: uint8 from 0 to 15, [rows, columns]. scales: uint8 [rows, columns / 32]."""
        self.scales.zero_()
        self.scales[:, : scales.shape[1]].copy_(scales)
        _pack(F.pad(codes, (0, 4 * self.values.shape[1] - self.columns)), self.values, self.span)

    def numbers(self, dtype: torch.dtype) -> Tensor:
        """What it stands for, [rows, columns]."""
        codes = _codes(self.values, self.span)[:, : self.columns].int()
        scales = torch.ldexp(torch.ones_like(self.scales, dtype=torch.float64), self.scales.int() - E8M0_BIAS)
        wide = torch.tensor(FP4, dtype=torch.float64, device=codes.device)[codes]
        return wide.mul_(scales.repeat_interleave(FP4_BLOCK, 1)[:, : self.columns]).to(dtype)


def _pack(codes: Tensor, values: Tensor, span: int) -> None:
    """codes: from 0 to 15, [rows, columns], into int16 [rows, columns / 4] by spans of so many columns."""
    values.zero_()
    elements = values.view(len(codes), -1, span // 4)
    for number, part in enumerate(codes.view(len(codes), -1, 4, span // 4).unbind(2)):
        elements |= part.to(elements).bitwise_left_shift_(4 * number)


def _codes(values: Tensor, span: int) -> Tensor:
    """What `_pack` has packed."""
    elements = values.view(len(values), -1, span // 4)
    return torch.stack([elements >> 4 * number & 15 for number in range(4)], 2).flatten(1)


@dataclass(frozen=True, slots=True)
class Rounded:
    """[tokens, columns] in FP8. values: float8_e4m3fn [padded, columns]; scales: float32 [groups, padded], of groups of columns
    of one size, by which they are to be multiplied. Both are contiguous, with anything behind the tokens. dtype: of what was
    rounded, and of its products."""

    values: Tensor
    scales: Tensor
    tokens: int
    dtype: torch.dtype

    @classmethod
    def empty(cls, tokens: int, columns: int, group: int, dtype: torch.dtype, device: torch.device) -> "Rounded":
        padded = -(-tokens // PADDING) * PADDING
        scales = torch.empty(columns // group, padded, dtype=torch.float32, device=device)
        return cls(torch.empty(padded, columns, dtype=torch.float8_e4m3fn, device=device), scales, tokens, dtype)

    @property
    def group(self) -> int:
        return self.values.shape[1] // len(self.scales)

    def __len__(self) -> int:
        return self.tokens

    def numbers(self, dtype: torch.dtype) -> Tensor:
        """What it stands for, [tokens, columns]."""
        scales = self.scales[:, : self.tokens].T.repeat_interleave(self.group, 1)
        return (self.values[: self.tokens].to(dtype) * scales).to(dtype)


def rounded_rows(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """[rows, columns] -> float8_e4m3fn [rows, columns] and scales float32 [rows, 1], by which they are to be multiplied."""
    wide = numbers.float()
    largest = wide.abs().amax(1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny)
    scales = largest / torch.full_like(largest, LARGEST_FP8)  # by a number CUDA multiplies with its inverse
    return wide.div(scales).clamp_(-LARGEST_FP8, LARGEST_FP8).to(torch.float8_e4m3fn), scales
