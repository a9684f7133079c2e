"""The scheduler's process is killed on a real Ray cluster: every stream goes on with the next one, token for token."""

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray

from deploy import LLM, SamplingParams
from deploy.frontend.outputs import RequestOutput
from tests.cluster.test_ray import PROMPTS, TINY, tokens, until
from tests.shared.processes import SCHEDULER, all_named

pytestmark = [pytest.mark.ray, pytest.mark.slow]

OPTIONS: dict[str, Any] = {"dtype": "float64", "block_size": 16, "kv_memory": "32MiB", "threads": 1, "hung_after_s": 600.0}
"""In float64, so that it says the same wherever and however it is computed; what is lost is the scheduler alone."""
PARAMS = [
    SamplingParams(temperature=0.8, seed=7 + number, n=1 + number % 2, presence_penalty=0.2, max_tokens=150, ignore_eos=True)
    for number in range(len(PROMPTS))
]


@pytest.fixture(scope="module")
def expected() -> list[RequestOutput]:
    with LLM(TINY, local=True, **OPTIONS) as llm:
        return llm.generate(PROMPTS, PARAMS, progress=False)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(TINY, groups=2, **OPTIONS, check_invariants=True) as engine:
        yield engine
    assert not ray.is_initialized()


def kill_scheduler() -> None:
    (scheduler,) = all_named(SCHEDULER, 1)
    os.kill(scheduler, signal.SIGKILL)


def test_a_scheduler_that_is_killed_takes_no_stream_with_it(llm: LLM, expected: list[RequestOutput]) -> None:
    """Twice, while six streams run."""
    latest: dict[int, RequestOutput] = {}
    kills = [5, 60]  # once the shortest has so many tokens
    for index, output in llm.iterate(PROMPTS, PARAMS):
        latest[index] = output
        shortest = min(len(choice.token_ids) for each in latest.values() for choice in each.outputs)
        if kills and len(latest) == len(PROMPTS) and shortest > kills[0]:
            kills.pop(0)
            kill_scheduler()
    assert not kills
    for index, output in enumerate(expected):
        assert latest[index].error is None
        assert [c.token_ids for c in latest[index].outputs] == [c.token_ids for c in output.outputs]
        assert [c.text for c in latest[index].outputs] == [c.text for c in output.outputs]


def test_who_comes_while_there_is_none_waits_for_the_next(llm: LLM, expected: list[RequestOutput]) -> None:
    until("a group is missing", lambda: all(group.up for group in llm.stats().groups))
    kill_scheduler()
    time.sleep(0.05)  # the front end has heard, the next one is not up yet
    assert tokens(llm.generate(PROMPTS, PARAMS, progress=False)) == tokens(expected)
