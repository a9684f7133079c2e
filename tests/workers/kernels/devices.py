"""Where a kernel is tested: on the GPU where there is one, else on the CPU under Triton's interpreter.

Imported before any kernel, since triton reads its variable when it is imported.
"""

import os

import pytest
import torch
from _pytest.mark import ParameterSet
from torch import Tensor

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"

gpu = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a CUDA device")]
DEVICES = [pytest.param("cuda", marks=gpu)] if CUDA else [pytest.param("cpu")]
"""The other one is no case: hundreds would be skipped, and each process would collect them first."""


def attention_cases(*dtypes: str) -> list[ParameterSet]:
    """(dtype, device): real on a GPU, else interpreted on a CPU, where bfloat16 products are not served."""
    if CUDA:
        return [pytest.param(dtype, "cuda", id=f"{dtype}-cuda", marks=gpu) for dtype in dtypes]
    return [pytest.param(dtype, "cpu", id=dtype) for dtype in dtypes if dtype != "bfloat16"]


every_attention_dtype = pytest.mark.parametrize(("dtype", "device"), attention_cases("float32", "float16", "bfloat16"))
one_attention_dtype = pytest.mark.parametrize(("dtype", "device"), attention_cases("float16"))
ATTENTION_TOLERANCE = {"float32": 5e-6, "float16": 3e-3, "bfloat16": 2e-2}
"""Largest difference from dense float64 attention, in its absolute value."""

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3 if CUDA else 8e-3, torch.float16: 1e-3}
"""Relative Frobenius error against float64: two roundings to the dtype at most, each of half a unit in the last place. The
interpreter cuts bfloat16 off instead."""


def close(out: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """NaN, a poisoned number that nobody wrote, is never close."""
    assert out.shape == exact.shape
    assert float((out.double() - exact).norm() / exact.norm()) < TOLERANCE[dtype]


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x float32 as a kernel of these devices rounds it."""
    if dtype == torch.bfloat16 and not CUDA:
        x = (x.view(torch.int32) & ~0xFFFF).view(torch.float32)
    return x.to(dtype)


def poisoned(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype, device=device)


def apart(x: Tensor) -> Tensor:
    """The same rows, with room for 16 numbers between them, which hold NaN."""
    room = x.new_full((x.shape[0], x.shape[1] + 16), torch.nan)
    room[:, : x.shape[1]] = x
    return room[:, : x.shape[1]]


def exact_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.double()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.double()
