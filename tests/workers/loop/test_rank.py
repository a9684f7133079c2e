"""The verbs of one rank: plan, execute, commit, with none or one step under way while the next is planned."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from scheduler.protocol.leaders import Adapts, Command, Copy, Drop, End, Moved, Refused, Remap, Report, Start, Trim
from scheduler.protocol.messages import FinishReason
from tests.shared.simulated import SimulatedExecutor, continuation
from tests.workers.loop.test_batch import DIGITS, lease, start
from workers.loop.batch import Launched, ResidentBatch
from workers.loop.leader import SchedulerGone, abandon, begin_turn, follow, lead
from workers.loop.rank import LOOK_S, Executor, Pending, Rank, StepResult, StepTokens
from workers.loop.reports import Reporter


class Recorder:
    """An executor that samples 100, 101, ... and writes down what it was asked for."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self._next = 100

    def admit(self, start: Start) -> None:
        self.calls.append(f"admit {start.lease & 0xFFFF}")

    def release(self, row: int) -> None:
        self.calls.append(f"release {row}")

    def copy(self, source: int, target: int, tokens: int, *, narrow: bool = False) -> None:
        self.calls.append(f"copy {source} {target} {tokens}{' narrow' if narrow else ''}")

    def close(self) -> None:
        self.calls.append("close")

    def execute(self, batch: ResidentBatch, step: Launched) -> "Recorder":
        del batch
        self.calls.append(f"execute {step.plan.rows.tolist()}")
        self._rows = len(step.plan.rows)
        return self

    def done(self) -> bool:
        return True

    def wait(self) -> StepTokens:
        self._next += 1
        return StepTokens(np.full(self._rows, self._next - 1))


def rank(depth: int) -> tuple[Rank, Recorder]:
    recorder = Recorder()
    return Rank(ResidentBatch(3, 4, 64, 32), recorder, depth), recorder


def test_without_depth_each_turn_commits_its_own_step() -> None:
    one, _ = rank(0)
    for position in range(3):
        result = one.turn([start(lease(1, 0), tokens=2)] if position == 0 else [])
        assert result is not None
        assert result.tokens.ids.tolist() == [100 + position]
        assert not one.idle


def test_with_depth_1_the_next_step_is_launched_before_the_last_is_read() -> None:
    one, recorder = rank(1)
    assert one.turn([start(lease(1, 0), tokens=2)]) is None
    assert recorder.calls == ["admit 0", "execute [0]"]
    assert one.turn([]) is not None
    assert recorder.calls == ["admit 0", "execute [0]", "execute [0]"]


@pytest.mark.parametrize("depth", [0, 1])
def test_it_is_idle_when_only_a_command_can_go_on(depth: int) -> None:
    one, _ = rank(depth)
    assert one.idle
    results = [one.turn([start(lease(1, 0), tokens=2, max_tokens=2)] if turn == 0 else []) for turn in range(5)]
    taken = [result for result in results if result is not None]
    assert len(taken) == 2
    assert taken[-1].finished == [(0, FinishReason.LENGTH)]
    assert one.idle


@pytest.mark.parametrize("depth", [0, 1])
def test_a_constrained_row_goes_on_by_itself_once_its_token_is_read(depth: int) -> None:
    """No command comes in between: were the rank idle then, its group would sleep for ever."""
    one, recorder = rank(depth)
    one.turn([start(lease(1, 0), tokens=2, max_tokens=3, grammar=DIGITS)])
    while not one.idle:
        one.turn([])
    assert recorder.calls.count("execute [0]") == 3
    assert recorder.calls[-1] == "release 0"


def test_a_row_is_released_before_its_next_sequence_is_admitted() -> None:
    one, recorder = rank(0)
    one.turn([start(lease(1, 0), tokens=2)])
    one.turn([Drop(lease(1, 0)), start(lease(2, 0), tokens=2)])
    assert recorder.calls == ["admit 0", "execute [0]", "release 0", "admit 0", "execute [0]"]


def test_a_copy_comes_after_the_steps_launched_before_it_and_before_the_next() -> None:
    one, recorder = rank(1)
    one.turn([start(lease(1, 0), tokens=2)])
    one.turn([Copy(0, 3, 1), start(lease(2, 1), tokens=2, cached=1, blocks=(3,))])
    assert recorder.calls == ["admit 0", "execute [0]", "copy 0 3 1", "admit 1", "execute [0, 1]"]


def test_a_step_of_a_dropped_lease_is_committed_as_dead() -> None:
    one, _ = rank(1)
    one.turn([start(lease(1, 0), tokens=2), start(lease(2, 1), tokens=2)])
    result = one.turn([Drop(lease(1, 0))])
    assert result is not None
    assert result.live.tolist() == [False, True]


class Script:
    """A scheduler link: commands from a list, an item each time that it is asked, reports into one. waits: how it was asked."""

    def __init__(self, *turns: list[Command]) -> None:
        self.turns = list(turns)
        self.sent: list[int] = []
        self.waits: list[float] = []

    def receive(self, *, wait_s: float) -> list[Command]:
        self.waits.append(wait_s)
        if not self.turns:
            assert wait_s < math.inf, "an idle group would sleep for ever"
            return []
        return self.turns.pop(0)

    def send(self, message: Report | Moved | Refused | Adapts) -> None:
        self.sent.append(message.epoch)

    def wake(self) -> None:
        self.turns.insert(0, [])


Turn = tuple[Sequence[Command], Sequence[int]]


class Feed:
    """A peer feed and that peer's inbox."""

    def __init__(self) -> None:
        self.turns: list[Turn] = []

    def send(self, commands: Sequence[Command], held: Sequence[int]) -> None:
        self.turns.append((commands, held))

    def receive(self) -> Turn:
        return self.turns.pop(0)


class Compiling:
    """Grammars of which one takes long: so many questions after it was admitted."""

    def __init__(self, row: int, questions: int) -> None:
        self.on_opened: Callable[[], None] = lambda: None
        self._row, self._questions = row, questions

    def opening(self) -> tuple[int, ...]:
        self._questions -= 1
        if self._questions == 0:
            self.on_opened()
        return (self._row,) if self._questions > 0 else ()


@pytest.mark.parametrize("depth", [0, 1])
def test_a_peer_that_makes_the_leader_s_turns_has_the_leader_s_batch(depth: int) -> None:
    def simulated() -> Rank:
        return Rank(ResidentBatch(3, 4, 5, 32), SimulatedExecutor(8, 4, 3, 5), depth)

    leader, peer = simulated(), simulated()
    first, second = start(lease(1, 0), max_tokens=3), start(lease(2, 1), blocks=(4, 5))
    script = Script([first], [], [second], [], [], [], [Drop(lease(2, 1))], [End("done")])
    feed = Feed()
    assert lead(leader, script, feed, Reporter(0)) == "done"
    assert script.sent
    assert follow(peer, feed) == "done"
    for name in ("lease", "known", "computed", "granted"):
        assert (getattr(leader.batch, name) == getattr(peer.batch, name)).all()
    assert (leader.batch.full.ids == peer.batch.full.ids).all()


@dataclass
class Late:
    """A step that is done when it has been asked so often."""

    pending: Pending
    asked: int
    on_read: Callable[[], None]

    def done(self) -> bool:
        self.asked -= 1
        return self.asked < 0

    def wait(self) -> StepTokens:
        self.on_read()
        return self.pending.wait()


class Device:
    """An executor whose steps take a while. asked: how often each is asked before it is done. events: what was launched and
    read, by the step's number, and what was admitted, by row."""

    def __init__(self, executor: Executor, asked: int) -> None:
        self.events: list[str] = []
        self._executor, self._asked = executor, asked
        self._steps = itertools.count()
        self.release, self.copy, self.close = executor.release, executor.copy, executor.close

    def admit(self, start: Start) -> None:
        self.events.append(f"admit {start.lease & 0xFFFF}")
        self._executor.admit(start)

    def execute(self, batch: ResidentBatch, step: Launched) -> Late:
        number = next(self._steps)
        self.events.append(f"launch {number}")
        pending = self._executor.execute(batch, step)
        return Late(pending, self._asked, lambda: self.events.append(f"read {number}"))


def on_device(asked: int, depth: int = 1, budget: int = 64) -> tuple[Rank, Device]:
    device = Device(SimulatedExecutor(8, 4, 3, 50), asked)
    return Rank(ResidentBatch(3, 4, budget, 32), device, depth), device


def test_what_comes_while_all_there_is_to_compute_is_under_way_is_launched_before_that_is_read() -> None:
    leader, device = on_device(asked=5)
    first, second = start(lease(1, 0), tokens=2, max_tokens=1), start(lease(2, 1), tokens=2, blocks=(2, 3), max_tokens=1)
    script = Script([first], [], [], [], [second], *[[]] * 8, [End("done")])
    assert lead(leader, script, Feed(), Reporter(0)) == "done"
    assert device.events == ["admit 0", "launch 0", "admit 1", "launch 1", "read 0", "read 1"]


@pytest.mark.parametrize("taken", [Drop(lease(2, 1)), Remap(lease(2, 1), 0, 5), Trim(lease(2, 1), 1)])
@pytest.mark.parametrize("waits", [0, 2])
def test_what_only_takes_is_no_reason_to_wait_for_the_step_under_way(taken: Command, waits: int) -> None:
    """It is applied with what comes after it, in the order of the log."""
    leader, device = on_device(asked=9)
    first, second, third = (start(lease(at, at - 1), tokens=2, blocks=(2 * at, 2 * at + 1), max_tokens=1) for at in (1, 2, 3))
    script = Script([first, second], *[[]] * waits, [taken], [], [], [third], *[[]] * 12, [End("done")])
    assert lead(leader, script, Feed(), Reporter(0)) == "done"
    assert device.events == ["admit 0", "admit 1", "launch 0", "admit 2", "launch 1", "read 0", "read 1"]


def test_a_step_that_is_done_is_read_though_nothing_has_come() -> None:
    leader, device = on_device(asked=3)
    script = Script([start(lease(1, 0), tokens=2, max_tokens=1)], *[[]] * 5, [End("done")])
    assert lead(leader, script, Feed(), Reporter(0)) == "done"
    assert device.events == ["admit 0", "launch 0", "read 0"]
    assert script.waits == [math.inf, 0.0, *[LOOK_S] * 3, 0.0, math.inf]


def test_nobody_looks_out_for_commands_while_there_is_more_to_compute() -> None:
    leader, device = on_device(asked=100, budget=2)
    script = Script([start(lease(1, 0), tokens=7, max_tokens=1)], [], [], [], [], *[[]] * 200, [End("done")])
    assert lead(leader, script, Feed(), Reporter(0)) == "done"
    assert script.waits[:4] == [math.inf, 0.0, 0.0, 0.0], "three chunks of two, and the last"
    assert device.events[:6] == ["admit 0", "launch 0", "launch 1", "read 0", "launch 2", "read 1"]


def test_what_waits_for_a_grammar_is_not_looked_out_from() -> None:
    """A row that is held has work: once its grammar is there it is planned at once, without a command."""
    leader, _ = on_device(asked=100)
    leader.grammars = Compiling(0, 3)
    script = Script([start(lease(1, 0), tokens=6, max_tokens=1, grammar=DIGITS)], *[[]] * 200, [End("done")])
    assert lead(leader, script, Feed(), Reporter(0)) == "done"
    assert LOOK_S not in script.waits[:4]


def test_a_loop_that_looks_out_is_in_a_step_all_the_while() -> None:
    """Else a device that never ends it would keep the group in silence that nobody counts."""
    leader, device = on_device(asked=4)
    assert leader.turn([start(lease(1, 0), tokens=2, max_tokens=1)]) is None
    assert leader.pulse.busy() == (0.0, 0.0)
    busy: list[tuple[float, float]] = []

    def look(wait_s: float) -> list[Command]:
        assert wait_s == LOOK_S
        busy.append(leader.pulse.busy())
        return []

    assert leader.look_out([], look) == []
    assert len(busy) == 4
    assert all(patience_s > 0.0 for _, patience_s in busy)
    assert [took_s for took_s, _ in busy] == sorted(took_s for took_s, _ in busy)
    assert leader.pulse.busy()[0] >= busy[-1][0], "what follows is the same turn"
    assert leader.turn([]) is not None
    assert leader.pulse.busy() == (0.0, 0.0)
    assert device.events[-1] == "read 0"


def test_a_scheduler_that_goes_while_it_is_listened_for_leaves_a_batch_that_can_be_emptied() -> None:
    leader, device = on_device(asked=9)
    script = Script([start(lease(1, 0), tokens=2, max_tokens=1)], [], [])

    def gone(*, wait_s: float) -> list[Command]:
        if not script.turns:
            raise SchedulerGone("it has gone")
        return Script.receive(script, wait_s=wait_s)

    script.receive = gone  # type: ignore[method-assign]
    feed = Feed()
    with pytest.raises(SchedulerGone):
        lead(leader, script, feed, Reporter(0))
    assert device.events[-1] == "launch 0"
    abandon(leader, feed)
    assert device.events[-1] == "read 0"
    assert leader.idle
    assert leader.batch.lease.tolist() == [-1] * 3


@pytest.mark.parametrize("asked", [0, 1, 2, 7])
@pytest.mark.parametrize("peer_asked", [0, 5])
def test_peers_need_not_look_out_to_make_the_leader_s_turns(asked: int, peer_asked: int) -> None:
    """Whether a step is done is each device's own; which turn commits it is the leader's word."""
    (leader, device), (peer, peer_device), feed = on_device(asked), on_device(peer_asked), Feed()
    first, second = start(lease(1, 0), tokens=5, max_tokens=2), start(lease(2, 1), tokens=3, blocks=(4, 5), max_tokens=3)
    script = Script([first], [], [second], [], [], [], [Drop(lease(2, 1))], *[[]] * 30, [End("done")])
    assert lead(leader, script, feed, Reporter(0)) == "done"
    assert follow(peer, feed) == "done"
    for name in ("lease", "known", "computed", "granted"):
        assert (getattr(leader.batch, name) == getattr(peer.batch, name)).all()
    assert (leader.batch.full.ids == peer.batch.full.ids).all()
    assert device.events == peer_device.events


@pytest.mark.parametrize("depth", [0, 1])
def test_a_row_whose_grammar_is_being_compiled_holds_up_nobody_on_any_rank(depth: int) -> None:
    """It computes what it can and sits out, until the leader says that it is ready: peers are told, however fast they are."""

    def simulated(grammars: Compiling | None = None) -> Rank:
        return Rank(ResidentBatch(3, 4, 64, 32), SimulatedExecutor(8, 4, 3, 5), depth, grammars)

    leader, peer, feed = simulated(Compiling(1, 6)), simulated(), Feed()
    slow = start(lease(2, 1), tokens=6, blocks=(4, 5), max_tokens=2, grammar=DIGITS)
    quick = start(lease(1, 0), tokens=2, blocks=(0, 1), max_tokens=4)
    script = Script([quick, slow], [], [], [], [], [], [], [], [], [], [End("done")])
    steps: list[list[int]] = []
    execute = leader.executor.execute

    def watch(batch: ResidentBatch, step: Launched) -> Pending:
        steps.append(step.plan.rows[step.samples].tolist())
        return execute(batch, step)

    leader.executor.execute = watch  # type: ignore[method-assign]
    assert lead(leader, script, feed, Reporter(0)) == "done"
    assert steps[:4] == [[0]] * 4, "all that the other one wanted"
    assert [rows for rows in steps[4:] if rows] == [[1], [1]]
    assert [list(held) for _, held in feed.turns[:6]] == [[1]] * 5 + [[]]
    assert follow(peer, feed) == "done"
    for name in ("lease", "known", "computed", "granted"):
        assert (getattr(leader.batch, name) == getattr(peer.batch, name)).all()
    assert (leader.batch.full.ids == peer.batch.full.ids).all()


def test_peers_are_told_before_the_leader_applies_unless_a_grammar_has_to_be_looked_at_first() -> None:
    leader, recorder = rank(1)

    class Noting(Feed):
        def send(self, commands: Sequence[Command], held: Sequence[int]) -> None:
            super().send(commands, held)
            if commands:
                recorder.calls.append(f"tell {[*held]}")

    def told(*commands: Command) -> list[str]:
        recorder.calls.clear()
        leader.step(begin_turn(leader, Noting(), commands))
        return [call for call in recorder.calls if not call.startswith("execute")]

    leader.grammars = None
    assert told(start(lease(1, 0), tokens=2)) == ["tell []", "admit 0"]
    leader.grammars = Compiling(1, 9)
    assert told(start(lease(2, 1), tokens=2, grammar=DIGITS)) == ["admit 1", "tell [1]"]
    assert told(Drop(lease(1, 0))) == ["tell [1]", "release 0"]


def results(one: Rank, commands: list[Command], turns: int) -> list[StepResult]:
    made = [one.turn(commands if turn == 0 else []) for turn in range(turns)]
    return [result for result in made if result is not None]


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("budget", [1, 3, 5, 64])
def test_the_simulated_group_s_tokens_depend_on_nothing_but_the_tokens_before(depth: int, budget: int) -> None:
    executor = SimulatedExecutor(8, 4, 3, vocabulary=50)
    one = Rank(ResidentBatch(3, 4, budget, 32), executor, depth)
    made = results(one, [start(lease(1, 1), tokens=7, blocks=(5, 2, 7), max_tokens=5)], 20)
    sampled = [int(result.tokens.ids[0]) for result in made if result.step.samples[0]]
    assert sampled == continuation(list(range(7)), 5, 50)
