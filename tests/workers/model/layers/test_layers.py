"""Layers against transformers' own, dtype by dtype."""

from typing import Any

import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

from tests.workers.decoding import CPU
from workers.model.config.rope import Rope
from workers.model.layers.linear import Linear, RowParallelLinear, can_pack
from workers.model.layers.mlp import SwiGLU
from workers.model.layers.norm import RMSNorm
from workers.model.layers.rotary import Rotary
from workers.model.layers.vocabulary import Head
from workers.parallel.in_process import Solo

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SCALED: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 3.0},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 24.0},
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 33])
def test_rms_norm_rounds_as_transformers(dtype: torch.dtype, tokens: int) -> None:
    x = torch.randn(tokens, 96).to(dtype)
    norm, reference = RMSNorm((96,), 1e-5, dtype, CPU), LlamaRMSNorm(96, 1e-5).to(dtype)
    norm.weight.uniform_(0.5, 1.5)
    reference.weight.data = norm.weight
    with torch.no_grad():
        assert torch.equal(norm(x), reference(x))


def test_rms_norm_keeps_float64() -> None:
    x = torch.randn(5, 64, dtype=torch.float64)
    norm = RMSNorm((64,), 1e-6, torch.float64, CPU)
    norm.weight.fill_(1.0)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(norm(x), expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("kind", SCALED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotation_equals_transformers(kind: str, dtype: torch.dtype) -> None:
    parameters = {"rope_type": kind, "rope_theta": 10_000.0, **SCALED[kind]}
    config = transformers.LlamaConfig(
        hidden_size=128, num_attention_heads=4, max_position_embeddings=512, rope_parameters=parameters
    )
    fields = dict(SCALED[kind])
    original = fields.pop("original_max_position_embeddings", 512)
    rotary = Rotary(Rope(10_000.0, kind, original_max_position=original, **fields), 32, 512, dtype, CPU)
    positions = torch.tensor([0, 1, 77, 500])
    heads = torch.randn(4, 6, 32).to(dtype)
    cos, sin = LlamaRotaryEmbedding(config)(heads, positions[None])
    expected, _ = apply_rotary_pos_emb(heads.transpose(0, 1)[None], heads.transpose(0, 1)[None], cos, sin)
    turned = rotary.turn(heads, rotary.at(positions))
    tolerance = {torch.float64: 1e-4, torch.float32: 1e-6, torch.bfloat16: 4e-2, torch.float16: 4e-3}[dtype]
    torch.testing.assert_close(turned, expected[0].transpose(0, 1), rtol=tolerance, atol=tolerance)


def test_rotation_is_exact_in_float64() -> None:
    rotary = Rotary(Rope(10_000.0), 2, 4096, torch.float64, CPU)
    x = torch.tensor([[[1.0, 0.0]]], dtype=torch.float64)
    turned = rotary.turn(x, rotary.at(torch.tensor([4000])))[0, 0]
    angle = torch.tensor(4000.0, dtype=torch.float64)
    torch.testing.assert_close(turned, torch.stack((angle.cos(), angle.sin())), rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 17])
def test_packing_changes_no_result(dtype: torch.dtype, bias: bool, tokens: int) -> None:
    linear = Linear(48, 32, dtype, CPU, bias)
    assert linear.weight is not None
    linear.weight.normal_()
    if linear.bias is not None:
        linear.bias.normal_()
    x = torch.randn(tokens, 32).to(dtype)
    plain = linear(x)
    linear.pack()
    assert (linear.weight is None) == can_pack(dtype, CPU)
    tolerance = {torch.float64: 0.0, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(linear(x), plain, rtol=tolerance, atol=tolerance)


def test_swiglu() -> None:
    gate_up = Linear(2 * 24, 16, torch.float64, CPU)
    down = RowParallelLinear(16, 24, torch.float64, CPU, Solo())
    assert gate_up.weight is not None
    assert down.weight is not None
    gate_up.weight.normal_()
    down.weight.normal_()
    x = torch.randn(3, 16, dtype=torch.float64)
    gate, up = gate_up.weight[:24], gate_up.weight[24:]
    expected = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.weight.T
    torch.testing.assert_close(SwiGLU(gate_up, down)(x), expected)


def test_head_masks_its_padding() -> None:
    linear = Linear(8, 4, torch.float32, CPU)
    assert linear.weight is not None
    linear.weight.fill_(1.0)
    logits = Head(linear, 6)(torch.ones(2, 4))
    assert logits.tolist() == [[4.0] * 6 + [-torch.inf] * 2] * 2
