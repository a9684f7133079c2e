"""How far back the layers of a model see, all of them taken together. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from workers.kernels.attention.form import Form


def widest_window(forms: Iterable[Form], positions: int) -> int | None:
    """Tokens that the layer sees that sees most, itself included, in sequences of so many positions at most; None: some layer
    sees all of them. A run of positions that sees itself alone is seen no further than its length."""
    widest = 0
    for form in forms:
        near = min(form.window or positions, form.chunk or positions)
        if near >= positions:
            return None
        widest = max(widest, near)
    return widest or None


def narrow_layers(forms: Iterable[Form], positions: int) -> tuple[tuple[bool, ...], int | None]:
    """Which layers do not see all that some other layer sees, in sequences of so many positions at most, and tokens that the
    widest of them sees; none, and None, where all see as much."""
    near = [min(form.window or positions, form.chunk or positions, positions) for form in forms]
    widest = max((tokens for tokens in near if tokens < positions), default=None)
    if widest is None or positions not in near:
        return (False,) * len(near), None
    return tuple(tokens < positions for tokens in near), widest
