"""Device memory of one host's GPUs that every rank of a group reads and writes: what `kernels.reduce` sums through.

torch's symmetric memory maps it (NVLink or PCIe between two GPUs that reach each other); its own collectives are not used, and
NVLink multicast, which other users of a host suffer from, stays off. Not every host has it: `open_peers` says why not.
Imports torch and `kernels.reduce`.
"""

import os
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store, _SymmetricMemory

from workers.kernels.rows.reduce import Peers, sum_rows, takes

ROWS, ROW_BYTES = 128, 32 << 10
"""Room for decodes of so many sequences, of hidden sizes up to 16,384 in 16 bits. Larger sums are NCCL's: they are bound by the
links, not by launches and meetings."""

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

    def all_reduce(self, tensor: Tensor) -> bool:
        """Sums it in place, on the current stream, and says so; False where it has no room here."""
        rows = tensor.view(-1, tensor.shape[-1]) if tensor.dim() and tensor.is_contiguous() else tensor
        if not tensor.is_floating_point() or not takes(self.peers, rows):
            return False
        sum_rows(self.peers, rows)
        return True

    def give_up(self) -> None:
        """Nobody is waited for any more, by kernels that run either. Callable from any thread."""
        self._given_up.fill_(1)
