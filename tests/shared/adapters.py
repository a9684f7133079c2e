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
OF_EXPERTS = (*ALL, "w1", "w2", "w3", "gate", "router", "shared_expert_gate")
"""Of whatever family, its experts one by one."""


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
    return _save(path, checkpoint, tensors, {"r": rank, "lora_alpha": alpha, "target_modules": list(targets),
                                             "rank_pattern": ranks or {}, "lora_dropout": 0.05} | fields)  # fmt: skip


def make_stacked(
    path: Path, checkpoint: Path, *, rank: int = 4, alpha: float = 8.0, seed: int = 1, turned: bool = False, **fields: Any
) -> Path:  # fmt: skip
    """Of all experts as stacks. turned: A has the outputs, B the inputs."""
    path.mkdir(parents=True, exist_ok=True)
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for layer, experts in _experts(load_file(checkpoint / "model.safetensors")).items():
        for number, module in enumerate(("mlp.experts.base_layer", "mlp.experts")):
            out, width = experts[0][number].shape[:: -1 if turned else 1]
            low = rank * len(experts)
            name = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(low, width, generator=generator) * width**-0.5
            tensors[f"{name}.lora_B.weight"] = torch.randn(out, low, generator=generator) * rank**-0.5
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    fields = {"r": rank, "lora_alpha": alpha, "target_modules": [], "target_parameters": targets, "lora_dropout": 0.0} | fields
    return _save(path, checkpoint, tensors, fields)


def _save(path: Path, checkpoint: Path, tensors: dict[str, Tensor], fields: dict[str, Any]) -> Path:
    save_file(tensors, path / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "inference_mode": True,
        "base_model_name_or_path": str(checkpoint), "modules_to_save": None, "use_dora": False, "init_lora_weights": True,
    }  # fmt: skip
    (path / "adapter_config.json").write_text(json.dumps(config | fields))
    return path


def merge(path: Path, checkpoint: Path, adapter: Path, alphas: dict[str, float] | None = None) -> Path:
    """A checkpoint at `path` with the adapter in its weights. alphas: of projections that have another."""
    shutil.copytree(checkpoint, path)
    config = json.loads((adapter / "adapter_config.json").read_text())
    low, weights = load_file(adapter / "adapter_model.safetensors"), load_file(checkpoint / "model.safetensors")
    experts = _experts(weights)
    for name in [name for name in low if ".lora_A." in name]:
        if ".experts.lora_A" in name or ".experts.base_layer.lora_A" in name:
            _merge_stack(low[name], low[name.replace("lora_A", "lora_B")], experts[name.split(".")[4]], config, ".base" in name)
            continue
        a, b = low[name].double(), low[name.replace("lora_A", "lora_B")].double()
        alpha = (alphas or {}).get(name.split(".")[-3], config["lora_alpha"])
        scaling = alpha / (math.sqrt(len(a)) if config.get("use_rslora") else len(a))
        base = name.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
        weights[base] = (weights[base].double() + scaling * b @ a).to(weights[base].dtype)
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    return path


def _merge_stack(a: Tensor, b: Tensor, experts: list[list[Tensor]], config: dict[str, Any], up: bool) -> None:
    """A of one expert stands behind that of the other, in B each rank's columns of all experts stand together."""
    rank, count = config["r"], len(experts)
    for number, (gate_up, down) in enumerate(experts):
        weight = gate_up if up else down
        first, second = a[number * rank : (number + 1) * rank].double(), b[:, number::count].double()
        delta = config["lora_alpha"] / rank * second @ first
        weight += (delta if delta.shape == weight.shape else delta.T).to(weight.dtype)


def _experts(weights: dict[str, Tensor]) -> dict[str, list[list[Tensor]]]:
    """By layer and expert, gate_up and down, [out, in], in the memory of `weights`, which gates and ups are made to share."""
    found: dict[str, list[list[Tensor]]] = {}
    for name in sorted(name for name in weights if ".experts." in name):  # fewer than ten a layer
        layer, projection = name.split(".")[2], name.removesuffix(".weight").split(".")[-1]
        if projection == "gate_up_proj":
            downs = weights[name.replace("gate_up", "down")]
            found[layer] = [[each.T, other.T] for each, other in zip(weights[name], downs, strict=True)]
        elif projection in _BESIDE:
            up, down = (name.replace(projection, other) for other in _BESIDE[projection])
            both = torch.cat([weights[name], weights[up]])
            weights[name], weights[up] = both.chunk(2)
            found.setdefault(layer, []).append([both, weights[down]])
    return found


_BESIDE = {"gate_proj": ("up_proj", "down_proj"), "w1": ("w3", "w2")}


def _weights(checkpoint: Path) -> dict[str, Tensor]:
    return {name: weight for name, weight in load_file(checkpoint / "model.safetensors").items() if weight.dim() == 2}
