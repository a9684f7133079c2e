"""A scheduler that dies takes no rank along: on a real Ray cluster the same processes go on for the next one, and what stands
in their pools is hit by whoever comes. What it had promised to its front ends is theirs to ask for again.
"""

import os
import queue
import signal
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from cluster.config import EngineConfig
from cluster.fleet.fleet import Fleet
from cluster.fleet.group import GroupHandle
from cluster.fleet.scheduler_keeper import LiveScheduler, SchedulerKeeper
from cluster.launch import plan
from cluster.remote import SchedulerStream
from scheduler.protocol.messages import Deltas, Finished, FinishReason, Request
from scheduler.protocol.sampling import SamplingParams
from tests.cluster.test_ray import until
from tests.shared.processes import SCHEDULER, WORKER, all_named, wait_gone
from tests.shared.ray_heads import own_ray

pytestmark = [pytest.mark.ray, pytest.mark.slow]

TINY = Path(__file__).parents[3] / "examples" / "tiny"
PATIENCE_S = 180.0
PREFIX = list(range(300, 396))
"""Six blocks."""
PROMPTS = [[*PREFIX, 400 + at, 500 + at] for at in range(6)]
MOST = 40
ABANDONED_AFTER_S = 5.0


class Client:
    """A front end of a few lines, for one life of the scheduler."""

    def __init__(self, fleet: Fleet) -> None:
        address = fleet.current().address
        self._said: queue.SimpleQueue[Deltas | str] = queue.SimpleQueue()
        self.stream = SchedulerStream(address.host, address.port, address.token, self._said.put, self._said.put)
        self._numbers = 0

    def submit(self, prompts: list[list[int]], max_tokens: int) -> range:
        first, self._numbers = self._numbers, self._numbers + len(prompts)
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        self.stream.submit(
            [Request(first + at, np.array(prompt, np.int32).tobytes(), b"", params) for at, prompt in enumerate(prompts)]
        )
        return range(first, self._numbers)

    def hear(self) -> Deltas:
        said = self._said.get(timeout=PATIENCE_S)
        assert isinstance(said, Deltas), said
        return said

    def ask(self, prompts: list[list[int]], max_tokens: int = MOST) -> tuple[list[list[int]], list[Finished]]:
        """The tokens and the ends of all, in their order."""
        return self.gather(self.submit(prompts, max_tokens))

    def gather(self, streams: range) -> tuple[list[list[int]], list[Finished]]:
        tokens: dict[int, list[int]] = {stream: [] for stream in streams}
        ends: dict[int, Finished] = {}
        while len(ends) < len(streams):
            deltas = self.hear()
            numbers = np.frombuffer(deltas.streams, np.int64).tolist()
            columns = np.frombuffer(deltas.tokens, np.int32).reshape(-1, len(numbers)).T.tolist() if numbers else []
            for stream, column in zip(numbers, columns, strict=True):
                tokens[stream] += [token for token in column if token >= 0]
            ends |= {end.stream: end for end in deltas.finished}
        return [tokens[stream] for stream in streams], [ends[stream] for stream in streams]


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    config = EngineConfig(
        model=str(TINY), groups=2, tensor_parallel_size=2, dtype="float32", block_size=16, kv_memory=32 << 20,
        check_invariants=True, abandoned_after_s=ABANDONED_AFTER_S, hung_after_s=120.0,
    )  # fmt: skip
    with own_ray(6), closing(Fleet(config, plan(config))) as opened:
        opened.start(lambda _: None)
        yield opened


def groups_up(fleet: Fleet) -> int:
    return sum(group.up for group in fleet.groups())


def kill_scheduler(fleet: Fleet) -> None:
    before = fleet.scheduler.epoch
    (victim,) = all_named(SCHEDULER, 1)
    os.kill(victim, signal.SIGKILL)
    until("no other scheduler came up", lambda: fleet.scheduler.epoch > before)


def test_ranks_go_on_for_the_next_scheduler_and_their_prefixes_are_hit(fleet: Fleet) -> None:
    until("a group is missing", lambda: groups_up(fleet) == 2)
    ranks = all_named(WORKER, 4)
    expected, ends = Client(fleet).ask(PROMPTS)
    for life in range(1, 4):
        client = Client(fleet)
        client.submit(PROMPTS, 400)
        client.hear()  # they are under way
        kill_scheduler(fleet)
        until("a group did not come", lambda: groups_up(fleet) == 2)
        assert all_named(WORKER, 4) == ranks, "no process was started anew, so no weights were read again"
        assert [group.epoch for group in fleet.groups()] == [life, life]
        assert all(group.cached_blocks for group in fleet.groups()), "both groups have said what they hold"
        tokens, ends = Client(fleet).ask(PROMPTS)
        assert tokens == expected
        assert all(end.cached_tokens >= len(PREFIX) for end in ends), "of each prompt at least the prefix stood in the pool"


def test_a_leader_that_is_cut_off_comes_back_and_no_stream_is_lost(fleet: Fleet) -> None:
    until("a group is missing", lambda: groups_up(fleet) == 2)
    ranks, client = all_named(WORKER, 4), Client(fleet)
    expected, _ = client.ask(PROMPTS, 200)
    before = {group.group: group.epoch for group in fleet.groups()}
    streams = client.submit(PROMPTS, 200)
    leader = fleet._keepers[1]._handle._ranks[0]
    ray.get(leader.__ray_call__.remote(cut), timeout=PATIENCE_S)
    tokens, ends = client.gather(streams)
    assert tokens == expected
    assert all(end.reason == FinishReason.LENGTH for end in ends)
    until("it did not come back", lambda: groups_up(fleet) == 2)
    assert {group.group: group.epoch for group in fleet.groups()} == before | {1: before[1] + 1}
    assert all_named(WORKER, 4) == ranks


def cut(worker: Any) -> None:
    """Ends the leader's connection to the scheduler, in its own process."""
    worker._life.terms._leave()


def test_ranks_wait_for_a_scheduler_as_long_as_they_are_told_to(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Far longer than they would wait for one of themselves."""
    until("a group is missing", lambda: groups_up(fleet) == 2)
    ranks, launch = all_named(WORKER, 4), fleet.scheduler._launch
    waited: list[float] = []

    def late(epoch: int, timeout_s: float) -> LiveScheduler:
        time.sleep(3 * ABANDONED_AFTER_S)
        waited.append(timeout_s)
        return launch(epoch, timeout_s)

    monkeypatch.setattr(fleet.scheduler, "_launch", late)
    kill_scheduler(fleet)
    assert waited
    until("a group did not come", lambda: groups_up(fleet) == 2)
    assert all_named(WORKER, 4) == ranks


def test_ranks_that_nobody_keeps_end_themselves(fleet: Fleet) -> None:
    """Leader and peer, whose scheduler dies and whose keeper says nothing."""
    until("a group is missing", lambda: groups_up(fleet) == 2)
    ranks = all_named(WORKER, 4)
    scheduler = SchedulerKeeper(fleet.config, plan(fleet.config), None, "text")
    orphan = GroupHandle(7, 0, fleet.config, plan(fleet.config), "text")
    try:
        before = all_named(SCHEDULER, 1)
        address = scheduler.start(PATIENCE_S).address
        orphan.start(address, time.monotonic() + PATIENCE_S)
        until("it does not come up", lambda: bool(scheduler.call("status").engine.groups))
        left = {*all_named(WORKER, 6)} - {*ranks}
        (victim,) = {*all_named(SCHEDULER, 2)} - {*before}
        os.kill(victim, signal.SIGKILL)
        assert not wait_gone(left, PATIENCE_S)
    finally:
        orphan.kill()
        scheduler.close()
    assert groups_up(fleet) == 2
    assert all_named(WORKER, 4) == ranks
