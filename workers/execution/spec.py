"""What a rank's runner is made for, known before a weight is read. Imports what describes it, and torch."""

from dataclasses import dataclass

import torch

from kvcache.layout import BlockLayout, KVScales
from workers.config import ResolvedWorker, WorkerConfig
from workers.model.config.architectures import RankShape
from workers.model.reading import DecoderConfig
from workers.parallel.communicator import Communicator
from workers.sampling.constraints import Constraints


@dataclass(frozen=True, slots=True)
class RunnerSpec:
    """One rank's. dtype: of weights and activations. kv_scales: as in `KVPool`. constraints: closed by who made them."""

    config: WorkerConfig
    resolved: ResolvedWorker
    model: DecoderConfig
    layout: BlockLayout
    comm: Communicator
    dtype: torch.dtype
    constraints: Constraints
    kv_scales: KVScales | None = None

    @property
    def device(self) -> torch.device:
        return torch.device(self.resolved.device)

    @property
    def shape(self) -> RankShape:
        return self.model.shard(self.comm.rank, self.comm.size)
