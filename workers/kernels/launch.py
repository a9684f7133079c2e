"""What all kernels share: programmatic dependent launch, and how many warps a row takes.

With `pdl`, a kernel may start while the one before it on the stream still runs. It then does what depends on nothing (address
arithmetic, weights into registers), waits, and only after that reads what others of its chain wrote or writes anything. All
kernels of a chain wait, so that whatever ran two kernels ago has ended as well. When a kernel lets the next one start is a
matter of speed alone: at once where it leaves room beside itself, else when its sums are done.

Imports torch and triton. Runs on CUDA, or on the CPU under Triton's interpreter, where `pdl` changes nothing.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from triton.compiler.compiler import max_shared_mem
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from workers.kernels.compiling import keys

keys.settle()
ELEMENTS_OF_A_WARP = 512  # 16 a thread: two loads of 16 bytes
COPYING_GENERATIONS = (9, 10)
ALIGNED_BYTES = 16  # of a row, for the copy engine
WARPGROUP_GENERATION = 9
FIRST_WITH_GLUON = (3, 6)  # as `attention/specialized.py` takes it
INTERPRETED_PROCESSORS = 4
INTERPRETED_BYTES = 227 << 10  # of shared memory, as a Hopper chip has them
RESERVED_BYTES = 8 << 10  # for what is no stage


@triton.jit
def enter(PDL: tl.constexpr):
    """Lets the next kernel start as soon as this one's programs have all started, then waits for the previous one's end."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def enter_last(PDL: tl.constexpr):
    """As `enter`, but waits first: what starts behind it may read, before it waits itself, whatever was written before this
    one ran, if it reads past the L1 cache (`.cg`)."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


def may_start_early(device: torch.device) -> bool:
    """Whether kernels of it take `pdl`: from Hopper on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def copies_tiles(device: torch.device) -> bool:
    """Whether it has a copy engine for tiles, and 227 KiB of shared memory to hold them; a CPU interprets as if it had."""
    return device.type == "cpu" or torch.cuda.get_device_capability(device)[0] in COPYING_GENERATIONS


def has_warpgroups(device: torch.device) -> bool:
    """Whether its tensor cores are asked by groups of four warps, and Triton has Gluon to write it in: Hopper alone."""
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device)[0] == WARPGROUP_GENERATION
        and keys.VERSION >= FIRST_WITH_GLUON
    )


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors."""
    if device.type != "cuda":
        return INTERPRETED_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def shared_bytes(device: torch.device) -> int:
    """Shared memory that a program may have: what Triton holds it to."""
    if device.type != "cuda":
        return INTERPRETED_BYTES
    return int(max_shared_mem(device.index or 0))


def fitting_stages(stages: int, stage_bytes: int, device: torch.device, beside: int = 0) -> int:
    """As many of a loop's stages, each with so many bytes of shared memory, as a program may have, with so many bytes beside.
    Of the stage that is computed there is none, but on Hopper, where all that is chosen fits."""
    room = shared_bytes(device) - RESERVED_BYTES - beside
    return max(1, min(stages, 1 + room // stage_bytes))


def interpreted() -> bool:
    return bool(triton.knobs.runtime.interpret)


def warps_for(elements: int) -> int:
    """How many warps a program takes that holds a row of so many numbers: a power of two up to 16."""
    return min(16, max(1, int(triton.next_power_of_2(elements)) // ELEMENTS_OF_A_WARP))
