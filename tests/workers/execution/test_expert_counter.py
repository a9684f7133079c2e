"""Tokens of experts are told every few seconds, as they stood at the time of asking."""

import numpy as np
import torch

from workers.execution.expert_counter import INTERVAL_S, ExpertCounter
from workers.model.layers.experts import ExpertCounts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_it_tells_now_and_then_from_when_it_was_made() -> None:
    now = [0.0]
    counts = ExpertCounts((1, 4), torch.full((2, 3), 9, device=DEVICE))
    counter = ExpertCounter(counts, lambda: now[0])
    counts.tokens[1, 2] += 5
    assert counter.take() is None, "not yet"
    now[0] += INTERVAL_S
    told = counter.take()
    if DEVICE == "cuda":
        assert told is None, "the copy has been launched, and nobody waits for it"
        torch.cuda.synchronize()
        counts.tokens[0, 0] += 1
        told = counter.take()
    assert told is not None
    assert told.whole
    assert told.layers == (1, 4)
    assert np.frombuffer(told.tokens, np.int64).reshape(2, 3).tolist() == [[0, 0, 0], [0, 0, 5]]
    assert counter.take() is None
