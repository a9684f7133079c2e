"""Ranks that are stopped (SIGSTOP), not dead: nobody's socket ends, and yet their sequences go on elsewhere, token for token.

Two groups of two ranks on a real Ray cluster. What is asserted is the order of events: whoever is stopped stays so.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import ray

from deploy import LLM
from deploy.frontend.outputs import RequestOutput
from scheduler.protocol import sentinel
from tests.cluster.test_ray import LONG, PROMPTS, open_llm, tokens, until
from tests.shared.processes import SCHEDULER, WORKER, all_named, command_line, descendants, kept_stopped, wait_gone

pytestmark = [pytest.mark.ray, pytest.mark.slow]

LEADER, PEER = 0, 1
HUNG_AFTER_S = 8.0
"""Twice the default: the group that is well is not to be kept from saying so by whatever else runs here."""
STOPPED_S = 10.0
"""Longer than any silence that is tolerated."""


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    with open_llm(local=True, groups=1, size=1) as llm:
        return tokens(llm.generate(PROMPTS, LONG, progress=False))


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with open_llm(local=False, groups=2, size=2, check_invariants=True, hung_after_s=HUNG_AFTER_S) as engine:
        yield engine
    assert not ray.is_initialized()


def rank_of(llm: LLM, group: int, rank: int) -> int:
    """Its process id."""
    engine: Any = llm._frontend.engine
    actor = engine._fleet._keepers[group]._handle._ranks[rank]
    return int(ray.get(actor.__ray_call__.remote(lambda _: os.getpid()), timeout=60.0))


def epochs(llm: LLM) -> dict[int, int]:
    return {group.group: group.epoch for group in llm.stats().groups}


def all_up(llm: LLM) -> bool:
    return all(group.up for group in llm.stats().groups)


def stream(llm: LLM, victim: int, resume_s: float | None = None, also: Callable[[], object] = int) -> list[list[int]]:
    """All tokens of all prompts; the victim is stopped once each has some, for good or for a while. also: done then, too."""
    latest: dict[int, RequestOutput] = {}
    stopped = False
    try:
        for index, output in llm.iterate(PROMPTS, LONG):
            latest[index] = output
            if not stopped and len(latest) == len(PROMPTS) and all(len(o.outputs[0].token_ids) > 5 for o in latest.values()):
                os.kill(victim, signal.SIGSTOP)
                also()
                stopped = True
                if resume_s is not None:
                    time.sleep(resume_s)
                    os.kill(victim, signal.SIGCONT)
    finally:
        if resume_s is not None:
            os.kill(victim, signal.SIGCONT)
    assert stopped
    return tokens([latest[index] for index in range(len(PROMPTS))])


@pytest.mark.parametrize(("group", "rank"), [(0, PEER), (1, LEADER)], ids=["peer", "leader"])
def test_a_rank_that_is_stopped_is_given_up_and_its_sequences_go_on(
    group: int, rank: int, llm: LLM, expected: list[list[int]]
) -> None:
    until("a group is missing", lambda: all_up(llm))
    before, ranks = epochs(llm), set(all_named(WORKER, 4))
    members = {rank_of(llm, group, each) for each in (LEADER, PEER)}
    victim = rank_of(llm, group, rank)
    assert stream(llm, victim) == expected, "while the stopped rank holds up its group"
    assert not wait_gone(members), "fenced: ended, though it never went on"
    until("the group was not replaced", lambda: all_up(llm) and epochs(llm)[group] > before[group])
    assert epochs(llm)[1 - group] == before[1 - group], "the other group is well"
    assert (ranks - members) < set(all_named(WORKER, 4))
    assert tokens(llm.generate(PROMPTS, LONG, progress=False)) == expected


def test_a_scheduler_that_is_stopped_is_woken(llm: LLM, expected: list[list[int]]) -> None:
    """And nothing has to come in its place."""
    until("a group is missing", lambda: all_up(llm))
    before, schedulers = epochs(llm), all_named(SCHEDULER, 1)
    assert stream(llm, schedulers[0]) == expected
    assert (epochs(llm), all_named(SCHEDULER, 1)) == (before, schedulers)


def test_a_scheduler_that_is_stopped_for_good_is_replaced(
    llm: LLM, expected: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    """Before it has been silent for as long as one that is only busy may be."""
    until("a group is missing", lambda: all_up(llm))
    (scheduler,) = all_named(SCHEDULER, 1)
    with ExitStack() as stack:
        assert stream(llm, scheduler, also=lambda: stack.enter_context(kept_stopped([scheduler]))) == expected
        assert not wait_gone([scheduler])
    assert "the scheduler has died" in caplog.text
    assert "has said nothing" not in caplog.text


def test_one_that_is_stopped_for_a_while_loses_nothing(llm: LLM, expected: list[list[int]]) -> None:
    """Where nobody ends it: a host that stands still for a while."""
    until("a group is missing", lambda: all_up(llm))
    before = epochs(llm)
    (scheduler,) = all_named(SCHEDULER, 1)
    (beside,) = [pid for pid in descendants(scheduler) if sentinel.__file__ in command_line(pid)]
    os.kill(beside, signal.SIGKILL)
    assert stream(llm, scheduler, resume_s=STOPPED_S) == expected
    assert epochs(llm) == before, "no group was silent: nobody listened"
    assert all_named(SCHEDULER, 1) == [scheduler]
