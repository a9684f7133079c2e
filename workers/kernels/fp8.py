"""What a KV pool in FP8 makes of a number, within the kernels that write one. Imports triton."""

import triton
import triton.language as tl


@triton.jit
def stored(states, scale):
    """Keys or values as the pool has them, by the rule of `workers.attention.write.stored`: divided by their scale, the nearest
    number of float8_e4m3fn, its largest beyond that. The model's dtype has rounded them already."""
    exact = tl.div_rn(states.to(tl.float32), scale)
    return tl.clamp(exact, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL).to(tl.float8e4nv)
