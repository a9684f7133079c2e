"""LoRA adapters in PEFT's format, written by hand, and checkpoints into which they have been merged, for a reference.

No code of Manta's and none of PEFT's is used: W + scaling * B @ A, tensor by tensor.
"""

import json
import math
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make_adapter(
    path: Path, checkpoint: Path, *, rank: int = 4, alpha: float = 8.0, seed: int = 1, targets: Iterable[str] = ALL,
    ranks: dict[str, int] | None = None, dtype: torch.dtype = torch.float32, **fields: Any,
) -> Path:  # fmt: skip
    """Writes an adapter of the checkpoint, strong enough to change its tokens. ranks: of projections that have another. fields:
    of adapter_config.json."""
    path.mkdir(parents=True, exist_ok=True)
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, weight in _weights(checkpoint).items():
        if (target := name.split(".")[-2]) in targets:
            own = (ranks or {}).get(target, rank)
            a = torch.randn(own, weight.shape[1], generator=generator) * weight.shape[1] ** -0.5
            b = torch.randn(weight.shape[0], own, generator=generator) * own**-0.5
            module = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = a.to(dtype), b.to(dtype)
    save_file(tensors, path / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha, "target_modules": list(targets),
        "bias": "none", "lora_dropout": 0.05, "inference_mode": True, "base_model_name_or_path": str(checkpoint),
        "rank_pattern": ranks or {}, "modules_to_save": None, "use_dora": False, "init_lora_weights": True,
    }  # fmt: skip
    (path / "adapter_config.json").write_text(json.dumps(config | fields))
    return path


def merge(path: Path, checkpoint: Path, adapter: Path, alphas: dict[str, float] | None = None) -> Path:
    """A checkpoint at `path` with the adapter in its weights. alphas: of projections that have another."""
    shutil.copytree(checkpoint, path)
    config = json.loads((adapter / "adapter_config.json").read_text())
    low, weights = load_file(adapter / "adapter_model.safetensors"), load_file(checkpoint / "model.safetensors")
    for name in [name for name in low if ".lora_A." in name]:
        a, b = low[name].double(), low[name.replace("lora_A", "lora_B")].double()
        alpha = (alphas or {}).get(name.split(".")[-3], config["lora_alpha"])
        scaling = alpha / (math.sqrt(len(a)) if config.get("use_rslora") else len(a))
        base = name.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
        weights[base] = (weights[base].double() + scaling * b @ a).to(weights[base].dtype)
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    return path


def _weights(checkpoint: Path) -> dict[str, Tensor]:
    return {name: weight for name, weight in load_file(checkpoint / "model.safetensors").items() if "_proj.weight" in name}
