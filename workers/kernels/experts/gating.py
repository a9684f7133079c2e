"""What stands between an expert's two products. Imports triton."""

from dataclasses import dataclass

import triton
import triton.language as tl


@dataclass(frozen=True, slots=True)
class Clamp:
    """gpt-oss's gating, `(clamp(up) + 1) * gate * sigmoid(alpha * gate)`."""

    alpha: float
    limit: float


@triton.jit
def activated(gate, up, alpha, limit, CLAMPED: tl.constexpr):
    """SwiGLU of the same shape, or where CLAMPED gpt-oss's."""
    if CLAMPED:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit) + 1
        gate = gate / (1 + tl.exp(-alpha * gate))
    else:
        gate = gate / (1 + tl.exp(-gate))
    return gate * up
