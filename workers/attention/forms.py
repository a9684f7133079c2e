"""What one layer's attention is, beside causal: its scale, what a token may see, what happens to its scores. Imports torch."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Form:
    """One layer's. A token at position p sees itself and those before it, of which

    window: the last so many, itself included. chunk: those in its own run of so many positions.
    scale: of query times key. softcap: scores become softcap * tanh(score / softcap). sinks: [heads], a score that every query
    has beside those of its keys, with no value.
    """

    scale: float
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    def within(self, positions: int) -> "Form":
        """The same, for sequences of so many positions at most: what they cannot notice is left out."""
        window = self.window if self.window is not None and self.window < positions else None
        chunk = self.chunk if self.chunk is not None and self.chunk < positions else None
        return Form(self.scale, window, chunk, self.softcap, self.sinks)

    @property
    def plain(self) -> bool:
        """Scaled dot products over all that came before: what every backend computes."""
        return self.window is None and self.chunk is None and self.softcap is None and self.sinks is None

    def says(self) -> list[str]:
        """What is not plain, in words."""
        parts = {
            "a sliding window": self.window, "chunks": self.chunk, "a soft cap": self.softcap, "attention sinks": self.sinks,
        }  # fmt: skip
        return [name for name, value in parts.items() if value is not None]


@dataclass(frozen=True, slots=True)
class HeadShape:
    """One layer's heads on one rank."""

    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int

    @property
    def width(self) -> int:
        """Numbers of a token's keys, or of its values where these are more."""
        return self.kv_heads * max(self.key_dim, self.value_dim)
