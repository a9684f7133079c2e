"""LoRA adapters of a benchmark's checkpoint, drawn from a seed: shapes are those of a real one, numbers are noise.

Imports what Manta reads adapters with, and torch.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from workers.model.config.architectures import ModelConfig, read_config
from workers.model.lora.files import CONFIG, TENSORS
from workers.model.lora.modules import STACKS, WRAPPED, has_experts, modules_of, shape_of


def ensure_adapters(checkpoint: Path, count: int, rank: int) -> dict[str, str]:
    """Folders of so many adapters of all linear layers and experts, by name; those that are missing are made beside the
    checkpoint."""
    model, folders = read_config(checkpoint), {}
    said = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": "all-linear",
            "target_parameters": list(STACKS)}  # fmt: skip
    for number in range(count):
        folder = checkpoint.parent / f"{checkpoint.name}-lora{number}-rank{rank}"
        if not (folder / CONFIG).is_file():  # written last
            folder.mkdir(exist_ok=True)
            save_file(_tensors(model, rank, torch.Generator().manual_seed(number)), folder / TENSORS)
            (folder / CONFIG).write_text(json.dumps(said))
        folders[f"lora{number}"] = str(folder)
    return folders


def _tensors(model: ModelConfig, rank: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Experts are adapted as stacks."""
    tensors, stacks = {}, dict(zip(WRAPPED, STACKS, strict=True))
    for layer in range(model.layers):
        for module, place in modules_of(model, has_experts(model, layer)).items():
            if place is not None and (place[1] is not None or not module.startswith(("self_attn.", "mlp."))):
                continue
            out, width = shape_of(f"experts.{stacks[module]}" if place is None else place[0], model)
            low = rank * (model.mixture.experts if place is None and model.mixture is not None else 1)
            name = f"base_model.model.model.layers.{layer}.{module}"
            for half, shape in (("A", (low, width)), ("B", (out, low))):
                numbers = torch.randn(shape, generator=generator) * 0.01
                tensors[f"{name}.lora_{half}.weight"] = numbers.to(torch.bfloat16)
    return tensors
