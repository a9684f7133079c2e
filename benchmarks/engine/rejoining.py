"""What it costs that a group outlives its scheduler: a ledger in its leader's step loop, and the greeting of the next one.

The step loop's host side alone: plans, commits and the ledger are real, the executor is none. A step is a decode of all rows,
with one under way as on a GPU; mean over all, those included in which the ledger works off what it has noted. CPU time of the
thread: the figures are those of a machine that does nothing else.

    python -m benchmarks.engine.rejoining --rounds 5

May import `kvcache`, `scheduler` and `workers.loop`; no torch, no ray.
"""

import argparse
import time
from collections.abc import Callable
from typing import TypeVar

import msgspec
import numpy as np

from benchmarks.shared.report import Spread, table
from kvcache.ids import GroupId
from kvcache.table import BlockTable
from scheduler.protocol.inventory import blocks_of, parts
from scheduler.protocol.leaders import ROW_BITS, Inventory, LeaseId, Start
from scheduler.protocol.sampling import SamplingParams
from workers.loop.batch import Launched, ResidentBatch
from workers.loop.ledger import Ledger
from workers.loop.rank import Rank, StepTokens

ROWS = (1, 64, 256)
PROMPT_TOKENS = 512
STEPS = 1024
POOL_BLOCKS = 20_000

T = TypeVar("T")


class NoExecutor:
    """Every row samples the same token at once."""

    def admit(self, start: Start) -> None: ...
    def release(self, row: int) -> None: ...
    def copy(self, source: int, target: int, tokens: int, *, narrow: bool = False) -> None: ...
    def close(self) -> None: ...

    def execute(self, batch: ResidentBatch, step: Launched) -> "NoExecutor":
        del batch
        self._tokens = StepTokens(np.full(len(step.plan.rows), 5, np.int64))
        return self

    def done(self) -> bool:
        return True

    def wait(self) -> StepTokens:
        return self._tokens


def make_rank(rows: int, block_size: int, tokens: int, *, ledger: bool) -> tuple[Rank, list[Start]]:
    """A rank for so many rows of so many tokens, half of them prompt, and how they start."""
    blocks = tokens // block_size + 1
    batch = ResidentBatch(rows, block_size, rows * tokens, blocks * block_size)
    rank = Rank(batch, NoExecutor(), depth=1)
    if ledger:
        rank.ledger = Ledger(batch, rows * blocks)
    random = np.random.default_rng(0)
    params = SamplingParams(max_tokens=tokens)
    return rank, [
        Start(
            LeaseId(row + 1 << ROW_BITS | row), random.integers(0, 100_000, PROMPT_TOKENS, np.int32).tobytes(), PROMPT_TOKENS,
            0, np.arange(row * blocks, (row + 1) * blocks, dtype=np.int32).tobytes(), params, 0, 0, (), tokens,
        )
        for row in range(rows)
    ]  # fmt: skip


def timed(call: Callable[[], T]) -> tuple[float, T]:
    """Seconds of this thread, and what it returned."""
    began_s = time.thread_time()
    result = call()
    return time.thread_time() - began_s, result


def loop_us(rows: int, block_size: int, *, ledger: bool) -> tuple[float, float, float]:
    """A start, a step, an end, in microseconds."""
    rank, starts = make_rank(rows, block_size, PROMPT_TOKENS + STEPS + 8, ledger=ledger)
    start_s, _ = timed(lambda: rank.apply(starts))
    rank.step()
    step_s, _ = timed(lambda: [rank.step() for _ in range(STEPS)])
    end_s, _ = timed(lambda: rank.apply(rank.vacate()))
    return 1e6 * start_s / rows, 1e6 * step_s / STEPS, 1e6 * end_s / rows


def greeting_ms(block_size: int) -> tuple[int, float, float, float, float]:
    """Bytes, and milliseconds to gather, to pack, on the wire's both ends, and to take in: of a full pool of `POOL_BLOCKS`."""
    rows = 200
    tokens = POOL_BLOCKS // rows * block_size - 1
    rank, starts = make_rank(rows, block_size, tokens, ledger=True)
    whole = np.random.default_rng(1).integers(0, 100_000, (rows, tokens), np.int32)
    for start, row in zip(starts, whole, strict=True):
        rank.apply([msgspec.structs.replace(start, tokens=row.tobytes(), cached_tokens=tokens - 1)])
    rank.apply(rank.vacate())
    assert rank.ledger is not None
    gather_s, (standing, _) = timed(rank.ledger.standing)
    pack_s, told = timed(lambda: parts(standing))
    sent = [msgspec.msgpack.encode(part) for part in told]
    wire_s, heard = timed(lambda: [msgspec.msgpack.decode(msgspec.msgpack.encode(part), type=Inventory) for part in told])
    new = BlockTable(block_size, min(32, block_size // 2))
    new.add_group(GroupId(0), POOL_BLOCKS)
    take_s, _ = timed(lambda: new.restore(GroupId(0), blocks_of(heard)))
    assert new.pools[GroupId(0)].cached == len(standing) == POOL_BLOCKS
    return sum(map(len, sent)), 1e3 * gather_s, 1e3 * pack_s, 1e3 * wire_s, 1e3 * take_s


def main() -> None:
    parser = argparse.ArgumentParser(description="Time a leader's ledger, and the greeting of another scheduler.")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, of which medians and ranges are shown (default: 5)")
    options = parser.parse_args()
    lines = []
    for block_size in (256, 16):
        for rows in ROWS:
            for ledger in (False, True):
                rounds = [loop_us(rows, block_size, ledger=ledger) for _ in range(options.rounds)]
                name = f"{rows} rows, blocks of {block_size}, {'with' if ledger else 'without'} a ledger"
                lines.append([name, *(str(Spread.of(values)) for values in zip(*rounds, strict=True))])
    print(table(["host side of the loop, us", "start", "step", "end"], lines))
    lines = []
    for block_size in (256, 16):
        sizes, *greetings = zip(*(greeting_ms(block_size) for _ in range(options.rounds)), strict=True)
        name = f"{POOL_BLOCKS:,} blocks of {block_size}, {sizes[0] / 1e6:.1f} MB"
        lines.append([name, *(str(Spread.of(values)) for values in greetings)])
    print()
    print(table(["greeting, ms", "gather", "pack", "encode, decode", "take in"], lines))


if __name__ == "__main__":
    main()
