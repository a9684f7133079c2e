"""Ours is what the formats' own libraries make of the same words: recorded of those that are no dependency, else asked."""

import pytest
import torch
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tests.workers.model.quantization.recorded import AUTO_AWQ, AUTO_GPTQ, COMPRESSED_TENSORS, Recorded
from workers.model.config.quantization import LINEAR, QuantizationRule, Scheme, WeightForm
from workers.model.quantization.checkpoint import quantised
from workers.model.quantization.stored import Quantised

KINDS = {torch.float8_e4m3fn: "F8_E4M3", torch.float32: "F32", torch.int32: "I32", torch.int64: "I64", torch.uint8: "U8"}


class InMemory:
    """A tensor as safetensors has it."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def get_dtype(self) -> str:
        return KINDS[self._tensor.dtype]

    def __getitem__(self, index: object) -> Tensor:
        return self._tensor[index]  # type: ignore[index]


def made(form: WeightForm, parts: dict[str, Tensor]) -> Quantised:
    tensors = {f"mlp.{name}": InMemory(part) for name, part in parts.items()}
    return quantised(Scheme("", (QuantizationRule((LINEAR,), form),)), tensors, tensors.__getitem__).made["mlp.weight"]


def read(recorded: Recorded, *words: str) -> dict[str, Tensor]:
    return {name: torch.tensor(rows, dtype=torch.int32 if name in words else None) for name, rows in recorded.items()}


def test_compressed_tensors() -> None:
    parts = read(COMPRESSED_TENSORS, "weight_packed", "weight_zero_point")
    numbers = parts.pop("numbers")
    weight = made(WeightForm("packed", 4, (1, 8), zeros=True), parts | {"weight_shape": torch.tensor(numbers.shape)})
    assert torch.equal(weight[...], numbers)


def test_auto_gptq() -> None:
    parts = read(AUTO_GPTQ, "qweight", "qzeros", "g_idx")
    numbers = parts.pop("numbers")
    weight = made(WeightForm("gptq", 4, (1, 16), zeros=True, shift=1), parts | {"g_idx": parts["g_idx"][0]})
    assert torch.equal(weight[...], numbers)


def test_auto_awq() -> None:
    parts = read(AUTO_AWQ, "qweight", "qzeros")
    numbers = parts.pop("numbers")
    assert torch.equal(made(WeightForm("awq", 4, (1, 4), zeros=True), parts)[...], numbers)


@pytest.mark.parametrize("grid", [(1, 1), (6, 1), (3, 2)])
def test_fp8_of_transformers(grid: tuple[int, int]) -> None:
    values, scale = torch.randn(6, 8).to(torch.float8_e4m3fn), torch.rand(grid)
    form = WeightForm("fp8", block=(6 // grid[0], 8 // grid[1]))
    theirs = Fp8Dequantize(None)._dequantize_one(values, scale, torch.float32)
    assert torch.equal(made(form, {"weight": values, "weight_scale_inv": scale})[...], theirs)


def test_mxfp4_of_transformers() -> None:
    blocks = torch.randint(0, 256, (2, 4, 3, 16), dtype=torch.uint8)
    scales = torch.randint(110, 130, (2, 4, 3), dtype=torch.uint8)
    tensors = {"w_blocks": InMemory(blocks), "w_scales": InMemory(scales)}
    ours = quantised(Scheme("mxfp4", ()), tensors, tensors.__getitem__).made["w"][...]
    assert torch.equal(ours, convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
