"""Device memory that several processes of one host read and write, by CUDA's handles. Imports torch.

torch knows in which of its allocations a tensor lies, and opens each of another process's once. Memory of a GPU that this
process does not see is mapped as well, and reached over NVLink or PCIe; one's own cannot be.
"""

import torch
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from workers.host import SharedMemory


def share(tensor: Tensor) -> SharedMemory:
    """A name of the memory of a tensor that is all of its storage. To be asked once for each: torch counts who has been told.
    Errors: RuntimeError."""
    _, (*_, handle, size, offset, _, counter, counter_at, event, waits) = reduce_tensor(tensor)  # type: ignore[no-untyped-call]
    return SharedMemory(handle, size, offset, counter, counter_at, event, waits)


def mapped(shared: SharedMemory, device: torch.device) -> Tensor:
    """[size] uint8, another process's memory as long as the tensor lives. Errors: RuntimeError where it cannot be reached."""
    tensor: Tensor = rebuild_cuda_tensor(  # type: ignore[no-untyped-call]
        Tensor, (shared.size,), (1,), 0, torch.UntypedStorage, torch.uint8, device.index or 0, shared.handle, shared.size,
        shared.offset, False, shared.counter, shared.counter_at, shared.event, shared.waits,
    )  # fmt: skip
    return tensor
