"""The owner of a fleet dies without a warning: what it owned serves on, is taken over by the next owner, or ends by itself.

A Ray cluster beside this process; owners are processes of their own, this one is the front end.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

from benchmarks.chaos.faults import cut
from cluster.engine import EngineError, OnDeltas, OnFailure
from cluster.fleet.group import GroupHandle
from cluster.fleet.ownership.lasting import Lasting
from cluster.fleet.ownership.remains import Found, end, find, latest_scheduler
from cluster.launch import plan
from cluster.remote import SchedulerStream
from deploy import LLM, SamplingParams
from deploy.frontend import frontend
from deploy.frontend.frontend import FrontEnd
from deploy.frontend.generation.generation import Generation
from deploy.text.prompts import Prompt, read_model_limits
from scheduler.protocol.orphans import Estate
from tests.cluster.fleet.fleet_owner import NAMESPACE, TINY, config, version
from tests.shared import waiting
from tests.shared.processes import SCHEDULER, WORKER, alive, all_named, named, wait_gone
from tests.shared.ray_heads import ray_head

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PATIENCE_S = 180.0
FOREVER_S = 600.0
SOON_S = 20.0
"""Longer than an owner can be kept from saying that it lives by whatever else runs here."""

PROMPTS = [[*range(300, 360), 400 + i, 500 + i] for i in range(6)]
SAMPLED = SamplingParams(temperature=0.8, seed=7, max_tokens=300, ignore_eos=True)


until = partial(waiting.until, patience_s=PATIENCE_S, every_s=0.05)


class Owner:
    """Of the fleet, until it is killed."""

    def __init__(self, address: str, log: Path, timeout_s: float, said: str = "ready", **options: int) -> None:
        """said: what is waited for."""
        command = [sys.executable, "-m", "tests.cluster.fleet.fleet_owner", address, str(timeout_s)]
        command += [f"{name}={value}" for name, value in options.items()]
        self._log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file, cwd=Path(__file__).parents[3])
        try:
            until(f"it is not {said}", lambda: said in self.said or self.process.poll() is not None)
            assert said in self.said, self.said
        except BaseException:
            self.kill()
            raise

    @property
    def said(self) -> list[str]:
        return self._log.read_text().splitlines()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with ray_head(tmp_path_factory.mktemp("head"), 6, "--include-dashboard=false") as found:
        ray.init(address=found, log_to_driver=False)
        try:
            yield found
        finally:
            ray.shutdown()


@pytest.fixture
def own(address: str, tmp_path: Path) -> Iterator[Callable[..., Owner]]:
    """Owners, one after the other. Nothing is left of the last one's fleet afterwards."""
    owners: list[Owner] = []

    def start(timeout_s: float, **options: Any) -> Owner:
        owners.append(Owner(address, tmp_path / f"owner{len(owners)}.log", timeout_s, **options))
        return owners[-1]

    yield start
    for owner in owners:
        owner.kill()
    for found in find(NAMESPACE).values():
        end(NAMESPACE, found)
    until("something is left", lambda: not processes())


def processes() -> dict[str, list[int]]:
    """Of the fleet, by what they are."""
    return {name: pids for name in (SCHEDULER, WORKER) if (pids := named(name))}


def placements() -> list[str]:
    return [group["name"] for group in placement_group_table().values() if group["state"] != "REMOVED"]


@contextlib.contextmanager
def front_end(**options: int) -> Iterator[FrontEnd]:
    """Connected to the scheduler of that configuration, and for longer than users are if there is none: here the next one waits
    for a process that has yet to start."""

    def connect(on_deltas: OnDeltas, on_failure: OnFailure) -> SchedulerStream:
        scheduler: Any = latest_scheduler(NAMESPACE, version(config(**options)))
        try:
            handover = ray.get(scheduler.handover.remote(), timeout=PATIENCE_S)
            return SchedulerStream(handover.host, handover.port, handover.token, on_deltas, on_failure)
        except (AttributeError, ray.exceptions.RayError) as error:
            raise EngineError("there is none, or it does not listen yet") from error

    opened = FrontEnd(connect, read_model_limits(TINY, None), None)
    with pytest.MonkeyPatch.context() as patched, contextlib.closing(opened):
        patched.setattr(frontend, "REACH_TIMEOUT_S", PATIENCE_S)
        yield opened


def submit(opened: FrontEnd) -> list[Generation]:
    return opened.submit([Prompt(ids, SAMPLED) for ids in PROMPTS], lambda _: None)


def tokens(generations: list[Generation]) -> list[list[int]]:
    """All of them, once all have ended. Errors: AssertionError for one that has failed."""
    until("not all have ended", lambda: all(generation.finished for generation in generations))
    outputs = [generation.take() for generation in generations]
    assert [output.error for output in outputs] == [None] * len(outputs)
    return [list(output.outputs[0].token_ids) for output in outputs]


def begun(generations: list[Generation]) -> bool:
    return all(len(generation.take().outputs[0].token_ids) > 5 for generation in generations)


def lose_a_rank(opened: FrontEnd, ranks: list[int], expected: list[list[int]]) -> None:
    """Whoever owns the groups now looks after them: one that has lost a rank comes back, and requests are exact."""
    os.kill(ranks[0], signal.SIGKILL)
    until("nobody looks after the group", lambda: len(set(named(WORKER)) - {*ranks}) == 1)
    assert tokens(submit(opened)) == expected


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    with LLM(TINY, dtype="float32", block_size=16, kv_memory="32MiB", local=True) as llm:
        outputs = llm.generate(PROMPTS, SAMPLED, progress=False)
        return [list(output.outputs[0].token_ids) for output in outputs]


def test_what_an_owner_leaves_serves_on_and_is_taken_over(own: Callable[..., Owner], expected: list[list[int]]) -> None:
    first = own(FOREVER_S)
    ranks, (scheduler,) = all_named(WORKER, 2), all_named(SCHEDULER, 1)
    with front_end() as opened:
        streams = submit(opened)
        until("they do not begin", lambda: begun(streams))
        first.kill()
        assert not any(stream.finished for stream in streams), "too short: it died after them"
        assert tokens(streams) == expected, "nobody owns them"
        assert tokens(submit(opened)) == expected, "newcomers are served, too"
        streams = submit(opened)
        second = own(FOREVER_S)
        assert "took over the scheduler and 2 group(s)" in second.said
        assert tokens(streams) == expected, "while they are taken over"
        assert (all_named(WORKER, 2), all_named(SCHEDULER, 1)) == (ranks, [scheduler])

        lose_a_rank(opened, ranks, expected)
        assert ranks[1] in all_named(WORKER, 2)


def test_groups_that_an_owner_leaves_without_a_scheduler_are_taken_over(
    own: Callable[..., Owner], expected: list[list[int]]
) -> None:
    """They exchange blocks with the next ones as well, since the next scheduler has the same secret."""
    first = own(FOREVER_S)
    ranks, (scheduler,) = all_named(WORKER, 2), all_named(SCHEDULER, 1)
    with front_end() as opened:
        streams = submit(opened)
        until("they do not begin", lambda: begun(streams))
        first.kill()
        os.kill(scheduler, signal.SIGKILL)
        assert not any(stream.finished for stream in streams), "too short: they died after them"
        second = own(FOREVER_S)
        assert "took over 2 group(s), which have lost their scheduler" in second.said
        assert tokens(streams) == expected
        assert all_named(WORKER, 2) == ranks, "no weights were read again"
        lose_a_rank(opened, ranks, expected)


def test_groups_that_nobody_owns_yet_go_on_coming_up_for_their_owner(
    own: Callable[..., Owner], expected: list[list[int]]
) -> None:
    """As an endpoint begins them beside Serve's start, and as an owner leaves them that dies at its own."""
    wanted = config()
    lasting = Lasting(Estate(NAMESPACE, version(wanted), FOREVER_S))
    for number in range(2):
        GroupHandle(number, 0, wanted, plan(wanted), "text", lasting).begin(time.monotonic() + PATIENCE_S)
    ranks = all_named(WORKER, 2)
    first = own(FOREVER_S, said="2 group(s) are coming up already")
    assert "took over" not in "".join(first.said)
    until("it is not ready", lambda: "ready" in first.said)
    with front_end() as opened:
        assert tokens(submit(opened)) == expected
        assert all_named(WORKER, 2) == ranks, "they are those that were begun"
        lose_a_rank(opened, ranks, expected)


@pytest.mark.usefixtures("own")
def test_what_comes_up_and_finds_no_owner_ends_by_itself() -> None:
    wanted = config(groups=1)
    lasting = Lasting(Estate(NAMESPACE, version(wanted), SOON_S))
    GroupHandle(0, 0, wanted, plan(wanted), "text", lasting).begin(time.monotonic() + PATIENCE_S)
    assert not wait_gone({*all_named(WORKER, 1)}, PATIENCE_S)
    until("a place is still taken", lambda: not placements())


def test_a_group_that_is_cut_off_while_nobody_owns_it_comes_back_with_the_next_owner(
    own: Callable[..., Owner], expected: list[list[int]]
) -> None:
    first = own(FOREVER_S)
    ranks = all_named(WORKER, 2)
    with front_end() as opened:
        streams = submit(opened)
        until("they do not begin", lambda: begun(streams))
        first.kill()
        assert cut(ranks[0]) > 0
        until("the other one does not serve", lambda: tokens(streams) == expected)
        second = own(FOREVER_S)
        assert "took over the scheduler and 2 group(s)" in second.said
        assert tokens(submit(opened)) == expected
        assert all_named(WORKER, 2) == ranks, "no weights were read again"


def test_a_group_that_has_lost_its_place_keeps_the_next_owner_from_nothing(
    own: Callable[..., Owner], expected: list[list[int]]
) -> None:
    """As with its node: the other one serves and is looked after, and it comes back where there is a place again."""
    first = own(FOREVER_S)
    ranks = all_named(WORKER, 2)
    with front_end() as opened:
        first.kill()
        remains = find(NAMESPACE)[version(config())]
        end(NAMESPACE, Found(groups={key: group for key, group in remains.groups.items() if key[0] == 1}))
        place = placement_group([{"CPU": 5}])
        assert place.wait(PATIENCE_S)
        try:
            second = own(FOREVER_S, start_timeout_s=20)
            assert "1 group(s) are ready" in second.said
            (left,) = all_named(WORKER, 1)
            assert left in ranks
            assert tokens(submit(opened)) == expected
        finally:
            remove_placement_group(place)
        until("it does not come back", lambda: len(named(WORKER)) == 2)
        assert tokens(submit(opened)) == expected


def test_all_dies_with_a_node_and_what_finds_a_place_serves_on(own: Callable[..., Owner], expected: list[list[int]]) -> None:
    """Owner, scheduler and groups at once. The next owner gives up where it finds no place for a group, and the one after it
    takes over the other."""
    first = own(FOREVER_S)
    with front_end() as opened:
        streams = submit(opened)
        until("they do not begin", lambda: begun(streams))
        dead = {*all_named(WORKER, 2), *all_named(SCHEDULER, 1)}
        first.kill()
        for process in dead:
            os.kill(process, signal.SIGKILL)
        remains = find(NAMESPACE)[version(config())]
        end(NAMESPACE, Found(groups={key: group for key, group in remains.groups.items() if key[0] == 1}))
        place = placement_group([{"CPU": 5}])
        assert place.wait(PATIENCE_S)
        try:
            second = own(FOREVER_S, said=f"loading {TINY}", start_timeout_s=60)
            assert tokens(streams) == expected
            second.process.wait(PATIENCE_S)
            third = own(FOREVER_S, start_timeout_s=60)
            assert "1 group(s) are ready" in third.said
            assert tokens(submit(opened)) == expected
        finally:
            remove_placement_group(place)
        until("it does not come back", lambda: len(named(WORKER)) == 2)


def test_an_owner_that_was_stopped_ends_once_another_has_come(own: Callable[..., Owner], expected: list[list[int]]) -> None:
    first = own(FOREVER_S)
    ranks, (scheduler,) = all_named(WORKER, 2), all_named(SCHEDULER, 1)
    first.process.send_signal(signal.SIGSTOP)
    second = own(FOREVER_S)
    assert "took over the scheduler and 2 group(s)" in second.said
    os.kill(scheduler, signal.SIGKILL)
    until("there is no other scheduler", lambda: named(SCHEDULER) not in ([], [scheduler]))
    first.process.send_signal(signal.SIGCONT)
    assert first.process.wait(PATIENCE_S) == 1
    assert "another owner has come: this one ends its process" in first.said[-1]
    with front_end() as opened:
        assert tokens(submit(opened)) == expected
    assert all_named(WORKER, 2) == ranks, "it has not touched what is another's"
    assert len(named(SCHEDULER)) == 1


def test_what_nobody_owns_goes_on_for_as_long_as_it_is_used_and_then_ends_by_itself(
    own: Callable[..., Owner], expected: list[list[int]]
) -> None:
    owner = own(SOON_S)
    left = {*all_named(WORKER, 2), *all_named(SCHEDULER, 1)}
    time.sleep(1.5 * SOON_S)
    assert alive(left) == left, "its owner lives"
    with front_end() as opened:
        owner.kill()
        time.sleep(2.0 * SOON_S)
        assert alive(left) == left, "it is used"
        assert tokens(submit(opened)) == expected
    assert not wait_gone(left, PATIENCE_S), "its front end has gone"
    until("a place is still taken", lambda: not placements())


def test_an_owner_that_is_cut_off_owns_what_it_has(own: Callable[..., Owner], expected: list[list[int]]) -> None:
    owner = own(FOREVER_S)
    ranks, (scheduler,) = all_named(WORKER, 2), all_named(SCHEDULER, 1)
    with front_end() as opened:
        streams = submit(opened)
        until("they do not begin", lambda: begun(streams))
        assert cut(owner.process.pid) > 0
        until("it has not noticed", lambda: any("was cut" in line for line in owner.said))
        assert tokens(streams) == expected
        assert (all_named(WORKER, 2), all_named(SCHEDULER, 1)) == (ranks, [scheduler]), "nobody was taken for dead"
        lose_a_rank(opened, ranks, expected)


def test_what_is_not_as_the_next_owner_wants_it_is_not_taken_over(
    own: Callable[..., Owner], expected: list[list[int]]
) -> None:
    first = own(SOON_S)
    old = {*all_named(WORKER, 2), *all_named(SCHEDULER, 1)}
    first.kill()
    owner = own(FOREVER_S, queue_age_s=7)
    assert "took over" not in "".join(owner.said)
    with front_end(queue_age_s=7) as opened:
        assert tokens(submit(opened)) == expected
    assert not wait_gone(old, PATIENCE_S), "they were nobody's, and nobody ever used them"


def test_an_owner_that_wants_fewer_groups_takes_over_all_and_lets_one_run_empty(own: Callable[..., Owner]) -> None:
    own(FOREVER_S, groups=3).kill()
    ranks = all_named(WORKER, 3)
    second = own(FOREVER_S, groups=2)
    assert "took over the scheduler and 3 group(s)" in second.said
    assert {*all_named(WORKER, 2)} < {*ranks}
