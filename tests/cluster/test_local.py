"""The engine of one process, without any rank: what it does when a front end does not take what it is told."""

from typing import cast

import numpy as np

from cluster.config import EngineConfig
from cluster.local.engine import LocalEngine
from cluster.local.groups import LocalGroups
from scheduler.config.core import Resolved
from scheduler.protocol.messages import Deltas, Request
from scheduler.protocol.sampling import SamplingParams


def test_a_front_end_that_raises_takes_nothing_from_what_follows() -> None:
    told: list[int] = []

    def hear(deltas: Deltas) -> None:
        streams = [end.stream for end in deltas.finished]
        told.extend(streams)
        if streams == [0]:
            raise RuntimeError("not this one")

    config, resolved = EngineConfig(model="none", block_size=16), Resolved(max_model_len=64)
    engine = LocalEngine(config, resolved, cast(LocalGroups, None), hear, lambda _: None)
    too_long = np.zeros(65, np.int32).tobytes()
    engine.submit([Request(stream, too_long, b"", SamplingParams()) for stream in range(3)])
    assert told == [0, 1, 2]
