"""From what the user asked to what each worker and the scheduler are told. Reads the checkpoint's config.json, nothing else.

Imports torch through `workers.model.architectures`.
"""

from pathlib import Path

from cluster.config import EngineConfig
from scheduler.config import CoreConfig
from workers.config import WorkerConfig
from workers.model.architectures import CheckpointError, ModelConfig, read_config

MAX_MODEL_LEN_DEFAULT = 1 << 17
"""Cap on a model's own maximum length, so that block tables of long-context models stay small unless asked for."""


def resolve(config: EngineConfig, device: str, ranks_on_host: int, threads: int) -> tuple[CoreConfig, WorkerConfig]:
    """Checks the request against the checkpoint and fills in the defaults. device: "cpu" or "cuda".

    Errors: CheckpointError, ValueError: before anything is started.
    """
    model = read_config(Path(config.model))
    model.shard(0, config.tensor_parallel_size)
    length = _model_len(config, model)
    worker = WorkerConfig(
        model=config.model,
        device=device,
        dtype=config.dtype,
        page_size=config.block_size,
        kv_memory=config.kv_memory,
        gpu_memory_fraction=config.gpu_memory_fraction,
        max_model_len=length,
        rows=config.max_num_seqs,
        step_tokens=config.max_num_batched_tokens,
        report_steps=config.report_steps,
        attention=config.attention,
        threads=config.threads or threads,
        ranks_on_host=ranks_on_host,
        host_kv_memory=config.host_kv_memory,
        transfers=_exchange_pages(config),
    )
    core = CoreConfig(
        page_size=config.block_size,
        max_model_len=length,
        grant_ahead=2 * (config.report_steps + worker.depth),
        hash_stride=config.hash_stride,
        prefix_caching=config.enable_prefix_caching,
        prefix_fetch=worker.transfers,
        seed=config.seed,
        skip_s=config.queue_skip_s,
        age_s=config.queue_age_s,
        log_decisions=config.log_decisions,
    )
    return core, worker


def _exchange_pages(config: EngineConfig) -> bool:
    """Whether ranks open a port for others: not where there is, and will be, only one group."""
    return config.prefix_fetch and config.enable_prefix_caching and max(config.groups, config.max_groups or 0) > 1


def _model_len(config: EngineConfig, model: ModelConfig) -> int:
    if config.max_model_len is None:
        return min(model.max_position, MAX_MODEL_LEN_DEFAULT)
    if config.max_model_len > model.max_position:
        raise CheckpointError(
            f"max_model_len={config.max_model_len} is above the {model.max_position} positions of the model: lower it"
        )
    return config.max_model_len
