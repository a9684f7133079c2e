"""RoPE's parameters, and the frequencies of every supported scaling.

Imports torch, only where numbers are wanted: who reads settings needs none. Frequencies follow transformers'
`modeling_rope_utils` operation by operation, so that float32 tables are equal to the bit; a float64 model gets float64 tables.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rope:
    """RoPE's parameters. kind: which of `KINDS`; the fields that a kind does not read are ignored.

    Sources: RoPE (arXiv 2104.09864), YaRN (arXiv 2309.00071), llama3 (Llama 3.1's release).
    """

    KINDS: ClassVar[tuple[str, ...]] = ("default", "linear", "llama3", "yarn")

    theta: float
    kind: str = "default"
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True

    def frequencies(self, head_dim: int, dtype: torch.dtype) -> Tensor:
        """Radians per position of each rotated pair, [head_dim / 2]."""
        import torch

        powers: Tensor = self.theta ** (torch.arange(0, head_dim, 2, dtype=dtype) / head_dim)
        plain = 1.0 / powers
        match self.kind:
            case "linear":
                return plain / self.factor
            case "llama3":
                return self._llama3(plain)
            case "yarn":
                return self._yarn(powers, head_dim)
            case _:
                return plain

    def stretched(self, max_position: int) -> int:
        """Positions that the model takes: YaRN's factor is written beside a `max_position` that is still the original."""
        if self.kind != "yarn":
            return max_position
        return max(max_position, int(self.original_max_position * self.factor))

    def magnitude(self) -> float:
        """What the cosines and sines are multiplied with: 1 but for YaRN."""
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return _mscale(self.factor, self.mscale) / _mscale(self.factor, self.mscale_all_dim)
        return _mscale(self.factor, 1.0)

    def _llama3(self, plain: Tensor) -> Tensor:
        """Long wavelengths are slowed by `factor`, short ones left alone, those between blended."""
        import torch

        long = self.original_max_position / self.low_freq_factor
        short = self.original_max_position / self.high_freq_factor
        wavelength = 2 * math.pi / plain
        scaled = torch.where(wavelength > long, plain / self.factor, plain)
        span = self.high_freq_factor - self.low_freq_factor
        smooth = (self.original_max_position / wavelength - self.low_freq_factor) / span
        blended = (1 - smooth) * scaled / self.factor + smooth * scaled
        between = ~(wavelength < short) * ~(wavelength > long)
        return torch.where(between, blended, scaled)

    def _yarn(self, powers: Tensor, head_dim: int) -> Tensor:
        """Pairs that turn often within the original context keep their speed, slow ones are interpolated."""

        def pair_turning(rotations: float) -> float:
            span = math.log(self.original_max_position / (rotations * 2 * math.pi))
            return head_dim * span / (2 * math.log(self.theta))

        low, high = pair_turning(self.beta_fast), pair_turning(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        if low == high:
            high += 0.001
        import torch

        ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1).to(powers.dtype)
        keep = 1 - ramp
        return 1.0 / (self.factor * powers) * (1 - keep) + 1.0 / powers * keep


def _mscale(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0
