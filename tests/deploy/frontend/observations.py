"""An ended request to vary."""

from dataclasses import replace
from typing import Any

import numpy as np

from deploy.frontend.service.observation import Observation, PromptUse
from scheduler.protocol.messages import Misses

SERVED = Observation(
    request_id="cmpl-1",
    outcome="stop",
    prompt_tokens=300,
    cached_tokens=128,
    misses=Misses(evicted=70, cold=100, inside_block=2),
    output_tokens=11,
    started_unix_s=1_750_000_000.25,
    queued_s=0.1,
    ttft_s=0.5,
    e2e_s=1.5,
    preemptions=1,
    priority=2,
    prompts=(PromptUse(300, np.array([2**63 + 1, 7], "<u8").tobytes(), (11,)),),
    block_size=128,
)
"""0.1 s in the queue, the first of 11 tokens after 0.5 s, the last after 1.5 s."""


def observation(**fields: Any) -> Observation:
    return replace(SERVED, **fields)
