"""What a rank's runner is made for, known before a weight is read. Imports what describes it, and torch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvcache.layout import BlockLayout, KVScales, LayerKinds, PoolSizes, divide
from kvcache.pool import KVPool
from scheduler.config.core import Resolved
from scheduler.state.window import Window
from workers.config import ResolvedWorker, WorkerConfig
from workers.model.config.architectures import RankShape
from workers.model.reading import DecoderConfig
from workers.parallel.communicator import Communicator
from workers.sampling.constraints import Constraints


def pool_sizes(memory: int, layouts: Sequence[BlockLayout], resolved: Resolved, rows: int) -> PoolSizes:
    """Blocks of each pool in so many bytes, no more than all rows at full length could fill. layouts: of each kind of layer.
    Errors: ValueError if not even one fits."""
    layout, block_size = layouts[0], layouts[0].block_size
    longest, narrow = layout.blocks_for(resolved.max_model_len), Window.of_narrow(resolved, block_size)
    if narrow is None:
        return PoolSizes(min(layout.blocks_in(memory), rows * longest))
    return divide(
        memory, layout.block_bytes, layouts[1].block_bytes, longest=longest, rows=rows,
        at_rest=narrow.at_rest(resolved.grant_ahead, block_size), at_once=narrow.most,
    )  # fmt: skip


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
    def kinds(self) -> LayerKinds | None:
        """Where narrow layers stand beside others that see all; None: the layers are of one kind."""
        if self.resolved.narrow is None:
            return None
        return LayerKinds(self.model.narrow(self.resolved.max_model_len)[0])

    @property
    def layouts(self) -> list[BlockLayout]:
        """Of the pool's blocks, and of those of narrow layers, where there are any."""
        kinds = self.kinds
        return [self.layout] if kinds is None else [self.layout.of_kind(kinds, narrow) for narrow in (False, True)]

    def sizes_in(self, memory: int) -> PoolSizes:
        """Blocks of each pool in so many bytes, no more than all rows at full length could fill. Errors: ValueError if not even
        one fits."""
        return pool_sizes(memory, self.layouts, self.resolved, self.config.max_num_seqs)

    def pools(self, sizes: PoolSizes, *, spare: int = 0) -> list[KVPool]:
        """As many as there are kinds of layers. spare: blocks more in each."""
        kinds, made = self.kinds, list[KVPool]()
        for narrow, (layout, blocks) in enumerate(zip(self.layouts, sizes, strict=False)):
            scales = self.kv_scales
            if scales is not None and kinds is not None:
                scales = scales.of(kinds.layers(bool(narrow)))
            made.append(KVPool(layout, blocks + spare, self.device, scales=scales))
        return made

    @property
    def device(self) -> torch.device:
        return torch.device(self.resolved.device)

    @property
    def shape(self) -> RankShape:
        return self.model.shard(self.comm.rank, self.comm.size)
