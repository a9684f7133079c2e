"""What each worker is told: its settings, and where its scheduler listens. Imports what gathers reports, but no torch: whoever
places workers needs none."""

import math
from dataclasses import dataclass

from workers.loop.reports import Reporter


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

    host_kv_memory: bytes of host memory in which each rank keeps blocks beside its pool; 0: none. transfers: whether its groups
    exchange blocks. ranks_on_host: over how many ranks a CPU host's memory is divided. device: "cpu" or "cuda". cuda_graphs:
    whether a GPU's decode steps are captured. report_steps, report_hold_s: as in `Reporter`. log_format: "text" or "json".
    """

    model: str
    device: str
    dtype: str
    block_size: int
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
    cuda_graphs: bool = True
    report_hold_s: float = math.inf

    def reporter(self, epoch: int) -> Reporter:
        """What gathers the steps of one epoch into reports."""
        return Reporter(epoch, self.report_steps, hold_s=self.report_hold_s)

    @property
    def depth(self) -> int:
        """Steps under way while the host plans the next: on a CPU the host is the device."""
        return 1 if self.device == "cuda" else 0
