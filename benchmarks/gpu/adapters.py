"""LoRA adapters of a benchmark's checkpoint, drawn from a seed: shapes are those of a real one, numbers are noise.

Imports what Manta reads adapters with, and torch.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from workers.model.config.architectures import ModelConfig, read_config
from workers.model.lora.files import CONFIG, PROJECTIONS, TENSORS, shape_of


def ensure_adapters(checkpoint: Path, count: int, rank: int) -> dict[str, str]:
    """Folders of so many adapters of all linear layers, by name; those that are missing are made beside the checkpoint."""
    model, folders = read_config(checkpoint), {}
    for number in range(count):
        folder = checkpoint.parent / f"{checkpoint.name}-lora{number}-rank{rank}"
        if not (folder / CONFIG).is_file():  # written last
            folder.mkdir(exist_ok=True)
            save_file(_tensors(model, rank, torch.Generator().manual_seed(number)), folder / TENSORS)
            (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": rank}))
        folders[f"lora{number}"] = str(folder)
    return folders


def _tensors(model: ModelConfig, rank: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    tensors = {}
    for layer in range(model.layers):
        for projection, part in PROJECTIONS.items():
            out, width = shape_of(projection, model)
            name = f"base_model.model.model.layers.{layer}.{part}.{projection}"
            for half, shape in (("A", (rank, width)), ("B", (out, rank))):
                numbers = torch.randn(shape, generator=generator) * 0.01
                tensors[f"{name}.lora_{half}.weight"] = numbers.to(torch.bfloat16)
    return tensors
