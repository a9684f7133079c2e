"""How evenly a group's tokens are spread over the experts of its model, of what its reports tell now and then.

Imports NumPy and `leaders`.
"""

import numpy as np

from scheduler.protocol.leaders import ExpertLoad


class ExpertBalance:
    """layers: those with experts. imbalance: of each, the tokens of the expert that had most of them, over the mean of all,
    between the last two times that it was told and all layers had run; 1 is even. busiest: that expert's number.
    tokens [layers, experts]: since the group came up."""

    def __init__(self) -> None:
        self.layers: tuple[int, ...] = ()
        self.imbalance: tuple[float, ...] = ()
        self.busiest: tuple[int, ...] = ()
        self.tokens = np.zeros((0, 0), np.int64)

    def take(self, told: ExpertLoad) -> None:
        """told: whole."""
        tokens = np.frombuffer(told.tokens, np.int64).reshape(len(told.layers), -1)
        lately = tokens - self.tokens if tokens.shape == self.tokens.shape else tokens
        self.layers, self.tokens = told.layers, tokens
        if (lately.sum(1) > 0).all():
            self.imbalance = tuple((lately.max(1) / lately.mean(1)).tolist())
            self.busiest = tuple(lately.argmax(1).tolist())
