"""Settles what the user left open, for scheduler and workers. Reads the checkpoint's settings, and no weights.

Imports torch where the model is one of transformers' (`workers.model.reading`).
"""

import math

from workers.config import ResolvedWorker, WorkerConfig
from workers.model.config.architectures import ModelConfig
from workers.model.config.fields import CheckpointError
from workers.model.pooling import read_uses
from workers.model.reading import DecoderConfig, read_model
from workers.model.sources.find import find_checkpoint

MAX_MODEL_LEN_DEFAULT = 1 << 17
"""Cap on a model's own maximum length, so that block tables of long-context models stay small unless asked for."""

REPORTING = {"cpu": (1, math.inf), "cuda": (8, 0.004)}
"""Steps in a report at most, and seconds that one of them may be kept back. A GPU's steps are so short that a report of each
would cost front ends and scheduler more than the step; a text that comes 4 ms late is not noticed."""

DEPTH = {"cpu": 0, "cuda": 1}
"""Steps under way while the host plans the next: on a CPU the host is the device."""


def check_adapters(config: WorkerConfig, model: DecoderConfig) -> None:
    """Errors: CheckpointError where there is to be room for LoRA adapters, and the model can have none; ValueError where there
    is to be room beside experts, and there are no adapters."""
    if config.lora_slots and not isinstance(model, ModelConfig):
        raise CheckpointError("LoRA adapters need Manta's own layers, and the model's are transformers': serve it without them")
    if config.lora_experts and not config.lora_slots:
        raise ValueError("lora_experts is for LoRA adapters, and none are served: name some with lora, or give max_loras")


def resolve(config: WorkerConfig, device: str, threads: int = 1) -> ResolvedWorker:
    """Checks the request against the checkpoint and settles what it left open. device: "cpu" or "cuda". threads: of a rank,
    where nobody says.

    Errors: CheckpointError, ValueError: before anything is started.
    """
    folder = find_checkpoint(config)
    model = read_model(folder, config)
    longest = model_length(model, config.max_model_len)
    model.require(config.tensor_parallel_size, device)
    check_adapters(config, model)
    steps, hold_s = (config.report_steps, math.inf) if config.report_steps else REPORTING[device]
    steps = min(steps, config.block_size)
    return ResolvedWorker(
        max_model_len=longest,
        grant_ahead=2 * (steps + DEPTH[device]),
        window=model.window(longest),
        prefill_ahead=prefill_ahead(config, DEPTH[device]),
        narrow=model.narrow(longest)[1],
        device=device,
        threads=config.threads or threads,
        report_steps=steps,
        report_hold_s=hold_s,
        depth=DEPTH[device],
        score_tokens=read_uses(folder, model, config.pooling, config.score_tokens).score_tokens,
        host_ranks=config.ranks,
    )


def prefill_ahead(config: WorkerConfig, depth: int) -> int:
    """Tokens of a prompt for which there are blocks ahead: of the steps under way when a chunk is reported, of the one that is
    planned before the answer comes, and of the one after it."""
    return (depth + 2) * config.max_num_batched_tokens


def model_length(model: DecoderConfig, asked: int | None) -> int:
    """Tokens of a sequence, prompt and output together. Errors: CheckpointError if the model takes fewer than asked for."""
    if asked is None:
        return min(model.max_position, MAX_MODEL_LEN_DEFAULT)
    if asked > model.max_position:
        raise CheckpointError(f"max_model_len={asked} is above the {model.max_position} tokens that the model takes: lower it")
    return asked
