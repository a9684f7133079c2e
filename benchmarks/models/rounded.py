"""Writes a checkpoint whose linear layers have 4-bit weights, rounded to the nearest: the format is compressed-tensors'.

No data is looked at, as GPTQ and AWQ do, so it is the least that four bits give. Imports torch and safetensors.
"""

import json
import re
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

INDEX = "model.safetensors.index.json"
LINEAR = re.compile(r"layers\.\d+\..*_proj\.weight$")
LEVELS = 15
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def write_four_bits(source: Path, target: Path, group: int, symmetric: bool) -> None:
    """source: a checkpoint in 16 or 32 bits. target: no folder yet. group: columns that share a scale."""
    draft = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
    weight_map: dict[str, str] = {}
    for path in sorted(source.iterdir()):
        if path.suffix == ".safetensors":
            stored = _four_bits(load_file(path), group, symmetric)
            save_file(stored, draft / path.name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(stored, path.name)
        elif path.name != INDEX:
            shutil.copy(path, draft)
    if (source / INDEX).exists():
        (draft / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = json.loads((draft / "config.json").read_text())
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": group, "symmetric": symmetric}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "ignore": ["lm_head"], "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }  # fmt: skip
    (draft / "config.json").write_text(json.dumps(config))
    draft.chmod(0o755)
    draft.rename(target)


def ensure_four_bits(checkpoint: Path) -> Path:
    """The same beside it, in groups of 128 with zero points; made unless it is there. Widths must be multiples of that."""
    folder = checkpoint.with_name(f"{checkpoint.name}-int4")
    if not folder.is_dir():
        write_four_bits(checkpoint, folder, 128, symmetric=False)
    return folder


def _four_bits(tensors: dict[str, Tensor], group: int, symmetric: bool) -> dict[str, Tensor]:
    stored: dict[str, Tensor] = {}
    for name, weight in tensors.items():
        if LINEAR.search(name):
            module, parts = name.removesuffix(".weight"), _parts(weight.to(DEVICE).float(), group, symmetric)
            stored |= {f"{module}.{part}": tensor.cpu() for part, tensor in parts.items()}
        else:
            stored[name] = weight
    return stored


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
    packed: Tensor = (apart << torch.arange(0, 32, 4, device=codes.device)).sum(2).int()
    return packed
