"""From what the user asked to what each worker and the scheduler are told. Reads the checkpoint's config.json, nothing else.

Imports torch through `workers.model.architectures`.
"""

import math
from pathlib import Path

from cluster.config import EngineConfig
from scheduler.config import CoreConfig
from workers.config import WorkerConfig
from workers.model.architectures import CheckpointError, ModelConfig, read_config

MAX_MODEL_LEN_DEFAULT = 1 << 17
"""Cap on a model's own maximum length, so that block tables of long-context models stay small unless asked for."""

REPORTING = {"cpu": (1, math.inf), "cuda": (8, 0.004)}
"""Steps in a report at most, and seconds that one of them may be kept back. A GPU's steps are so short that a report of each
would cost front ends and scheduler more than the step; a text that comes 4 ms late is not noticed."""


def resolve(config: EngineConfig, device: str, ranks_on_host: int, threads: int) -> tuple[CoreConfig, WorkerConfig]:
    """Checks the request against the checkpoint and fills in the defaults. device: "cpu" or "cuda".

    Errors: CheckpointError, ValueError: before anything is started.
    """
    model = read_config(Path(config.model))
    model.shard(0, config.tensor_parallel_size)
    length = model_length(model, config.max_model_len)
    steps, hold_s = (config.report_steps, math.inf) if config.report_steps else REPORTING[device]
    worker = WorkerConfig(
        model=config.model,
        device=device,
        dtype=config.dtype,
        block_size=config.block_size,
        kv_memory=config.kv_memory,
        gpu_memory_fraction=config.gpu_memory_fraction,
        max_model_len=length,
        rows=config.max_num_seqs,
        step_tokens=config.max_num_batched_tokens,
        report_steps=min(steps, config.block_size),
        report_hold_s=hold_s,
        cuda_graphs=config.cuda_graphs,
        attention=config.attention,
        threads=config.threads or threads,
        ranks_on_host=ranks_on_host,
        host_kv_memory=config.host_kv_memory,
        transfers=_exchange_blocks(config),
    )
    core = CoreConfig(
        block_size=config.block_size,
        max_model_len=length,
        grant_ahead=2 * (worker.report_steps + worker.depth),
        hash_stride=config.hash_stride,
        prefix_caching=config.enable_prefix_caching,
        prefix_fetch=worker.transfers,
        seed=config.seed,
        skip_s=config.queue_skip_s,
        age_s=config.queue_age_s,
        log_decisions=config.log_decisions,
    )
    return core, worker


def _exchange_blocks(config: EngineConfig) -> bool:
    """Whether ranks open a port for others: not where there is, and will be, only one group."""
    return config.prefix_fetch and config.enable_prefix_caching and max(config.groups, config.max_groups or 0) > 1


def model_length(model: ModelConfig, asked: int | None) -> int:
    """Tokens of a sequence, prompt and output together. Errors: CheckpointError if the model takes fewer than asked for."""
    if asked is None:
        return min(model.max_position, MAX_MODEL_LEN_DEFAULT)
    if asked > model.max_position:
        raise CheckpointError(f"max_model_len={asked} is above the {model.max_position} tokens that the model takes: lower it")
    return asked
