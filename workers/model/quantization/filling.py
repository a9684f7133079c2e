"""Where a checkpoint's slices go that are not kept as plain numbers: taken over as they are stored, or rounded to FP8.

One slice at a time is there beside what is kept. Imports torch, and the form in which kernels read such matrices.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from workers.kernels.experts.stacked import Stacked
from workers.kernels.reduced import Microscaled, Reduced, rounded_rows
from workers.model.config.fields import CheckpointError
from workers.model.quantization.stored import Grouped, Mxfp4, Scaled, in_pieces, spans_of
from workers.model.quantization.words import Span, blocks_of


class Rounding:
    """Plain numbers, of which each row becomes the nearest that FP8 has."""

    def __init__(self, target: Tensor) -> None:
        self._target = target
        self.shape, self.nbytes = target.shape, target.nbytes

    def numel(self) -> int:
        return self._target.numel()

    def take(self, stored: Any, index: Any) -> None:
        """index: of this in `stored`."""
        for rows, columns, at in _pieces(stored, index):
            values, scales = rounded_rows(stored[slice(*rows), slice(*columns)].to(self._target.device))
            self._target[slice(*at)].copy_(values.float() * scales)


class Keeping:
    """Rows of a matrix that is kept in fewer bits."""

    def __init__(self, target: Reduced) -> None:
        self._target = target
        self.shape, self.nbytes = torch.Size(target.shape), target.nbytes

    def numel(self) -> int:
        return self.shape.numel()

    def take(self, stored: Any, index: Any) -> None:
        """Errors: CheckpointError where columns are mixed of which config.json says that they are in order."""
        for rows, columns, at in _pieces(stored, index):
            target = self._target.rows(*at)
            if isinstance(stored, Scaled):
                self._take_fp8(target, stored, rows, columns)
            elif isinstance(stored, Grouped):
                self._take_words(target, stored, rows, columns)
            else:
                target.round(stored[slice(*rows), slice(*columns)].to(target.values.device))

    def _take_fp8(self, target: Reduced, stored: Scaled, rows: Span, columns: Span) -> None:
        scales = stored.scales.spread(rows, columns)
        groups = scales if scales.shape[1] == 1 else scales[:, :: target.group]
        target.fill(stored.values[slice(*rows), slice(*columns)], groups)

    def _take_words(self, target: Reduced, stored: Grouped, rows: Span, columns: Span) -> None:
        if stored.order is not None:
            raise CheckpointError(
                "a quantised weight's columns are in an order of their own, of which config.json says nothing: download both "
                "again"
            )
        words, groups = stored.words, blocks_of(columns, stored.group)
        codes = words.codes(rows, columns, target.values.device)  # on a CPU this would take a GPU's start minutes
        target.fill(codes.to(torch.uint8), words.scales(rows, groups), words.zeros(rows, groups))


class FillingStack:
    """Experts of one tensor, inputs first: [experts, in, out]."""

    def __init__(self, target: Stacked | Tensor) -> None:
        """target: [experts, out, in], in fewer bits, or plain numbers which become the nearest that FP8 has."""
        self._target = target
        experts, rows, columns = target.shape
        self.shape, self.nbytes = torch.Size((experts, columns, rows)), target.nbytes

    def numel(self) -> int:
        return self.shape.numel()

    def take(self, stored: Any, index: Any) -> None:
        """One expert at a time."""
        experts, columns, rows = spans_of(index, tuple(stored.get_shape()))
        for number, expert in enumerate(range(*experts)):
            target = self._target[number] if isinstance(self._target, Tensor) else self._target.part(number, number + 1).matrix
            if isinstance(target, Microscaled):
                assert isinstance(stored, Mxfp4), "as its form says"
                target.fill(*stored.codes(expert, rows, columns, target.values.device))
                continue
            device = target.device if isinstance(target, Tensor) else target.values.device
            numbers = stored[expert : expert + 1, slice(*columns), slice(*rows)][0].to(device).T
            if isinstance(target, Reduced):
                target.round(numbers)
            else:
                values, scales = rounded_rows(numbers)
                target.copy_(values.float() * scales)


def _pieces(stored: Any, index: Any) -> Iterator[tuple[Span, Span, Span]]:
    """Rows and columns of some at a time, and where these rows go."""
    spans = spans_of(index, tuple(stored.get_shape()))
    for rows, columns in in_pieces(spans):
        yield rows, columns, (rows[0] - spans[0][0], rows[1] - spans[0][0])
