"""Reads now and then, without a wait, how many tokens each expert has had. Imports torch and the report's types."""

import time
from collections.abc import Callable

import torch

from scheduler.protocol.leaders import ExpertLoad
from workers.model.layers.experts import ExpertCounts

INTERVAL_S = 5.0


class ExpertCounter:
    """Of one rank's decoder, counted from here on. Called by the thread that launches its steps."""

    def __init__(self, counts: ExpertCounts, clock: Callable[[], float] = time.monotonic) -> None:
        self._counts, self._clock = counts, clock
        with torch.inference_mode():
            counts.tokens.zero_()  # what measuring and capturing have run is nobody's
        on_gpu = counts.tokens.device.type == "cuda"
        self._host = torch.empty(counts.tokens.shape, dtype=torch.int64, pin_memory=on_gpu)
        self._copied = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]
        self._copying = False
        self._since_s = clock()

    def take(self) -> ExpertLoad | None:
        """As it stood behind the steps launched when it was copied; None between two times. On a GPU a copy is launched, and
        what it brings is told when a later call finds it there."""
        if self._copying:
            if self._copied is not None and not self._copied.query():  # type: ignore[no-untyped-call]
                return None
            self._copying = False
            return ExpertLoad(self._counts.layers, self._host.numpy().tobytes())
        if self._clock() - self._since_s < INTERVAL_S:
            return None
        self._since_s = self._clock()
        with torch.inference_mode():
            self._host.copy_(self._counts.tokens, non_blocking=True)
        self._copying = True
        if self._copied is None:
            return self.take()
        self._copied.record()
        return None
