"""What a cluster is asked to be: one frozen record, valid from its birth, sent to every actor as it is.

It is made of the settings that scheduler and workers declare for themselves; each of them knows no more of it than its
part. Reads no file and no environment; `deploy.config.load` fills it.
"""

import os
from dataclasses import dataclass

from scheduler.config.core import CoreConfig
from scheduler.config.options import above_0, at_least, check, option
from scheduler.server.scaling import ScalingConfig
from workers.config import WorkerConfig


@dataclass(frozen=True, kw_only=True)
class EngineConfig(ScalingConfig, CoreConfig, WorkerConfig):
    """One cluster: `groups` groups of `tensor_parallel_size` ranks, each group a whole copy of one model.

    Errors: ValueError that names the field, the value given and what is legal.
    """

    local: bool = option(False, "Everything in this one process, without Ray; ranks are threads.")
    ray_address: str | None = option(None, "Ray cluster to join: an address or auto.", shown="a new one on this machine")
    max_group_restarts: int = option(
        5,
        "Starts of a group that dies, within restart_window_s, that follow soon; more are further and further apart.",
        at_least(0),
    )
    restart_window_s: float = option(
        600.0, "Seconds after which a start of a group that died is forgotten.", above_0("give it seconds to forget in")
    )
    node_timeout_s: float = option(
        1800.0, "Longest wait of an added group for its node and its start, in seconds.", above_0("give it seconds to start in")
    )
    adoption_timeout_s: float = option(
        60.0,
        "Seconds after which the scheduler and groups of an endpoint whose engine has died end, if no other takes them over.",
        at_least(1),
    )
    drain_timeout_s: float = option(120.0, "Seconds that a group may take to run empty; then the rest moves.", at_least(0))
    start_timeout_s: float = option(
        300.0, "Longest wait for the cluster to be ready, in seconds.", above_0("give it seconds to start in")
    )

    def __post_init__(self) -> None:
        check(self)
        if self.host_kv_memory and not self.enable_prefix_caching:
            raise ValueError(
                f"host_kv_memory={self.host_kv_memory} keeps blocks to be used again, and enable_prefix_caching is off: leave "
                "one of them out"
            )
        if self.report_steps is not None and self.report_steps > self.block_size:
            raise ValueError(
                f"report_steps={self.report_steps} is above block_size={self.block_size}: lower it or raise block_size"
            )
        if self.max_groups is not None and self.max_groups < self.groups:
            raise ValueError(f"max_groups={self.max_groups} is below groups={self.groups}: raise it or lower groups")
        if self.accelerator_type is not None and (self.local or self.device == "cpu"):
            other = "local takes the device of this process" if self.local else "device=cpu takes none"
            raise ValueError(f"accelerator_type={self.accelerator_type} is a kind of GPU, and {other}: leave one of them out")
        if self.lora and not self.lora_slots:
            raise ValueError(f"max_loras=0 holds no LoRA adapter, and lora names {len(self.lora)}: leave one of them out")
        if self.local and self.ray_address is not None:
            raise ValueError("local and ray_address exclude each other: leave one of them out")


def own_threads(config: EngineConfig) -> int:
    """CPU threads of a rank where the whole machine is ours: the cores, shared out."""
    return config.threads or max(1, (os.cpu_count() or 1) // config.ranks)
