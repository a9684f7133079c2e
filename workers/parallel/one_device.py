"""Ranks that share a GPU, which NCCL does not connect: sums and gathers of any size by kernels over their joined memory.

For tests and development, of whatever several GPUs run with one at hand: each rank waits in its kernels for the others, which
have the device when their turn comes, so that every meeting may take milliseconds. Imports torch and triton.
"""

import torch
from torch import Tensor
from torch._C._distributed_c10d import Store

from workers.kernels.rows.peers import Peers
from workers.parallel.in_process import PeerLost, sum_in_rank_order
from workers.parallel.peer_memory import PeerMemory


class OneDeviceGroup:
    """Every rank makes one, at the same time. Errors: RuntimeError where their memory cannot be joined, or a trial of it is not
    over after patience_s, or wrong."""

    def __init__(self, rank: int, size: int, store: Store, device: torch.device, patience_s: float) -> None:
        self.rank, self.size = rank, size
        self._store = store  # rank 0 serves it, so it lives as long as the group
        self._reason = ""
        self._memory = PeerMemory(rank, size, store, device)
        if fault := self._memory.fault(patience_s):
            raise RuntimeError(f"kernels over joined memory: {fault}")

    @property
    def peers(self) -> Peers:
        return self._memory.peers

    def all_reduce(self, tensor: Tensor) -> Tensor:
        self.check()
        if self._memory.sums(tensor):
            return self._memory.all_reduce(tensor)
        return sum_in_rank_order(list(self._memory.all_gather(tensor)), tensor)

    def all_gather(self, tensor: Tensor) -> Tensor:
        self.check()
        return self._memory.all_gather(tensor)

    def wait_at_most(self, seconds: float) -> None:
        """The kernels wait until they are told that there is nobody to wait for."""

    def abort(self, reason: str) -> None:
        self._reason = self._reason or reason
        self._memory.give_up()

    def check(self) -> None:
        if self._reason:
            raise PeerLost(f"tensor-parallel group lost, rank {self.rank} of {self.size}: {self._reason}")

    def close(self) -> None:
        self.abort("the group was closed")
