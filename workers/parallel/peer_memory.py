"""Device memory of one host's GPUs that every rank of a group reads and writes: what `kernels.rows` sums and gathers through.

torch's symmetric memory maps it (NVLink or PCIe between two GPUs that reach each other); its own collectives are not used, and
NVLink multicast, which other users of a host suffer from, stays off. Not every host has it: `open_peers` says why not.
Imports torch and those kernels.
"""

import os
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store, _SymmetricMemory

from workers.kernels.rows.gather import gather
from workers.kernels.rows.peers import Peers
from workers.kernels.rows.reduce import sum_all

ROWS, ROW_BYTES = 128, 32 << 10
"""Room for decodes of so many sequences, of hidden sizes up to 16,384 in 16 bits."""

MOST_BYTES = 4 * ROWS * ROW_BYTES
"""Of a rank's part. What is larger is NCCL's, where there is NCCL: it is bound by the links, not by launches and meetings."""

GROUP = "manta-peers"
SETTINGS = {
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1",  # each rank sees its own GPU alone, under the number 0
}


class PeerMemory:
    """A rank's part, mapped by all, and theirs. Every rank makes one, at the same time. Errors: RuntimeError where a GPU does
    not reach another's memory."""

    def __init__(self, rank: int, size: int, store: Store, device: torch.device) -> None:
        os.environ.update(SETTINGS)
        self._given_up = torch.zeros(1, dtype=torch.int32, pin_memory=True)
        half = 2 * ROWS * ROW_BYTES
        _SymmetricMemory.set_group_info(GROUP, rank, size, PrefixStore(GROUP, store))
        total = 2 * half + ROWS * 2 * size * 4
        self._memory: Tensor = _SymmetricMemory.empty_strided_p2p((total,), (1,), torch.uint8, device, GROUP)
        self._memory.zero_()
        torch.cuda.synchronize(device)  # before anybody else may write to it
        self._mapped: Any = _SymmetricMemory.rendezvous(self._memory, GROUP)

        def addresses(offset: int) -> Tensor:
            return torch.tensor([base + offset for base in self._mapped.buffer_ptrs], dtype=torch.int64, device=device)

        self.peers = Peers(
            rank, size, ROWS, ROW_BYTES, addresses(0), addresses(half), addresses(2 * half),
            torch.zeros(ROWS, dtype=torch.int32, device=device), self._given_up.data_ptr(),
        )  # fmt: skip

    def pays(self, tensor: Tensor) -> bool:
        """Whether this is faster than NCCL."""
        return tensor.nbytes <= MOST_BYTES

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Of floating point and contiguous: summed in place, on the current stream."""
        sum_all(self.peers, tensor)
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        """[...] on each rank -> [size, ...] on every rank, on the current stream."""
        return gather(self.peers, tensor.contiguous())

    def give_up(self) -> None:
        """Nobody is waited for any more, by kernels that run either. Callable from any thread."""
        self._given_up.fill_(1)
