"""Two groups of two ranks on a real local Ray cluster: the same tokens as in one process, a prefix that goes from one group to
the other over sockets between the ranks' processes, and a worker that dies. One cluster for all tests, which run in order."""

import os
import re
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import ray

from deploy import LLM, SamplingParams
from deploy.frontend.outputs import RequestOutput
from tests.cluster.test_ray import GREEDY, LONG, PROMPTS, TINY, tokens, until
from tests.shared.processes import WORKER, all_named, command_line, descendants

pytestmark = pytest.mark.ray

PREFIX = list(range(300, 620))
MANY = [[*PREFIX, *range(700 + 12 * number, 712 + 12 * number)] for number in range(16)]

Said = dict[str, list[list[int]]]


def open_llm(**options: Any) -> LLM:
    """In float64, so that it says the same wherever and however it is computed; no rank is lost but the one that is killed."""
    asked: dict[str, Any] = {"kv_memory": "64MiB", "max_num_batched_tokens": 32, "check_invariants": True}
    return LLM(TINY, dtype="float64", block_size=16, threads=1, hung_after_s=600.0, **asked | options)


@pytest.fixture(scope="module")
def expected() -> Said:
    """What one undisturbed process says."""
    with open_llm(local=True) as llm:
        work = {"few": (PROMPTS, GREEDY), "many": (MANY, GREEDY), "long": (PROMPTS, LONG)}
        return {name: tokens(llm.generate(prompts, params, progress=False)) for name, (prompts, params) in work.items()}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with open_llm(groups=2, tensor_parallel_size=2) as engine:
        yield engine
    assert not ray.is_initialized()


def test_a_prefix_is_fetched(llm: LLM, expected: Said) -> None:
    """One group has the prefix and more work than it can do at once; the other fetches the prefix and takes its share."""
    llm.generate([PREFIX], SamplingParams(max_tokens=2, ignore_eos=True), progress=False)
    assert tokens(llm.generate(MANY, GREEDY, progress=False)) == expected["many"]
    stats = llm.stats()
    assert stats.fetches >= 1
    assert stats.failed_transfers == 0
    assert stats.fetched_tokens >= 304, "all full blocks of the prefix"
    assert all(group.steps for group in stats.groups)


def test_they_say_the_same_and_hit_what_is_cached(llm: LLM, expected: Said) -> None:
    first = llm.generate(PROMPTS, GREEDY, progress=False)
    assert tokens(first) == expected["few"]
    again = llm.generate(PROMPTS, GREEDY, progress=False)
    assert tokens(again) == expected["few"]
    assert all((output.num_cached_tokens or 0) >= 48 for output in again), "the shared prefix of 60 tokens is cached by now"
    stats = llm.stats()
    assert [group.up for group in stats.groups] == [True, True]
    assert all(group.held_blocks == 0 for group in stats.groups)


@pytest.mark.usefixtures("llm")
def test_their_ray_has_no_process_that_nobody_needs() -> None:
    lines = [command_line(pid) for pid in descendants(os.getpid())]
    assert any("gcs_server" in line for line in lines)
    assert not [line for line in lines if re.search(r"dashboard\.py|log_monitor\.py|autoscaler/_private/monitor\.py", line)]


def test_they_outlive_a_worker(llm: LLM, expected: Said) -> None:
    victims = all_named(WORKER, 4)
    latest: dict[int, RequestOutput] = {}
    killed = False
    for index, output in llm.iterate(PROMPTS, LONG):
        latest[index] = output
        if not killed and len(latest) == len(PROMPTS) and all(len(o.outputs[0].token_ids) > 5 for o in latest.values()):
            os.kill(min(victims), signal.SIGKILL)
            killed = True
    assert killed
    assert tokens([latest[index] for index in range(len(PROMPTS))]) == expected["long"]

    until("the lost group was not replaced", lambda: all(group.up for group in llm.stats().groups))
    assert tokens(llm.generate(PROMPTS, GREEDY, progress=False)) == expected["few"]
