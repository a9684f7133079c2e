"""Bits per byte as the engine tells them: transformers' cross entropy, and a little more with KV in FP8."""

import math

import pytest
import torch
import torch.nn.functional as F

from benchmarks.models.kv_quality import TINY, bits_per_byte, cut, held_out
from tests.shared.checkpoints import load_reference

TEXT = 8 * '''
def read(path):
    """Return the lines of a file."""
    with open(path) as file:
        return file.readlines()
'''


def test_it_is_the_cross_entropy_and_fp8_costs_little() -> None:
    windows = cut(TINY, [TEXT], 64, 3)
    assert [len(prompt) for prompt in windows.prompts] == [64] * 3
    ids = torch.tensor(windows.prompts)
    with torch.inference_mode():
        logits = load_reference(TINY)(ids).logits[:, :-1].flatten(0, 1)
    expected = float(F.cross_entropy(logits, ids[:, 1:].flatten())) / math.log(2) / windows.token_bytes
    options = {"dtype": "float32", "threads": 1, "kv_memory": 1 << 22, "block_size": 16}
    found, narrow = (bits_per_byte(TINY, windows, kv_dtype=kv_dtype, **options) for kv_dtype in ("auto", "fp8"))
    assert found == pytest.approx(expected, abs=1e-5)
    assert 1e-5 < abs(narrow - found) < 0.05


def test_text_that_fills_no_window() -> None:
    with pytest.raises(ValueError, match="fill no window of 4096: give more text"):
        cut(TINY, [TEXT], 4096, 1)


def test_what_was_held_out_is_the_same_each_time() -> None:
    assert held_out() == held_out() != held_out(1)
