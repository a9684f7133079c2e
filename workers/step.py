"""What one step computes: the ragged batch as tensors. Built by `cpu.inputs`, read by model, attention and sampler.

Imports torch, and what is said of adapters.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from workers.kernels.lora.weights import StepAdapters


@dataclass(frozen=True, slots=True)
class StepInput:
    """One step's batch: `seqs` sequences, decodes (query length 1) first, then prefill chunks, concatenated without padding.

    A sequence's new tokens are the last `query_len` of its `context_len` tokens; their KV is written before anything attends.
    Device tensors are what kernels read; the host arrays are the same numbers for launch geometry and for the CPU backend.
    """

    tokens: Tensor  # [tokens] int64, ids to embed
    positions: Tensor  # [tokens] int64, 0-based position in the sequence
    slots: Tensor  # [tokens] int64, where the token's KV goes: block id * block_size + offset in the block
    query_starts: Tensor  # [seqs + 1] int32, prefix sums of the query lengths
    context_lens: Tensor  # [seqs] int32, tokens in the cache once this step's are written
    block_tables: Tensor  # [seqs, max_blocks] int32, block ids; entries past a sequence's blocks are 0 and never read
    sample_at: Tensor  # [wanted] int64, indices into `tokens` that are wanted: to sample from, then to measure, then to pool
    decodes: int  # the first so many sequences have query length 1
    host_query_lens: npt.NDArray[np.int32]  # [seqs]
    host_context_lens: npt.NDArray[np.int32]  # [seqs]
    host_block_tables: npt.NDArray[np.int32]  # [seqs, max_blocks]
    adapters: StepAdapters | None = None  # of the tokens; None: no sequence of the step has one
    narrow: "StepInput | None" = None  # the same with slots and block tables of narrow layers, where these have their own

    def of(self, narrow: bool) -> "StepInput":
        """As the layers of a kind have it."""
        if not narrow:
            return self
        assert self.narrow is not None, "the model has no narrow layers"
        return self.narrow
