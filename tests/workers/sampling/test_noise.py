"""Noise is its definition, bit for bit, in any shape."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.shared.examples import examples
from workers.sampling import noise


def splitmix(state: int) -> int:
    z = (state + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


def uniform_bits(seed: int, choice: int, position: int, token: int) -> int:
    stream = splitmix((splitmix(seed) + choice) % 2**64)
    key = splitmix((stream + position * 0x9E3779B97F4A7C15) % 2**64)
    bits = token * 0x9E3779B1 % 2**32 ^ key % 2**32
    bits = (bits ^ bits >> 16) * 0x7FEB352D % 2**32 ^ key >> 32
    bits = (bits ^ bits >> 15) * 0x846CA68B % 2**32
    return bits ^ bits >> 16


@given(st.integers(0, 2**63 - 1), st.integers(0, 127), st.integers(0, 10**6), st.integers(0, 10**6))
@settings(max_examples=examples(60))
def test_noise_is_its_definition_in_unbounded_integers(seed: int, choice: int, position: int, token: int) -> None:
    streams = np.array([noise.stream(seed, choice)], np.uint64)
    keys = torch.from_numpy(noise.keys(streams, np.array([position])))
    ids = torch.tensor([[token]], dtype=torch.int32)
    bits = uniform_bits(seed, choice, position, token)
    for dtype, kept, tolerance in ((torch.float64, 32, 1e-12), (torch.float32, 23, 1e-5)):
        want = -np.log(-np.log(((bits >> 32 - kept) + 0.5) / 2**kept))
        assert noise.gumbel(keys, ids, dtype).item() == pytest.approx(want, rel=tolerance, abs=tolerance)
        assert want <= noise.highest(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_noise_has_the_same_bits_in_any_shape(dtype: torch.dtype) -> None:
    keys = torch.from_numpy(noise.keys(np.arange(5, dtype=np.uint64), np.arange(5)))
    ids = torch.arange(100_000, dtype=torch.int32)
    full = noise.gumbel(keys, ids.expand(5, -1), dtype)
    assert full.isfinite().all()
    assert full.max() <= noise.highest(dtype) + 1e-4
    for start, stop in ((0, 1), (7, 8), (13, 30), (99_000, 99_999), (1, 70_001)):
        part = noise.gumbel(keys[2:3], ids[None, start:stop], dtype)
        assert torch.equal(part[0], full[2, start:stop])
