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
from workers.kernels.rows.peers import Peers
from workers.kernels.rows.reduce import sum_all
from workers.mapping import mapped, share

ROWS, ROW_BYTES = 128, 32 << 10
"""Room for decodes of so many sequences, of hidden sizes up to 16,384 in 16 bits."""

MOST_BYTES = 4 * ROWS * ROW_BYTES
"""Of a rank's part. What is larger is NCCL's, where there is NCCL: it is bound by the links, not by launches and meetings."""


class PeerMemory:
    """A rank's part, mapped by all, and theirs. Every rank makes one, at the same time. Errors: RuntimeError where a GPU does
    not reach another's memory."""

    def __init__(self, rank: int, size: int, store: Store, device: torch.device) -> None:
        self._given_up = torch.zeros(1, dtype=torch.int32, pin_memory=True)
        half = 2 * ROWS * ROW_BYTES
        own = torch.zeros(2 * half + ROWS * size * 4, dtype=torch.uint8, device=device)
        own[0] = rank + 1
        torch.cuda.synchronize(device)  # before anybody else may write to it
        store.set(f"memory/{rank}", msgspec.msgpack.encode(share(own)))  # type: ignore[arg-type]  # which takes bytes, too
        names = [msgspec.msgpack.decode(store.get(f"memory/{peer}"), type=SharedMemory) for peer in range(size)]
        self._memories = [own if peer == rank else mapped(name, device) for peer, name in enumerate(names)]
        if [int(memory[0]) for memory in self._memories] != [*range(1, size + 1)]:
            raise RuntimeError("what is read in another rank's memory is not what is there")

        def addresses(offset: int) -> Tensor:
            return torch.tensor([memory.data_ptr() + offset for memory in self._memories], dtype=torch.int64, device=device)

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
