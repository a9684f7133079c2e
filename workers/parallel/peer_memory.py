"""Device memory of one host's GPUs that every rank of a group reads and writes: what `kernels.rows` sums and gathers through.

Each maps the others' (`workers.mapping`); NVLink multicast, which other users of a host suffer from, has no part in it. Not
every host has it: then the reason is an error. Imports torch and those kernels.
"""

import msgspec
import torch
from torch import Tensor
from torch._C._distributed_c10d import Store

from workers.host import SharedMemory
from workers.kernels.rows.gather import gather
from workers.kernels.rows.peers import PACKET_BYTES, PROGRAMS, Peers
from workers.kernels.rows.reduce import sum_all
from workers.mapping import mapped, share
from workers.parallel.trial import find_fault

PACKETS = 2 << 20
"""Of half an inbox: two ranks have room for 256 rows of 8,192 numbers of 16 bits in one launch."""

MOST_BYTES = 4 << 20
"""Of a rank's part. What is larger is NCCL's, where there is NCCL: links bind it, and packets are twice the bytes."""


class PeerMemory:
    """A rank's part, mapped by all, and theirs. Every rank makes one, at the same time. Errors: RuntimeError where a GPU does
    not reach another's memory."""

    def __init__(self, rank: int, size: int, store: Store, device: torch.device) -> None:
        self._given_up = torch.zeros(1, dtype=torch.int32, pin_memory=True)
        own = torch.zeros(2 * PACKETS * PACKET_BYTES + 1, dtype=torch.uint8, device=device)
        own[-1] = rank + 1
        torch.cuda.synchronize(device)  # before anybody else may write to it
        store.set(f"memory/{rank}", msgspec.msgpack.encode(share(own)))  # type: ignore[arg-type]  # which takes bytes, too
        names = [msgspec.msgpack.decode(store.get(f"memory/{peer}"), type=SharedMemory) for peer in range(size)]
        self._memories = [own if peer == rank else mapped(name, device) for peer, name in enumerate(names)]
        if [int(memory[-1]) for memory in self._memories] != [*range(1, size + 1)]:
            raise RuntimeError("what is read in another rank's memory is not what is there")

        addresses = torch.tensor([memory.data_ptr() for memory in self._memories], dtype=torch.int64, device=device)
        turns = torch.zeros(PROGRAMS, dtype=torch.int32, device=device)
        self.peers = Peers(rank, size, PACKETS, addresses, turns, self._given_up.data_ptr())

    def fault(self, patience_s: float) -> str:
        """As `find_fault`, which all ranks call at the same time. Unless it is empty nobody may use this memory, and it is kept
        until all ranks have said so."""
        return find_fault(self.peers, self._memories[0].device, self.give_up, patience_s)

    def pays(self, tensor: Tensor) -> bool:
        """Whether this is faster than NCCL."""
        return tensor.nbytes <= MOST_BYTES

    @staticmethod
    def sums(tensor: Tensor) -> bool:
        """Whether `all_reduce` takes it."""
        return tensor.is_floating_point() and tensor.itemsize in (2, 4) and tensor.is_contiguous()

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """What `sums` says yes to: summed in place, on the current stream."""
        sum_all(self.peers, tensor)
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        """[...] on each rank -> [size, ...] on every rank, on the current stream."""
        return gather(self.peers, tensor.contiguous())

    def give_up(self) -> None:
        """Nobody is waited for any more, by kernels that run either. Callable from any thread."""
        self._given_up.fill_(1)
