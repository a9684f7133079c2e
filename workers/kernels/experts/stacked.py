"""The matrices of a layer's experts as kernels take them: plain numbers, or in fewer bits. Imports torch."""

from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from workers.kernels.reduced import Microscaled, Reduced


@dataclass(frozen=True, slots=True)
class Stacked:
    """[experts, rows, columns]: of one expert behind the other's, in one matrix of all rows."""

    matrix: Reduced | Microscaled
    experts: int

    @property
    def shape(self) -> tuple[int, int, int]:
        rows, columns = self.matrix.shape
        return self.experts, rows // self.experts, columns

    @property
    def nbytes(self) -> int:
        return self.matrix.nbytes

    def part(self, first: int, stop: int) -> "Stacked":
        """Some of the experts, of the same memory."""
        rows = self.shape[1]
        return Stacked(self.matrix.rows(first * rows, stop * rows), stop - first)

    def numbers(self, expert: int, dtype: torch.dtype) -> Tensor:
        """What an expert's matrix stands for, [rows, columns]."""
        return self.part(expert, expert + 1).matrix.numbers(dtype)


Weight: TypeAlias = Tensor | Stacked
"""[experts, rows, columns], contiguous."""


FOUR_BITS = "int4", "mxfp4"


@dataclass(frozen=True, slots=True)
class Operand:
    """As kernels are given it. kind: "plain", "fp8", "int4" or "mxfp4", whose scales are four in an element of 32 bits. group:
    columns that share a scale, 0 for all of a row. span: as `Reduced` has it, of FP8 what a thread has at a time. What there
    is none of is `values` again."""

    values: Tensor
    scales: Tensor
    zeros: Tensor
    kind: str = "plain"
    group: int = 0
    span: int = 16


def operand(weight: Weight) -> Operand:
    if isinstance(weight, Tensor):
        return Operand(weight, weight, weight)
    matrix = weight.matrix
    if isinstance(matrix, Microscaled):
        return Operand(matrix.values, matrix.scales.view(torch.int32), matrix.values, "mxfp4", matrix.group, matrix.span)
    found = Operand(matrix.values, matrix.scales, matrix.values, matrix.kind, 0 if matrix.by_row else matrix.group)
    return found if matrix.zeros is None else replace(found, zeros=matrix.zeros, span=matrix.span)
