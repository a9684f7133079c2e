"""A simulated group keeps the lease protocol, and several steps at once are the same steps one by one."""

import numpy as np

from kvcache.ids import GroupId
from scheduler.config.core import CoreConfig, Resolved
from scheduler.core import SchedulerCore
from scheduler.protocol.messages import NO_TOKEN, Request
from scheduler.protocol.sampling import SamplingParams
from simulator.groups import SimulatedGroup
from simulator.time_model import TimeModel
from workers.loop.batch import ResidentBatch

GROUP = GroupId(0)
TIME = TimeModel(prefill_tokens_per_s=1000.0, decode_step_s=0.01, sequence_s=0.001, context_token_s=1e-6)
BLOCKS, BLOCK, ROWS = 12, 16, 4


class Pair:
    """A core, one group, and what its front end heard: (time, token) by stream."""

    def __init__(self, *, cut_every_step: bool = False) -> None:
        self.core = SchedulerCore(CoreConfig(block_size=BLOCK), Resolved(max_model_len=1024))
        self.core.group_up(GROUP, 0, BLOCKS, ROWS)
        self.group = SimulatedGroup(0, ResidentBatch(ROWS, BLOCK, 32, 256), TIME, self.core.resolved.grant_ahead)
        self.heard: dict[int, list[int]] = {}
        self.ended_s: dict[int, float] = {}
        self.preemptions = 0
        self.reports: list[int] = []
        self.now_s = 0.0
        self._cut = cut_every_step

    def submit(self, stream: int, prompt: int, output: int) -> None:
        tokens = (np.arange(prompt, dtype=np.int32) + 100 * stream).tobytes()
        self.core.submit(0, Request(stream, tokens, b"", SamplingParams(max_tokens=output, seed=stream)))
        self._settle()

    def run(self) -> None:
        while self.group.run is not None:
            if self._cut:
                self.group.take((), self.now_s)
            self.now_s = self.group.run.end_s
            report = self.group.end()
            self.reports.append(report.steps)
            self.core.report(GROUP, report)
            self._settle()
            if self.group.run is None:
                self.group.begin(self.now_s)

    def _settle(self) -> None:
        self.core.check()
        for _, log in self.core.take_logs():
            self.group.take(log.commands, self.now_s)
        if self.group.run is None:
            self.group.begin(self.now_s)
        for _, deltas in self.core.outbox.drain():
            streams = np.frombuffer(deltas.streams, np.int64).tolist()
            if streams:
                for step in np.frombuffer(deltas.tokens, np.int32).reshape(-1, len(streams)).tolist():
                    for stream, token in zip(streams, step, strict=True):
                        if token != NO_TOKEN:
                            self.heard.setdefault(stream, []).append(token)
            for finished in deltas.finished:
                self.ended_s[finished.stream] = self.now_s
                self.preemptions += finished.preemptions
                assert finished.tokens == len(self.heard[finished.stream])


def both(*requests: tuple[int, int]) -> tuple[Pair, Pair]:
    """The same requests with runs, and with one step at a time."""
    pairs = Pair(), Pair(cut_every_step=True)
    for pair in pairs:
        for stream, (prompt, output) in enumerate(requests):
            pair.submit(stream, prompt, output)
        pair.run()
        assert not pair.core.sequences
        assert pair.core.table.pools[GROUP].held == 0
    return pairs


def test_runs_are_the_steps_one_by_one() -> None:
    runs, steps = both((20, 30), (50, 5), (3, 40))
    assert set(steps.reports) == {1}
    assert max(runs.reports) > 4
    assert sum(runs.reports) == len(steps.reports)
    assert runs.heard == steps.heard
    assert [len(tokens) for _, tokens in sorted(runs.heard.items())] == [30, 5, 40]
    for stream, end_s in steps.ended_s.items():
        assert abs(runs.ended_s[stream] - end_s) < 1e-9


def test_a_full_pool_preempts_and_goes_on_with_the_same_tokens() -> None:
    runs, steps = both((40, 60), (40, 60), (40, 60))  # 7 blocks each at the end, 12 in the pool
    assert runs.preemptions > 0
    assert runs.preemptions == steps.preemptions
    assert runs.heard == steps.heard
    assert all(len(tokens) == 60 for tokens in runs.heard.values())


def test_time_is_the_model_s() -> None:
    pair = Pair()
    pair.submit(0, 10, 3)
    pair.run()
    prefill_s = 0.01 + 10 / 1000
    decode_s = 2 * (0.01 + 0.001) + 1e-6 * (11 + 12)
    assert abs(pair.ended_s[0] - (prefill_s + decode_s)) < 1e-9


def test_a_command_cuts_a_run_at_the_end_of_the_step_under_way() -> None:
    pair = Pair()
    pair.submit(0, 2, 6)  # far from a block's end, which would cut the run too
    pair.now_s = pair.group.run.end_s if pair.group.run else 0.0
    pair.core.report(GROUP, pair.group.end())
    pair._settle()
    run = pair.group.run
    assert run is not None
    assert len(run.ends_s) == 5
    middle_s = float(run.ends_s[1] + run.ends_s[2]) / 2
    pair.group.take((), middle_s)
    assert len(run.ends_s) == 3
    report = pair.group.interrupt(middle_s)
    assert report is not None
    assert report.steps == 2, "the third step was not over when the group died"
    assert pair.group.interrupt(1.0) is None
