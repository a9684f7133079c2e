"""What all kernels share: programmatic dependent launch, and how many warps a row takes.

With `pdl`, a kernel may start while the one before it on the stream still runs. It then does what depends on nothing (address
arithmetic, weights into registers), waits, and only after that reads what others of its chain wrote or writes anything. All
kernels of a chain wait, so that whatever ran two kernels ago has ended as well. When a kernel lets the next one start is a
matter of speed alone: at once where it leaves room beside itself, else when its sums are done.

Imports triton. Runs on CUDA, or on the CPU under Triton's interpreter, where `pdl` changes nothing.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

ELEMENTS_OF_A_WARP = 512  # 16 a thread: two loads of 16 bytes


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


def interpreted() -> bool:
    return bool(triton.knobs.runtime.interpret)


def warps_for(elements: int) -> int:
    """How many warps a program takes that holds a row of so many numbers: a power of two up to 16."""
    return min(16, max(1, int(triton.next_power_of_2(elements)) // ELEMENTS_OF_A_WARP))
