"""What a cluster is asked to be: one frozen record, valid from its birth, sent to every actor as it is.

Imports nothing of Manta and reads no file and no environment; `deploy.config.load` fills it. Each field carries the sentence
that the command line shows for it, so an option is named, typed, defaulted and described in this one place.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

DTYPES = ("auto", "bfloat16", "float16", "float32", "float64")
DEVICES = ("auto", "cpu", "cuda")
ATTENTION_BACKENDS = ("auto", "flash", "triton", "cpu")
MIN_BLOCK_SIZE = 16
MAX_ROWS = 1 << 16
"""A lease id keeps 16 bits for the row (`scheduler.protocol.messages.ROW_BITS`)."""

T = TypeVar("T")


def option(default: T, help: str, *, shown: str = "", size: bool = False) -> T:
    """A field with its help. shown: the default in words, where the value says too little. size: bytes, "4GiB" also
    read."""
    metadata: dict[str, Any] = {"help": help, "shown": shown or str(default), "size": size}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """One cluster: `groups` groups of `tensor_parallel_size` ranks, each group a whole copy of one model.

    Errors: ValueError that names the field, the value given and what is legal.
    """

    model: str
    tensor_parallel_size: int = option(1, "Ranks (GPUs or CPU workers) in each group; must divide the attention heads.")
    groups: int = option(1, "Tensor-parallel groups, each with a whole copy of the model.")
    device: str = option("auto", f"Where ranks compute: {', '.join(DEVICES)}. auto: on GPUs where the cluster has any.")
    dtype: str = option(
        "auto",
        f"Type of weights and KV: {', '.join(DTYPES)}. auto: the checkpoint's, or float32 on a CPU without arithmetic for it.",
    )
    block_size: int = option(256, "Tokens in a KV block: a power of two from 16 up.")
    kv_memory: int | None = option(
        None, 'KV cache of each rank, in bytes or as "4GiB".', shown="measured from free memory", size=True
    )
    host_kv_memory: int = option(
        0, 'Host memory of each rank for blocks that leave its KV cache, in bytes or as "4GiB".', shown="none", size=True
    )
    gpu_memory_fraction: float = option(
        0.9, "Share of a GPU's memory that weights, activations and KV may fill, 0 to 1."
    )
    max_model_len: int | None = option(None, "Longest prompt plus output, in tokens.", shown="the model's own")
    max_num_seqs: int = option(256, "Sequences that one group runs at once.")
    max_num_batched_tokens: int = option(2048, "Tokens that one step of a group computes; longer prompts go in chunks.")
    enable_prefix_caching: bool = option(True, "Reuse the KV of prompts that begin alike.")
    hash_stride: int = option(
        32, "Tokens in common from which a part of a block is reused; 0: whole blocks only. Half a block at most is taken."
    )
    prefix_fetch: bool = option(
        True,
        "Fetch the KV of a prefix from another group where that is faster than computing it.",
        shown="yes, where there are at least two groups",
    )
    attention: str = option("auto", f"Attention kernels: {', '.join(ATTENTION_BACKENDS)}.")
    seed: int | None = option(
        None, "Draws the seeds of requests that bring none: an integer.", shown="drawn anew each time"
    )
    threads: int | None = option(
        None, "CPU threads of each rank.", shown="all cores for a single local rank, otherwise 1"
    )
    report_steps: int | None = option(
        None,
        "Steps that one report of a group to the scheduler covers.",
        shown="1 on CPUs; on GPUs those of 4 ms, up to 8",
    )
    cuda_graphs: bool = option(True, "Capture decode steps on a GPU as CUDA graphs; off: launch by launch, for debugging.")
    queue_skip_s: float = option(2.0, "Seconds that others may start before the first in the queue while it finds no room.")
    queue_age_s: float = option(30.0, "Wait, in seconds, after which a request goes before priorities and fairness.")
    local: bool = option(False, "Everything in this one process, without Ray; ranks are threads.")
    ray_address: str | None = option(
        None, "Ray cluster to join: an address or auto.", shown="a new one on this machine"
    )
    max_group_restarts: int = option(2, "Times a group whose worker died is started again.")
    max_groups: int | None = option(None, "Groups at most; load adds them, idleness removes them.", shown="as many as groups")
    scale_wait_s: float = option(2.0, "Wait of a newcomer, in seconds, beyond which another group is asked for.")
    scale_idle_s: float = option(300.0, "Seconds without work after which a group beyond `groups` goes.")
    scale_cooldown_s: float = option(60.0, "Seconds between two changes of the number of groups.")
    scale_dry_run: bool = option(False, "Log what the autoscaler would do, and why, without doing it.")
    node_timeout_s: float = option(1800.0, "Longest wait of an added group for its node and its start, in seconds.")
    drain_timeout_s: float = option(120.0, "Seconds that a group may take to run empty; then the rest moves.")
    start_timeout_s: float = option(300.0, "Longest wait for the cluster to be ready, in seconds.")
    log_decisions: bool = option(False, "Log why each sequence goes where it does: a line each, from the scheduler.")
    check_invariants: bool = option(False, "Check the scheduler's whole state after every event (slow; for debugging).")

    def __post_init__(self) -> None:
        self._check_choices()
        for name in ("tensor_parallel_size", "groups", "max_num_batched_tokens"):
            self._at_least(name, 1)
        self._at_least("max_group_restarts", 0)
        self._check_cache()
        self._at_least("max_num_seqs", 1)
        if self.max_num_seqs > MAX_ROWS:
            raise ValueError(f"max_num_seqs={self.max_num_seqs} is above {MAX_ROWS}: lower it")
        if self.block_size < MIN_BLOCK_SIZE or self.block_size & (self.block_size - 1):
            raise ValueError(f"block_size={self.block_size} is not a power of two from {MIN_BLOCK_SIZE} up: try 256")
        if self.report_steps is not None and self.report_steps > self.block_size:
            raise ValueError(
                f"report_steps={self.report_steps} is above block_size={self.block_size}: lower it or raise block_size"
            )
        if not 0.0 < self.gpu_memory_fraction <= 1.0:
            raise ValueError(f"gpu_memory_fraction={self.gpu_memory_fraction} is outside (0, 1]: try 0.9")
        for name in ("start_timeout_s", "node_timeout_s"):
            if not getattr(self, name) > 0.0:
                raise ValueError(f"{name}={getattr(self, name)} is not above 0: give it seconds to start in")
        for name in ("queue_skip_s", "queue_age_s", "scale_wait_s", "scale_idle_s", "scale_cooldown_s", "drain_timeout_s"):
            self._at_least(name, 0)
        if self.max_groups is not None and self.max_groups < self.groups:
            raise ValueError(f"max_groups={self.max_groups} is below groups={self.groups}: raise it or lower groups")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed} (--engine-seed) is outside [0, 2^63): choose a value inside")
        for name in ("kv_memory", "max_model_len", "threads", "report_steps"):
            if getattr(self, name) is not None:
                self._at_least(name, 1)
        if self.local and self.ray_address is not None:
            raise ValueError("local and ray_address exclude each other: leave one of them out")

    def _check_choices(self) -> None:
        choices: Iterable[tuple[str, str, tuple[str, ...]]] = (
            ("device", self.device, DEVICES),
            ("dtype", self.dtype, DTYPES),
            ("attention", self.attention, ATTENTION_BACKENDS),
        )
        for name, value, legal in choices:
            if value not in legal:
                raise ValueError(f"{name}={value!r} is unknown: choose one of {', '.join(legal)}")

    def _check_cache(self) -> None:
        self._at_least("host_kv_memory", 0)
        self._at_least("hash_stride", 0)
        if self.host_kv_memory and not self.enable_prefix_caching:
            raise ValueError(
                f"host_kv_memory={self.host_kv_memory} keeps blocks to be used again, and enable_prefix_caching is off: leave "
                "one of them out"
            )

    def _at_least(self, name: str, low: int) -> None:
        value = getattr(self, name)
        if value < low:
            raise ValueError(f"{name}={value} is below {low}: raise it")


def own_threads(config: EngineConfig) -> int:
    """CPU threads of a rank where the whole machine is ours: the cores, shared out."""
    ranks = config.groups * config.tensor_parallel_size
    return config.threads or max(1, (os.cpu_count() or 1) // ranks)
