"""Which of the two makers of decoders a checkpoint is for, and what is known of it before its weights are read.

    native         one class for some architectures, with fused kernels (`config.architectures`, `decoders.native`, `gpu.fused`)
    transformers   transformers' own class of the architecture, with our attention (`transformers`, `decoders.transformers`)

Imports no torch for a native one.
"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from workers.config import USUAL, ReadingConfig
from workers.model.config.architectures import ARCHITECTURES, ModelConfig, read_config
from workers.model.config.fields import CheckpointError, read_json
from workers.model.config.quantization import chosen

if TYPE_CHECKING:
    from workers.model.transformers.config import TransformersConfig


ADAPTER_CONFIG = "adapter_config.json"

DecoderConfig: TypeAlias = "ModelConfig | TransformersConfig"


def read_model(path: str | Path, how: ReadingConfig = USUAL) -> DecoderConfig:
    """Errors: CheckpointError for what is not served, by name and reason."""
    folder, implementation = Path(path), how.model_implementation
    if implementation == "native" or (implementation == "auto" and is_native(folder)):
        return _native(folder, how)
    if how.enable_expert_parallel:
        raise CheckpointError(f"enable_expert_parallel: {folder} is served by transformers' class, which shares out parts of "
                              f"experts alone: leave it out")  # fmt: skip
    from workers.model.transformers.config import read_transformers  # brings transformers and torch

    found = read_transformers(folder)
    scheme = chosen(found.scheme, how.quantization)
    if scheme is not None and scheme.made:
        raise CheckpointError(
            f"{found.architecture} is run by transformers' own class, for which no FP8 is made: leave quantization at auto"
        )
    return found


def _native(folder: Path, how: ReadingConfig) -> ModelConfig:
    config = read_config(folder)
    config = replace(config, scheme=chosen(config.scheme, how.quantization))
    if not how.enable_expert_parallel:
        return config
    if config.mixture is None:
        raise CheckpointError(f"enable_expert_parallel: {config.architecture} has no experts: leave it out")
    return replace(config, mixture=replace(config.mixture, parallel=True))


def is_native(folder: Path) -> bool:
    """Whether config.json names an architecture of ours. Errors: CheckpointError."""
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is not a folder: give the path of a checkpoint folder in Hugging Face format, an id (org/name) or a URL"
        )
    if (folder / ADAPTER_CONFIG).exists() and not (folder / "config.json").exists():
        raise CheckpointError(f"{folder} is a LoRA adapter: give the folder of its model, and this one as lora (NAME=FOLDER)")
    names = read_json(folder / "config.json").get("architectures")
    return isinstance(names, list) and any(name in ARCHITECTURES for name in names)
