"""What each worker is told: its settings, and where its scheduler listens. Imports nothing, so that whoever places workers
needs no torch."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SchedulerAddress:
    """Where the scheduler listens, and the secret to open with."""

    host: str
    port: int
    token: str


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """What every rank of a cluster is told. dtype: "auto" or a name in `architectures.DTYPES`. kv_memory: bytes of each
    rank, or None.

    host_kv_memory: bytes of host memory in which each rank keeps pages beside its pool; 0: none. transfers: whether its groups
    exchange pages. ranks_on_host: over how many ranks a CPU host's memory is divided. device: "cpu" or "cuda". log_format:
    "text" or "json".
    """

    model: str
    device: str
    dtype: str
    page_size: int
    kv_memory: int | None
    gpu_memory_fraction: float
    max_model_len: int
    rows: int
    step_tokens: int
    report_steps: int
    attention: str
    threads: int
    ranks_on_host: int
    log_format: str = "text"
    host_kv_memory: int = 0
    transfers: bool = False

    @property
    def depth(self) -> int:
        """Steps under way while the host plans the next: on a CPU the host is the device."""
        return 1 if self.device == "cuda" else 0
