"""Writes quantised checkpoints, each format by its own description, in numpy: what Manta reads is held against these numbers.

Nothing here is shared with what reads them.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file

Matrix = npt.NDArray[np.float32]
Parts = dict[str, torch.Tensor]
Encoder = Callable[[Matrix], tuple[Parts, Matrix]]

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
"""Which of eight neighbours AWQ stores first, second, ... in a word."""


def e4m3(byte: int) -> float:
    """A sign, four bits of exponent less 7, three of mantissa; no infinities."""
    sign, exponent, mantissa = -1.0 if byte & 128 else 1.0, byte >> 3 & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


E4M3 = np.array([e4m3(byte) for byte in range(256)], np.float32)


def nearest_e4m3(numbers: Matrix) -> npt.NDArray[np.uint8]:
    apart = np.abs(numbers[..., None] - E4M3)
    found: npt.NDArray[np.uint8] = np.nanargmin(apart, -1).astype(np.uint8)
    return found


@dataclass(frozen=True)
class Format:
    """encode: a weight [out, in] -> its parts by their names behind the module's, and the numbers that they stand for."""

    config: dict[str, Any]
    encode: Encoder


def fp8(block: tuple[int, int] | None, scale_name: str = "weight_scale", **extra: float) -> Encoder:
    """block: rows and columns that share a scale; 0 for all."""

    def encode(weight: Matrix) -> tuple[Parts, Matrix]:
        rows, columns = (size or whole for size, whole in zip(block or (0, 0), weight.shape, strict=True))
        grid = -(-weight.shape[0] // rows), -(-weight.shape[1] // columns)
        scales, numbers = np.zeros(grid, np.float32), np.zeros_like(weight)
        codes = np.zeros(weight.shape, np.uint8)
        for i in range(grid[0]):
            for j in range(grid[1]):
                here = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
                scales[i, j] = np.abs(weight[here]).max() / np.float32(448)
                codes[here] = nearest_e4m3(weight[here] / scales[i, j])
                numbers[here] = E4M3[codes[here]] * scales[i, j]
        stored = torch.from_numpy(scales if block is not None else scales.reshape(()))
        parts = {"weight": torch.from_numpy(codes).view(torch.float8_e4m3fn), scale_name: stored}
        return parts | {name: torch.tensor(value) for name, value in extra.items()}, numbers

    return encode


def levels(
    weight: Matrix, bits: int, group: int, symmetric: bool, order: npt.NDArray[np.int64] | None = None
) -> tuple[Any, Any, Any, Matrix]:
    """codes [out, in], zeros and scales [out, groups], numbers. order: the group of each column."""
    out, columns = weight.shape
    order = np.arange(columns) // group if order is None else order
    top, groups = 2**bits - 1, int(order.max()) + 1
    codes, zeros = np.zeros((out, columns), np.int64), np.zeros((out, groups), np.int64)
    scales, numbers = np.zeros((out, groups), np.float32), np.zeros_like(weight)
    for each in range(groups):
        mine = weight[:, order == each]
        low, high = np.minimum(mine.min(1), 0), np.maximum(mine.max(1), 1e-3)
        if symmetric:
            scale, zero = np.maximum(-low, high) * 2 / top, np.full(out, 2 ** (bits - 1))
        else:
            scale = (high - low) / top
            zero = np.clip(np.round(-low / scale), 1, top)  # one at least: as GPTQ's first format asks for
        scale = scale.astype(np.float16).astype(np.float32)
        code = np.clip(np.round(mine / scale[:, None]) + zero[:, None], 0, top).astype(np.int64)
        codes[:, order == each], zeros[:, each], scales[:, each] = code, zero, scale
        numbers[:, order == each] = (code - zero[:, None]).astype(np.float32) * scale[:, None]
    return codes, zeros, scales, numbers


def words(codes: npt.NDArray[np.int64], bits: int, order: list[int] | None = None) -> torch.Tensor:
    """[n, m] -> [n, m * bits / 32] int32, the first of each word at its low end."""
    each = 32 // bits
    padded = np.zeros((codes.shape[0], -(-codes.shape[1] // each) * each), np.int64)
    padded[:, : codes.shape[1]] = codes
    apart = padded.reshape(codes.shape[0], -1, each)
    order = order or list(range(each))
    found = np.zeros(apart.shape[:2], np.uint64)
    for place, neighbour in enumerate(order):
        found |= apart[:, :, neighbour].astype(np.uint64) << np.uint64(place * bits)
    return torch.from_numpy(found.astype(np.uint32).view(np.int32))


def half(scales: Matrix) -> torch.Tensor:
    return torch.from_numpy(scales.astype(np.float16))


def awq(group: int) -> Encoder:
    def encode(weight: Matrix) -> tuple[Parts, Matrix]:
        codes, zeros, scales, numbers = levels(weight, 4, group, symmetric=False)
        return {
            "qweight": words(codes.T, 4, AWQ_ORDER), "qzeros": words(zeros.T, 4, AWQ_ORDER), "scales": half(scales.T),
        }, numbers  # fmt: skip

    return encode


def gptq(bits: int, group: int, symmetric: bool, shift: int, mixed: bool = False) -> Encoder:
    """shift: how much too low zero points are stored. mixed: columns of a group lie apart, as with act-order."""

    def encode(weight: Matrix) -> tuple[Parts, Matrix]:
        order = np.arange(weight.shape[1]) // (group if group > 0 else weight.shape[1])
        if mixed:
            order = np.random.default_rng(weight.shape[1]).permutation(order)
        codes, zeros, scales, numbers = levels(weight, bits, group, symmetric, order)
        return {
            "qweight": words(codes, bits).T, "qzeros": words(zeros.T - shift, bits),
            "scales": half(scales.T), "g_idx": torch.from_numpy(order.astype(np.int32)),
            "bias": torch.zeros(len(weight), dtype=torch.float16),
        }, numbers  # fmt: skip

    return encode


def packed(bits: int, group: int, symmetric: bool, mixed: bool = False) -> Encoder:
    """group 0: one for all columns."""

    def encode(weight: Matrix) -> tuple[Parts, Matrix]:
        order = np.arange(weight.shape[1]) // (group or weight.shape[1])
        if mixed:
            order = np.random.default_rng(weight.shape[1]).permutation(order)
        codes, zeros, scales, numbers = levels(weight, bits, group, symmetric, order)
        parts = {"weight_packed": words(codes, bits), "weight_scale": half(scales), "weight_shape": torch.tensor(weight.shape)}
        if not symmetric:
            parts["weight_zero_point"] = words(zeros.T, bits).T
        if mixed:
            parts["weight_g_idx"] = torch.from_numpy(order.astype(np.int32))
        return parts, numbers

    return encode


def int8(weight: Matrix) -> tuple[Parts, Matrix]:
    scale = np.abs(weight).max(1, keepdims=True) / 127
    codes = np.round(weight / scale)
    return {"weight": torch.from_numpy(codes.astype(np.int8)), "weight_scale": torch.from_numpy(scale)}, codes * scale


E2M1 = np.array([(-1 if code & 8 else 1) * [0, 0.5, 1, 1.5, 2, 3, 4, 6][code & 7] for code in range(16)], np.float32)


def mxfp4(weight: Matrix) -> tuple[Parts, Matrix]:
    """weight [experts, in, out], as gpt-oss has it; parts are named behind the weight's own name."""
    experts, width, out = weight.shape
    apart = weight.swapaxes(1, 2).reshape(experts, out, width // 32, 32)
    exponents = np.floor(np.log2(np.abs(apart).max(-1))) - 2
    codes = np.abs(apart[..., None] / 2.0 ** exponents[..., None, None] - E2M1).argmin(-1)
    numbers = (E2M1[codes] * 2.0 ** exponents[..., None]).reshape(experts, out, width).swapaxes(1, 2)
    blocks = (codes[..., 0::2] | codes[..., 1::2] << 4).astype(np.uint8)
    parts = {"_blocks": torch.from_numpy(blocks), "_scales": torch.from_numpy((exponents + 127).astype(np.uint8))}
    return parts, np.ascontiguousarray(numbers.astype(np.float32))


def compressed(stored: str, weights: dict[str, Any], **fields: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": stored, "quantization_status": "compressed", "ignore": ["lm_head"],
        "config_groups": {"group_0": group}, **fields,
    }  # fmt: skip


def of_ints(bits: int, group: int | None, symmetric: bool, **fields: Any) -> dict[str, Any]:
    strategy = "channel" if group is None else "group"
    return {"num_bits": bits, "type": "int", "strategy": strategy, "group_size": group, "symmetric": symmetric, **fields}


def of_floats(strategy: str, **fields: Any) -> dict[str, Any]:
    return {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, "dynamic": False, **fields}


AWQ = {"quant_method": "awq", "bits": 4, "zero_point": True, "version": "gemm"}
MXFP4 = Format({"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}, mxfp4)
"""For `is_stack` alone."""

GPTQ = {"quant_method": "gptq", "damp_percent": 0.01}
FP8 = {"quant_method": "fp8"}

FORMATS = {
    "fp8-tensor": Format(FP8 | {"activation_scheme": "static"}, fp8(None, input_scale=0.02)),
    "fp8-tensor-ministral": Format(
        FP8 | {"activation_scheme": "static", "weight_block_size": None}, fp8(None, "weight_scale_inv", activation_scale=0.02)
    ),
    "fp8-channel": Format(FP8 | {"activation_scheme": "dynamic"}, fp8((1, 0))),
    "fp8-block": Format(
        FP8 | {"activation_scheme": "dynamic", "weight_block_size": [16, 40]}, fp8((16, 40), "weight_scale_inv")
    ),
    "compressed-fp8-tensor": Format(compressed("float-quantized", of_floats("tensor")), fp8(None, input_scale=0.02)),
    "compressed-fp8-channel": Format(compressed("float-quantized", of_floats("channel")), fp8((1, 0))),
    "compressed-fp8-block": Format(
        compressed("float-quantized", of_floats("block", block_structure=[24, 32])), fp8((24, 32))
    ),
    "compressed-int8": Format(compressed("int-quantized", of_ints(8, None, symmetric=True)), int8),
    "compressed-w4-sym": Format(compressed("pack-quantized", of_ints(4, 32, symmetric=True)), packed(4, 32, symmetric=True)),
    "compressed-w4-asym": Format(compressed("pack-quantized", of_ints(4, 32, symmetric=False)), packed(4, 32, symmetric=False)),
    "compressed-w4-order": Format(
        compressed("pack-quantized", of_ints(4, 16, symmetric=True, actorder="group")),
        packed(4, 16, symmetric=True, mixed=True),
    ),
    "compressed-w4-channel": Format(
        compressed("pack-quantized", of_ints(4, None, symmetric=False)), packed(4, 0, symmetric=False)
    ),
    "compressed-w8": Format(compressed("pack-quantized", of_ints(8, 32, symmetric=True)), packed(8, 32, symmetric=True)),
    "awq": Format(AWQ | {"group_size": 32}, awq(32)),
    "gptq-sym": Format(GPTQ | {"bits": 4, "group_size": 32, "sym": True}, gptq(4, 32, symmetric=True, shift=1)),
    "gptq-asym": Format(
        GPTQ | {"bits": 4, "group_size": 32, "sym": False, "desc_act": False}, gptq(4, 32, symmetric=False, shift=1)
    ),
    "gptq-order": Format(
        GPTQ | {"bits": 4, "group_size": 16, "sym": True, "desc_act": True}, gptq(4, 16, symmetric=True, shift=1, mixed=True)
    ),
    "gptq-v2": Format(
        GPTQ | {"bits": 4, "group_size": 32, "sym": False, "checkpoint_format": "gptq_v2"},
        gptq(4, 32, symmetric=False, shift=0),
    ),
    "gptq-8": Format(GPTQ | {"bits": 8, "group_size": -1, "sym": True}, gptq(8, -1, symmetric=True, shift=1)),
}  # fmt: skip


def is_quantised(name: str) -> bool:
    return name.endswith("_proj.weight")


def is_stack(name: str) -> bool:
    """Of experts, as gpt-oss has them."""
    return name.endswith(("experts.gate_up_proj", "experts.down_proj"))


def quantise(plain: Path, quantised: Path, chosen: Format, wanted: Callable[[str], bool] = is_quantised) -> None:
    """Writes `quantised`, and into `plain`, from which it is made, the numbers that it stands for."""
    shutil.copytree(plain, quantised)
    tensors, stored = load_file(plain / "model.safetensors"), {}
    for name, tensor in list(tensors.items()):
        if not wanted(name):
            stored[name] = tensor
            continue
        parts, numbers = chosen.encode(tensor.float().numpy())
        module = name.removesuffix(".weight")
        if f"{module}.bias" in tensors:
            parts.pop("bias", None)
        stored |= {module + part if part[0] == "_" else f"{module}.{part}": value.contiguous() for part, value in parts.items()}
        tensors[name] = torch.from_numpy(numbers)
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    save_file(stored, quantised / "model.safetensors", metadata={"format": "pt"})
    path = quantised / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": chosen.config}))
