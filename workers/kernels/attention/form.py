"""What one layer's attention is, beside causal: its scale, what a token may see, what happens to its scores.

Imports NumPy.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class Reach(NamedTuple):
    """How far back a token at position p sees: itself and those before it, of which

    window: the last so many, itself included. chunk: those in its own run of so many positions. 0: all.
    """

    window: int = 0
    chunk: int = 0

    def lowest(self, positions: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """The first position that tokens at these, each, see."""
        lowest = np.zeros_like(positions)
        if self.window:
            lowest = np.maximum(lowest, positions - self.window + 1)
        return np.maximum(lowest, positions // self.chunk * self.chunk) if self.chunk else lowest


@dataclass(frozen=True, slots=True)
class Form:
    """One layer's. window, chunk: as in `Reach`, None: all.

    scale: of query times key. softcap: scores become softcap * tanh(score / softcap). sinks: each head has a score that every
    query sees beside those of its keys, with no value; the numbers [heads] come with each call.
    """

    scale: float
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    sinks: bool = False

    def within(self, positions: int) -> "Form":
        """The same, for sequences of so many positions at most: what they cannot notice is left out."""
        window = self.window if self.window is not None and self.window < positions else None
        chunk = self.chunk if self.chunk is not None and self.chunk < positions else None
        return replace(self, window=window, chunk=chunk)

    @property
    def reach(self) -> Reach:
        """What decides which keys are read, so what layers must have in common to be planned together."""
        return Reach(self.window or 0, self.chunk or 0)

    def says(self) -> list[str]:
        """What is not plain, in words."""
        parts = {
            "a sliding window": self.window, "chunks": self.chunk, "a soft cap": self.softcap,
            "attention sinks": self.sinks or None,
        }  # fmt: skip
        return [name for name, value in parts.items() if value is not None]


def plain_forms(layers: int, head_dim: int) -> Sequence[Form]:
    """Of layers of which nothing else is said: 1 / sqrt(head_dim)."""
    return (Form(head_dim**-0.5),) * layers
