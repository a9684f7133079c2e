"""Makes a rank's communicator: rendezvous, then the fastest way by which its group can talk.

Imports torch and torch.distributed, whose global default group it leaves alone: several groups fit in one process.
`Solo` and `ThreadGroup` are for ranks of one process, `SharedMemoryGroup` for CPU ranks of one host, `OneDeviceGroup` for ranks
that share a GPU, `TorchGroup` (NCCL or gloo) for all others.
"""

import logging
import os
import socket
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from workers.host import host_identity
from workers.parallel import shared_memory
from workers.parallel.communicator import JoinedGroup
from workers.parallel.in_process import PeerLost, Solo, ThreadGroup, sum_in_rank_order
from workers.parallel.shared_memory import SharedMemoryGroup

__all__ = ["PeerLost", "SharedMemoryGroup", "Solo", "ThreadGroup", "TorchGroup", "connect", "sum_in_rank_order"]

if TYPE_CHECKING:
    from workers.kernels.rows.peers import Peers
    from workers.parallel.peer_memory import PeerMemory

logger = logging.getLogger(__name__)

YIELDS = 200
NAP_S = 50e-6


def connect(
    rank: int, size: int, *, device: torch.device, address: str, timeout_s: float = 60.0, host: str = "",
    custom_all_reduce: bool = False,
) -> JoinedGroup:  # fmt: skip
    """Join the group of `size` ranks. Every rank calls this; it returns once all have come.

    address: "host:port" that rank 0 opens and all can reach. host: what tells this rank's host from others; by default
    found out. timeout_s: for the rendezvous, and for each collective until `wait_at_most`. custom_all_reduce: of GPUs of one
    host, small sums by a kernel of our own, if a trial of it is right.
    Errors: PeerLost if a rank does not come in time.
    """
    if size == 1:
        return Solo()
    try:
        store = _open_store(rank, size, address, timeout_s)
        together = _same_host(rank, size, store, host or host_identity())
        if device.type == "cpu" and together:
            group = _share_memory(rank, size, store, timeout_s)
            if group is not None:
                return group
        if device.type == "cuda" and together and _share_a_device(rank, size, store, device):
            from workers.parallel.one_device import OneDeviceGroup  # brings triton

            return OneDeviceGroup(rank, size, store, device, timeout_s)
        joined = TorchGroup(rank, size, store, device, timeout_s)
        if custom_all_reduce and device.type == "cuda":
            joined.memory = join_memory(rank, size, store, device, timeout_s) if together else None
        return joined
    except PeerLost:
        raise
    except (RuntimeError, OSError) as error:
        raise PeerLost(f"rank {rank} of {size} could not join its group at {address}: {error}") from error


class TorchGroup:
    """Ranks connected by torch.distributed: NCCL on GPUs, gloo between CPUs of several hosts.

    NCCL sums in its own fixed order; gloo's tensors are gathered and summed in rank order. Both are equal on all ranks.
    """

    memory: "PeerMemory | None" = None
    """Of GPUs of one host, where small sums and gathers need no NCCL."""

    def __init__(self, rank: int, size: int, store: Store, device: torch.device, timeout_s: float) -> None:
        self.rank, self.size = rank, size
        self._store = store  # rank 0 serves it, so it lives as long as the group
        self._reason = ""
        self._device = device
        self._on_gpu = device.type == "cuda"
        self._group: Any = _process_group(rank, size, store, device, timedelta(seconds=timeout_s))

    def all_reduce(self, tensor: Tensor) -> Tensor:
        if not self._on_gpu:
            return sum_in_rank_order(self._gather(tensor), tensor)
        if self.memory is not None and self.memory.pays(tensor) and self.memory.sums(tensor):
            return self.memory.all_reduce(tensor)
        self._finish(lambda: self._group.allreduce([tensor]))
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        if not self._on_gpu:
            return torch.stack(self._gather(tensor))
        if self.memory is not None and self.memory.pays(tensor):
            return self.memory.all_gather(tensor)
        gathered = tensor.new_empty(self.size, *tensor.shape)
        self._finish(lambda: self._group._allgather_base(gathered, tensor.contiguous()))
        return gathered

    def wait_at_most(self, seconds: float) -> None:
        self._group._set_default_timeout(timedelta(seconds=seconds))

    def abort(self, reason: str) -> None:
        self._reason = self._reason or reason
        if self.memory is not None:
            self.memory.give_up()
        if self._on_gpu:
            self._group.abort()  # what is under way on the device never ends by itself

    def check(self) -> None:
        if self._reason:
            raise self._lost(self._reason)

    @property
    def peers(self) -> "Peers | None":
        return self.memory.peers if self.memory is not None else None

    def close(self) -> None:
        self.abort("the group was closed")

    def _gather(self, tensor: Tensor) -> list[Tensor]:
        tensor = tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        self._finish(lambda: self._group.allgather([parts], [tensor]))
        return parts

    def _finish(self, start: Any) -> None:
        """Run a collective. On a GPU only the stream waits; on the CPU this thread does, open to `abort`."""
        self.check()
        try:
            work, yields = start(), 0
            while not self._on_gpu and not work.is_completed():
                if self._reason:
                    raise self._lost(self._reason)
                yields += 1
                if yields < YIELDS:
                    os.sched_yield()
                else:
                    time.sleep(NAP_S)
            work.wait()
        except PeerLost:
            raise
        except RuntimeError as error:
            raise self._lost(self._reason or str(error)) from error

    def _lost(self, reason: str) -> PeerLost:
        return PeerLost(f"tensor-parallel group lost, rank {self.rank} of {self.size}: {reason}")


def _process_group(rank: int, size: int, store: Store, device: torch.device, timeout: timedelta) -> Any:
    """The bare backend, not `init_process_group`, which knows only one default group per process."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return dist.ProcessGroupNCCL(PrefixStore("nccl", store), rank, size, options)
    return dist.ProcessGroupGloo(PrefixStore("gloo", store), rank, size, timeout)


def _open_store(rank: int, size: int, address: str, timeout_s: float) -> Store:
    """The key-value store of the rendezvous. Rank 0 listens on the given host only, not on every interface."""
    host, port = address.rsplit(":", 1)
    timeout = timedelta(seconds=timeout_s)
    if rank:
        return TCPStore(host, int(port), size, False, timeout, wait_for_workers=False)
    listener = socket.create_server((host, int(port)), backlog=size)
    return TCPStore(
        host, int(port), size, True, timeout, wait_for_workers=False, master_listen_fd=listener.detach()
    )


def _exchange(rank: int, size: int, store: Store, key: str, value: str) -> list[str]:
    store.set(f"{key}/{rank}", value)
    return [store.get(f"{key}/{peer}").decode() for peer in range(size)]


def _same_host(rank: int, size: int, store: Store, host: str) -> bool:
    return len(set(_exchange(rank, size, store, "host", host))) == 1


def _share_a_device(rank: int, size: int, store: Store, device: torch.device) -> bool:
    """Whether two ranks have the same GPU."""
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    return len(set(_exchange(rank, size, store, "device", uuid))) < size


def join_memory(rank: int, size: int, store: Store, device: torch.device, timeout_s: float) -> "PeerMemory | None":
    """The GPUs' memory, or None, on all ranks alike, if one of them does not reach it, or sums through it come out wrong."""
    from workers.parallel.peer_memory import PeerMemory  # brings triton

    memory, reason = None, ""
    try:
        memory = PeerMemory(rank, size, store, device)
    except RuntimeError as error:
        reason = _told(error)
    faults = [why for why in _exchange(rank, size, store, "peers", reason) if why]
    if memory is not None and not faults:
        try:
            reason = memory.fault(timeout_s / 2)
        except Exception as error:  # also of a compiler, which NCCL needs not
            reason = _told(error)
        faults = [why for why in _exchange(rank, size, store, "sums", reason) if why]
    if rank == 0:
        logger.info("small sums by %s", f"NCCL: {faults[0]}" if faults else "a kernel over the ranks' joined memory")
    return None if faults else memory


def _told(error: Exception) -> str:
    """For the other ranks: never empty."""
    return str(error).partition("\n")[0] or type(error).__name__


def _share_memory(rank: int, size: int, store: Store, timeout_s: float) -> SharedMemoryGroup | None:
    """The group through shared memory, or None, on all ranks alike, if one of them cannot map it."""
    group, descriptor = None, -1
    if rank == 0 and shared_memory.is_supported():
        descriptor = shared_memory.create_segment(size)
    owner, *_ = _exchange(rank, size, store, "segment", f"{os.getpid()} {descriptor}")
    pids = [int(pid) for pid in _exchange(rank, size, store, "pid", str(os.getpid()))]
    try:
        if rank and shared_memory.is_supported():
            descriptor = shared_memory.open_segment(*map(int, owner.split()))
        if descriptor >= 0:
            alive = shared_memory.watch_processes([pid for pid in pids if pid != os.getpid()])
            group = SharedMemoryGroup(rank, size, descriptor, timeout_s=timeout_s, alive=alive)
    except OSError:  # peers in other containers, or under another user
        group = None
    mapped = _exchange(rank, size, store, "mapped", "yes" if group is not None else "no")
    if descriptor >= 0:
        os.close(descriptor)
    if group is not None and "no" not in mapped:
        group.keep = store
        return group
    return None
