"""Reports: which steps travel together, how they are numbered, and what they say of each lease."""

import math
from collections.abc import Sequence

import numpy as np

from scheduler.batching import StepPlan
from scheduler.protocol.leaders import Adapts, Command, End, ExpertLoad, Moved, Refused, Report
from scheduler.protocol.messages import NO_TOKEN, FinishReason
from tests.shared.simulated import SimulatedExecutor
from tests.workers.loop.test_batch import lease, start
from workers.loop.batch import Launched, ResidentBatch
from workers.loop.leader import lead
from workers.loop.rank import Rank, StepResult, StepTokens
from workers.loop.reports import Reporter


def result(
    leases: list[int],
    tokens: list[int],
    *,
    counts: list[int] | None = None,
    live: list[bool] | None = None,
    finished: tuple[tuple[int, FinishReason], ...] = (),
    logprobs: tuple[tuple[int, bytes], ...] = (),
) -> StepResult:
    """tokens: NO_TOKEN where the step took no sample."""
    n = len(leases)
    plan = StepPlan(np.arange(n), np.array(counts or [1] * n, np.int64), n)
    samples = np.array([token != NO_TOKEN for token in tokens], bool)
    ids = np.where(samples, tokens, 12345)  # any value where none was sampled
    step = Launched(plan, np.array(leases, np.int64), np.zeros(n, np.int64), samples)
    alive = np.array([True] * n if live is None else live, bool)
    return StepResult(step, StepTokens(ids, logprobs), alive, list(finished))


def ints(buffer: bytes, dtype: type = np.int32) -> list[int]:
    values: list[int] = np.frombuffer(buffer, dtype).tolist()
    return values


def gather(reporter: Reporter, *results: StepResult, flush: bool = False) -> list[Report]:
    for applied, each in enumerate(results, 1):
        reporter.add(each, applied)
    return reporter.take(flush=flush)


def test_one_step_a_report_numbered_from_0() -> None:
    now = iter([0.0, 0.5, 0.75])
    reports = gather(Reporter(3, 1, lambda: next(now)), result([8, 9], [1, 2]), result([8, 9], [3, 4]))
    numbers = [(report.epoch, report.number, report.applied, report.steps) for report in reports]
    assert numbers == [(3, 0, 1, 1), (3, 1, 2, 1)]
    assert [report.elapsed_s for report in reports] == [0.5, 0.25]
    assert ints(reports[0].leases, np.int64) == [8, 9]
    assert (reports[0].computed, ints(reports[0].tokens)) == (b"", [1, 2])


def test_a_report_brings_what_is_to_be_told_of_experts() -> None:
    told = iter([None, ExpertLoad((0, 2), bytes(32)), None])
    reports = gather(Reporter(0, 1, expert_load=lambda: next(told)), *(result([8], [at]) for at in range(3)))
    assert [report.expert_load for report in reports] == [None, ExpertLoad((0, 2), bytes(32)), None]


def test_decode_steps_of_the_same_leases_travel_together() -> None:
    steps = [result([8, 9], [at, -at - 2]) for at in range(1, 6)]
    reporter = Reporter(0, 3)
    first = gather(reporter, *steps)
    assert [report.steps for report in first] == [3]
    assert ints(first[0].tokens) == [1, -3, 2, -4, 3, -5]
    rest = reporter.take(flush=True)
    assert [(report.number, report.steps) for report in rest] == [(1, 2)]
    assert reporter.take(flush=True) == []


def test_other_leases_end_a_report() -> None:
    reports = gather(Reporter(0, 9), result([8, 9], [1, 2]), result([8], [3]), result([8], [4]), flush=True)
    told = [(ints(report.leases, np.int64), ints(report.tokens)) for report in reports]
    assert told == [([8, 9], [1, 2]), ([8], [3, 4])]


def test_a_prefill_chunk_travels_alone_with_what_was_computed() -> None:
    chunk = result([8, 9], [5, NO_TOKEN], counts=[1, 4])
    reports = gather(Reporter(0, 9), result([8, 9], [1, 2]), chunk, result([8, 9], [6, 7]), flush=True)
    assert [report.steps for report in reports] == [1, 1, 1]
    assert ints(reports[1].computed) == [1, 4]
    assert ints(reports[1].tokens) == [5, NO_TOKEN]
    assert [reports[0].computed, reports[2].computed] == [b"", b""]


def test_a_chunk_of_one_token_without_a_sample_is_no_decode() -> None:
    (report,) = gather(Reporter(0, 9), result([8], [NO_TOKEN], counts=[1]))
    assert ints(report.computed) == [1]


def test_an_end_closes_the_report_of_its_step() -> None:
    ending = result([8, 9], [3, 4], finished=((1, FinishReason.STOP),))
    reports = gather(Reporter(0, 9), result([8, 9], [1, 2]), ending)
    assert [(report.steps, report.finished) for report in reports] == [(2, ((9, int(FinishReason.STOP)),))]


def test_ended_leases_are_left_out() -> None:
    dead = result([7, 8, 9], [1, 2, 3], live=[False, True, True], finished=((2, FinishReason.LENGTH),))
    (report,) = gather(Reporter(0, 1), dead)
    assert ints(report.leases, np.int64) == [8, 9]
    assert ints(report.tokens) == [2, 3]
    assert report.finished == ((9, int(FinishReason.LENGTH)),)


def test_a_step_of_which_nobody_is_left_is_not_reported() -> None:
    reporter = Reporter(0, 4)
    assert gather(reporter, result([7], [1], live=[False]), flush=True) == []
    assert [report.number for report in gather(reporter, result([8], [1]), flush=True)] == [0]


def test_a_step_of_which_nobody_is_left_closes_what_was_gathered() -> None:
    reports = gather(Reporter(0, 4), result([8], [1]), result([8], [2], live=[False]), flush=True)
    assert [ints(report.tokens) for report in reports if report.leases] == [[1]]


def test_log_probabilities_name_their_lease_and_those_of_the_dead_are_left_out() -> None:
    steps = (
        result([7, 8, 9], [1, 2, 3], logprobs=((0, b"a"), (2, b"b"))),
        result([7, 8, 9], [4, 5, 6], logprobs=((0, b"c"),)),
        result([7, 8, 9], [7, 8, 9], live=[False, True, True], logprobs=((0, b"d"), (1, b"e"))),
    )
    reports = gather(Reporter(0, 2), *steps, flush=True)
    assert [report.logprobs for report in reports] == [((7, b"a"), (9, b"b"), (7, b"c")), ((8, b"e"),)]


def test_no_step_is_kept_back_for_longer_than_said() -> None:
    now = [0.0]
    reporter = Reporter(0, 100, lambda: now[0], hold_s=0.004)
    sent = []
    for step in range(8):
        now[0] += 0.0015
        reporter.add(result([8], [step]), step)
        sent.append([report.steps for report in reporter.take(flush=False)])
    assert sent == [[], [], [3], [], [], [3], [], []]


class Sleeper:
    """The leader's link: sleeps for 100 s before each command, on a clock of its own."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.sent: list[Report] = []
        self.commands: list[list[Command]] = [[start(lease(1, 0), 6, max_tokens=2)], [End("enough")]]

    def receive(self, *, wait_s: float) -> list[Command]:
        if wait_s < math.inf:
            self.now_s += 0.01  # a step
            return []
        self.now_s += 100.0
        return self.commands.pop(0)

    def send(self, message: Report | Moved | Refused | Adapts) -> None:
        assert isinstance(message, Report)
        self.sent.append(message)

    def wake(self) -> None:
        """Nobody calls."""


class Alone:
    """A group of one rank has no peers."""

    def send(self, commands: Sequence[Command], held: Sequence[int]) -> None: ...


def test_a_group_s_sleep_is_no_step() -> None:
    """Routing weighs moves by what steps took, and operators read the same figure."""
    link = Sleeper()
    rank = Rank(ResidentBatch(2, 4, 64, 32), SimulatedExecutor(8, 4, 2, 50))
    assert lead(rank, link, Alone(), Reporter(0, clock=lambda: link.now_s)) == "enough"
    assert sum(report.steps for report in link.sent) == 2
    assert sum(report.elapsed_s for report in link.sent) < 1.0
