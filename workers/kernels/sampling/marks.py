"""What a sequence brings when it enters a row: its prompt, emitted tokens and stop ids into the row's marks, its biases.

One copy and one launch, in the order of the stream. Imports torch, NumPy and Triton.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from torch import Tensor

COUNT_BITS = 24
"""Marks of an id in a row: the low bits count how often it was emitted."""
IN_PROMPT = 1 << 24
BARRED_STOP = 1 << 25
"""A stop id, which may not come before the record's stop_from."""

_IN_PROMPT = tl.constexpr(IN_PROMPT)
_BARRED_STOP = tl.constexpr(BARRED_STOP)
_BLOCK = 1024

Ints = npt.NDArray[np.int32]


@triton.jit(do_not_specialize=["prompt_end", "output_end", "stops_end", "end"])
def _fill(entries, marks, bias, vocab, prompt_end, output_end, stops_end, end, BLOCK: tl.constexpr):
    """entries: ids of the prompt, of the output, stop ids, biased ids, then the bits of the biases."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ids = tl.load(entries + at, mask=at < end, other=-1)
    owned = (ids >= 0) & (ids < vocab)
    tl.atomic_or(marks + ids, _IN_PROMPT, mask=owned & (at < prompt_end), sem="relaxed")
    tl.atomic_add(marks + ids, 1, mask=owned & (at >= prompt_end) & (at < output_end), sem="relaxed")
    tl.atomic_or(marks + ids, _BARRED_STOP, mask=owned & (at >= output_end) & (at < stops_end), sem="relaxed")
    biased = owned & (at >= stops_end)
    value = tl.load(entries + end - stops_end + at, mask=biased, other=0)
    tl.store(bias + ids, value.to(tl.float32, bitcast=True), mask=biased)


def fill(marks: Tensor, bias: Tensor, *, prompt: Ints, output: Ints, stops: Ints, biases: dict[int, float]) -> None:
    """Fills one row, marks and bias [vocabulary], which must be zero; ids outside the vocabulary are ignored. No waiting."""
    values = np.fromiter(biases.values(), np.float32, len(biases)).view(np.int32)
    parts = [prompt, output, stops, np.fromiter(biases, np.int32, len(biases)), values]
    ends = np.cumsum([len(part) for part in parts]).tolist()
    entries = torch.from_numpy(np.concatenate(parts).astype(np.int32))
    if marks.is_cuda:
        entries = entries.pin_memory().to(marks.device, non_blocking=True)
    if ends[3]:
        _fill[(triton.cdiv(ends[3], _BLOCK),)](entries, marks, bias, marks.shape[0], *ends[:4], BLOCK=_BLOCK)
