"""What the scheduler costs: one decode step's bookkeeping, taking in one prompt, choosing a victim. No sockets, no workers.

A step is the whole central path of one report: tokens committed, filled blocks published, grants issued, ends committed,
the commands and the deltas of four front ends handed out. A submit is hashing, matching, routing over four groups,
reserving and the start command. The garbage collector runs as it does in the scheduler actor.

    python -m benchmarks.scheduler --json

May import `kvcache` and `scheduler`; no torch, no ray.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from benchmarks.shared.report import figure, table
from kvcache.ids import GroupId
from scheduler.config.core import CoreConfig, Resolved
from scheduler.core import SchedulerCore
from scheduler.leases import find_victim
from scheduler.protocol.leaders import ROW_MASK, Grant, Moved, Remap, Report, Start
from scheduler.protocol.messages import FinishReason, Request
from scheduler.protocol.sampling import SamplingParams

SIZES = (64, 256, 1024)
HITS = (0, 50, 100)
PART_TOKENS = 100
"""Of the block after a hit of half the prompt: a hit that ends inside a block."""
FRONT_ENDS = 4
GROUPS = 4
PROMPT_TOKENS = 4096
VOCABULARY = 32_768
OUTPUT_TOKENS = (128, 1024)
FEWEST_STEPS = 256


class DecodingGroup:
    """One group that keeps `size` sequences decoding: whoever ends is replaced off the clock, by a prompt of one token.

    Lengths are staggered: prompts of up to two blocks, outputs of 128 to 1,024 tokens, a part of which the first
    sequences have behind them. The pool is about as large as what runs, so that published blocks are also evicted.
    clock: in nanoseconds; that of the thread (`time.thread_time_ns`) where others use the machine too.
    """

    def __init__(self, size: int, block_size: int, seed: int, clock: Callable[[], int] = time.perf_counter_ns) -> None:
        self._clock = clock
        self._random = np.random.default_rng(seed)
        blocks = -(-(sum(OUTPUT_TOKENS) // 2 + block_size) // block_size)
        self.group = GroupId(0)
        self.core = SchedulerCore(CoreConfig(block_size=block_size), Resolved(max_model_len=1 << 16))
        self.core.group_up(self.group, 0, size * (blocks + 2), size)
        self._streams = itertools.count()
        self._report = itertools.count()
        self._leases = np.zeros(size, np.int64)
        self._left = np.zeros(size, np.int64)
        for _ in range(size):
            self._submit(int(self._random.integers(1, 2 * block_size)), int(self._random.integers(2, OUTPUT_TOKENS[1])))
        lengths = self._take_starts()
        self.core.report(self.group, self._next_report(np.array(lengths, np.int32).tobytes()))
        self._left -= 1
        self.core.outbox.drain()

    def step(self) -> int:
        """Commits one token of each sequence. Returns the nanoseconds that this took."""
        self._left -= 1
        report = self._next_report(b"")
        core = self.core
        begin = self._clock()
        core.report(self.group, report)
        logs = core.take_logs()
        deltas = core.outbox.drain()
        elapsed = self._clock() - begin
        assert len(deltas) == FRONT_ENDS or len(self._leases) < FRONT_ENDS
        assert all(isinstance(command, Grant | Remap) for _, log in logs for command in log.commands)
        for _ in report.finished:
            self._submit(1, int(self._random.integers(*OUTPUT_TOKENS)))
        self._take_starts()
        return elapsed

    def _submit(self, prompt: int, output: int) -> None:
        stream = next(self._streams)
        tokens = self._random.integers(0, VOCABULARY, prompt).astype(np.int32).tobytes()
        self.core.submit(stream % FRONT_ENDS, Request(stream, tokens, b"", SamplingParams(max_tokens=output)))

    def _take_starts(self) -> list[int]:
        starts = [command for _, log in self.core.take_logs() for command in log.commands if isinstance(command, Start)]
        for start in starts:
            row = start.lease & ROW_MASK
            self._leases[row], self._left[row] = start.lease, start.max_tokens
        return [len(start.tokens) // 4 for start in starts]

    def _next_report(self, computed: bytes) -> Report:
        ended = np.flatnonzero(self._left == 0)
        return Report(
            epoch=0, number=next(self._report), applied=0, steps=1, leases=self._leases.tobytes(), computed=computed,
            tokens=self._random.integers(0, VOCABULARY, len(self._leases)).astype(np.int32).tobytes(),
            finished=tuple((lease, int(FinishReason.LENGTH)) for lease in self._leases[ended].tolist()),
        )  # fmt: skip


def time_steps(
    size: int, block_size: int, steps: int, rounds: int, clock: Callable[[], int] = time.perf_counter_ns
) -> list[list[int]]:
    """[rounds][steps] nanoseconds."""
    group = DecodingGroup(size, block_size, size, clock)
    for _ in range(FEWEST_STEPS):
        group.step()
    return [[group.step() for _ in range(steps)] for _ in range(rounds)]


class Intake:
    """Four idle groups, of which the first holds in its cache what `hit` percent of each prompt need, and `part` tokens more.

    fetch: the first group takes nobody in, so that its prefix is fetched by another, if that is decided.
    """

    def __init__(self, hit: int, block_size: int, *, part: int = 0, fetch: bool = False) -> None:
        self._random = np.random.default_rng(hit)
        self._stream = itertools.count()
        self.core = SchedulerCore(CoreConfig(block_size=block_size), Resolved(max_model_len=1 << 16))
        for group in range(GROUPS):
            ports = ("",) if fetch else ()
            self.core.group_up(GroupId(group), 0, 64 * PROMPT_TOKENS // block_size, 256, ports=ports)
        self._common = self._draw(PROMPT_TOKENS * hit // 100 + part)
        if hit:
            self._compute(np.append(self._common, np.int32(0)))
        self.core.groups[GroupId(0)].set_draining(fetch)

    def submit(self) -> int:
        """Takes one prompt in; it is aborted afterwards, off the clock. Returns the nanoseconds of the submit."""
        prompt = np.append(self._common, self._draw(PROMPT_TOKENS - len(self._common)))
        stream = next(self._stream)
        request = Request(stream, prompt.tobytes(), b"", SamplingParams())
        begin = time.perf_counter_ns()
        self.core.submit(0, request)
        self.core.take_logs()
        elapsed = time.perf_counter_ns() - begin
        self.core.abort(0, stream)
        for transfer in self.core.transfers.under_way():  # it has not arrived: nobody else gets the prefix
            for group in (transfer.source, transfer.target):
                self.core.moved(group, Moved(0, transfer.number, False))
        self.core.take_logs()
        self.core.outbox.drain()
        return elapsed

    def _draw(self, tokens: int) -> npt.NDArray[np.int32]:
        return self._random.integers(0, VOCABULARY, tokens).astype(np.int32)

    def _compute(self, prompt: npt.NDArray[np.int32]) -> None:
        """Has the first group compute a prompt, so that its blocks are cached there."""
        self.core.submit(0, Request(next(self._stream), prompt.tobytes(), b"", SamplingParams(max_tokens=1)))
        ((_, log),) = self.core.take_logs()
        start = log.commands[0]
        assert isinstance(start, Start)
        leases, computed = np.array([start.lease], np.int64), np.array([len(prompt)], np.int32)
        finished = ((int(start.lease), int(FinishReason.LENGTH)),)
        token = np.zeros(1, np.int32).tobytes()
        self.core.report(GroupId(0), Report(0, 0, 1, 1, leases.tobytes(), computed.tobytes(), token, finished))
        self.core.outbox.drain()


class Crowd:
    """A group in need of a block: who runs there shares a prefix with the others, and with another group, and has blocks of its
    own. That is the dearest case: how many blocks are shared is looked up for each."""

    def __init__(self, size: int, block_size: int) -> None:
        self._random = np.random.default_rng(size)
        self._streams = itertools.count()
        self.core = SchedulerCore(CoreConfig(block_size=block_size, wait_for_prefix=False), Resolved(max_model_len=1 << 16))
        self.home, self.other = GroupId(0), GroupId(1)
        for group in (self.home, self.other):
            self.core.group_up(group, 0, (size + 2) * (PROMPT_TOKENS // block_size + 4), size)
        common = self._draw(PROMPT_TOKENS // 2)
        for group, draining in ((self.other, self.home), (self.home, self.other)):
            self.core.groups[draining].set_draining(True)
            self._submit(np.append(common, self._draw(1)))
            self._compute(group, ends=True)
            self.core.groups[draining].set_draining(False)
        self.core.groups[self.other].set_draining(True)
        for _ in range(size):
            self._submit(np.append(common, self._draw(int(self._random.integers(1, PROMPT_TOKENS // 2)))))
        self._compute(self.home, ends=False)

    def choose(self) -> int:
        """The first in the order of service needs a block. Returns the nanoseconds of finding who gives way."""
        group = self.core.groups[self.home]
        needy = min(group.running)
        begin = time.perf_counter_ns()
        victim = find_victim(self.core.table, group, needy)
        elapsed = time.perf_counter_ns() - begin
        assert victim is not None
        return elapsed

    def _draw(self, tokens: int) -> npt.NDArray[np.int32]:
        return self._random.integers(0, VOCABULARY, tokens).astype(np.int32)

    def _submit(self, prompt: npt.NDArray[np.int32]) -> None:
        params = SamplingParams(max_tokens=OUTPUT_TOKENS[1])
        self.core.submit(0, Request(next(self._streams), prompt.tobytes(), b"", params))

    def _compute(self, name: GroupId, *, ends: bool) -> None:
        """All that has started there is computed, in one step."""
        group = self.core.groups[name]
        log = group.drain()
        assert log is not None
        starts = [command for command in log.commands if isinstance(command, Start)]
        leases = np.array([start.lease for start in starts], np.int64)
        computed = np.array([len(start.tokens) // 4 - start.cached_tokens for start in starts], np.int32)
        finished = tuple((int(start.lease), int(FinishReason.LENGTH)) for start in starts) if ends else ()
        tokens = self._draw(len(starts)).tobytes()
        number = group.reports
        self.core.report(name, Report(0, number, number, 1, leases.tobytes(), computed.tobytes(), tokens, finished))
        self.core.outbox.drain()


def time_victims(size: int, block_size: int, choices: int, rounds: int) -> list[list[int]]:
    """[rounds][choices] nanoseconds."""
    crowd = Crowd(size, block_size)
    return [[crowd.choose() for _ in range(choices)] for _ in range(rounds)]


def time_submits(hit: int, block_size: int, submits: int, rounds: int) -> list[list[int]]:
    """[rounds][submits] nanoseconds."""
    intake = Intake(hit, block_size)
    for _ in range(submits):
        intake.submit()
    return [[intake.submit() for _ in range(submits)] for _ in range(rounds)]


def time_parts(block_size: int, submits: int, rounds: int) -> dict[str, list[list[int]]]:
    """By what happens, [rounds][submits] nanoseconds."""
    half = HITS[1]
    cases = {
        "50%, inside a block": Intake(half, block_size, part=min(PART_TOKENS, block_size - 1)),
        "50%, fetched": Intake(half, block_size, fetch=True),
    }
    times = {}
    for name, intake in cases.items():
        for _ in range(submits):
            intake.submit()
        counters = intake.core.counters
        assert counters.parts_copied + counters.parts_taken > 0 or counters.failed_transfers > 0
        times[name] = [[intake.submit() for _ in range(submits)] for _ in range(rounds)]
    return times


def summary(rounds: list[list[int]]) -> tuple[float, float]:
    """(median of the rounds' means, 99th percentile of all), in microseconds."""
    every = [elapsed for each in rounds for elapsed in each]
    return statistics.median(statistics.fmean(each) for each in rounds) / 1000, float(np.percentile(every, 99)) / 1000


def measure(block_size: int, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Prints the tables for one block size and returns their figures."""
    steps = {str(size): summary(time_steps(size, block_size, options.steps, options.rounds)) for size in SIZES}
    submits = {str(hit): summary(time_submits(hit, block_size, options.steps, options.rounds)) for hit in HITS}
    victims = {str(size): summary(time_victims(size, block_size, options.steps, options.rounds)) for size in SIZES}
    parts = {name: summary(times) for name, times in time_parts(block_size, options.steps, options.rounds).items()}
    print(f"\npages of {block_size} tokens")
    rows = [[f"{size} running", figure(mean), figure(p99)] for size, (mean, p99) in steps.items()]
    print(table(["decode step", "mean us", "p99 us"], rows))
    rows = [[f"{hit}% cached", figure(mean), figure(p99)] for hit, (mean, p99) in submits.items()]
    rows += [[name, figure(mean), figure(p99)] for name, (mean, p99) in parts.items()]
    print(table([f"submit of {PROMPT_TOKENS} tokens", "mean us", "p99 us"], rows))
    rows = [[f"{size} running", figure(mean), figure(p99)] for size, (mean, p99) in victims.items()]
    print(table(["choice of a victim", "mean us", "p99 us"], rows))
    return {
        "step_us": {size: round(mean, 1) for size, (mean, _) in steps.items()},
        "step_p99_us": {size: round(p99, 1) for size, (_, p99) in steps.items()},
        "submit_us": {hit: round(mean, 1) for hit, (mean, _) in submits.items()},
        "submit_p99_us": {hit: round(p99, 1) for hit, (_, p99) in submits.items()},
        "parts_us": {name: round(mean, 1) for name, (mean, _) in parts.items()},
        "victim_us": {size: round(mean, 1) for size, (mean, _) in victims.items()},
        "victim_p99_us": {size: round(p99, 1) for size, (_, p99) in victims.items()},
    }


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time the scheduler: a decode step, a submit, a victim.")
    parser.add_argument("--steps", type=int, default=512, help="steps, and submits, in a round, 256 at least (512)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, whose median mean counts (default: 5)")
    parser.add_argument("--block-size", type=int, default=256, help="tokens in a block (default: 256)")
    parser.add_argument("--small-block-size", type=int, default=16, help="tokens in a block of the variant (default: 16)")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()
    if options.steps < FEWEST_STEPS or options.rounds < 1:
        parser.error(f"--steps must be at least {FEWEST_STEPS} and --rounds at least 1")
    return options


def main() -> None:
    options = parse_options()
    result: dict[str, object] = dict(measure(options.block_size, options))
    small = options.small_block_size
    result[f"block_{small}"] = measure(small, options)
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
