"""Writes a checkpoint whose linear layers have 4-bit weights, rounded to the nearest: the format is compressed-tensors'.

No data is looked at, as GPTQ and AWQ do, so it is the least that four bits give. Imports torch and safetensors.
"""

import json
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS = "model.safetensors"
LINEAR = re.compile(r"layers\.\d+\..*_proj\.weight$")
LEVELS = 15


def write_four_bits(source: Path, target: Path, group: int, symmetric: bool) -> None:
    """source: a checkpoint in 16 or 32 bits, in one file. group: columns that share a scale."""
    shutil.copytree(source, target)
    stored: dict[str, Tensor] = {}
    for name, weight in load_file(source / WEIGHTS).items():
        if LINEAR.search(name):
            module = name.removesuffix(".weight")
            stored |= {f"{module}.{part}": tensor for part, tensor in _parts(weight.float(), group, symmetric).items()}
        else:
            stored[name] = weight
    save_file(stored, target / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": group, "symmetric": symmetric}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "ignore": ["lm_head"], "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }  # fmt: skip
    (target / "config.json").write_text(json.dumps(config))


def _parts(weight: Tensor, group: int, symmetric: bool) -> dict[str, Tensor]:
    """weight [out, in] float32."""
    apart = weight.view(len(weight), -1, group)
    low, high = apart.amin(2).clamp(max=0), apart.amax(2).clamp(min=0)
    if symmetric:
        scale, zero = torch.maximum(-low, high) / 7.5, torch.full_like(low, 8)
    else:
        scale = (high - low) / LEVELS
        zero = (-low / scale).round()
    scale = scale.clamp(min=1e-8).bfloat16().float()
    codes = ((apart / scale[..., None]).round() + zero[..., None]).clamp(0, LEVELS).flatten(1)
    parts = {"weight_packed": _words(codes), "weight_scale": scale.bfloat16(), "weight_shape": torch.tensor(weight.shape)}
    return parts if symmetric else parts | {"weight_zero_point": _words(zero.T).T.contiguous()}


def _words(codes: Tensor) -> Tensor:
    """[n, m], from 0 to 15 -> [n, m / 8] int32, from the low end of each."""
    apart = codes.long().reshape(len(codes), -1, 8)
    packed: Tensor = (apart << torch.arange(0, 32, 4)).sum(2).int()
    return packed
