"""RMSNorm by torch. Imports torch."""

import torch
from torch import Tensor


class RMSNorm:
    """Root mean square norm over the last `weight.shape[-1]` dimensions' elements, `weight` broadcast over the rest.

    On the CPU, scaled after rounding to the model's dtype, exactly as transformers does (gpt-oss's it rounds once);
    a GPU has one fused kernel that rounds once. float64 is computed in float64.
    """

    __slots__ = ("_eps", "_fused", "_shape", "weight")

    def __init__(self, shape: tuple[int, ...], eps: float, dtype: torch.dtype, device: torch.device) -> None:
        self.weight = torch.empty(shape, dtype=dtype, device=device)
        self._shape = shape[-1:]
        self._eps = eps
        self._fused = device.type != "cpu" and len(shape) == 1

    def __call__(self, x: Tensor) -> Tensor:
        if self._fused:
            return torch.rms_norm(x, self._shape, self.weight, self._eps)
        return torch.rms_norm(x, self._shape, None, self._eps).mul_(self.weight)
