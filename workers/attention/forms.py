"""What one layer's attention is: its form, as the kernels know it, and the shape of its heads."""

from dataclasses import dataclass

from workers.kernels.attention.form import Form as Form  # other rooms know it by this one's name
from workers.kernels.attention.form import plain_forms as plain_forms


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

    @property
    def even(self) -> "HeadShape":
        """The same with keys and values of one size, the larger: what the narrower are filled up to on GPUs."""
        size = max(self.key_dim, self.value_dim)
        return HeadShape(self.heads, self.kv_heads, size, size)
