"""Values as a pool takes them that is not in FP8: finite, whatever they are. Imports triton.

flash-attn 3 multiplies the slots of a block that a sequence has not written by a probability of zero, and what stands there may
be of whoever had the block before. A NaN of one whose numbers have run over would so become the next one's, and that one's
values the next one's after it. Keys stay as they are: masked scores are replaced, so a NaN reaches those alone who see it, and
a sequence whose states are NaN still gets nothing but NaN.
"""

import triton
import triton.language as tl

_BFLOAT16, _FLOAT16, _FLOAT32 = (
    tl.constexpr(largest) for largest in (3.3895313892515355e38, 65504.0, 3.4028234663852886e38)
)  # fmt: skip


@triton.jit
def finite(values):
    """Of any shape, in the pool's dtype: as they are; what is beyond its numbers the largest of them, NaN nought."""
    LARGEST: tl.constexpr = (
        _BFLOAT16 if values.dtype == tl.bfloat16 else _FLOAT16 if values.dtype == tl.float16 else _FLOAT32
    )  # fmt: skip
    wide = values.to(tl.float32)
    return tl.where(wide == wide, tl.clamp(wide, -LARGEST, LARGEST), 0.0).to(values.dtype)
