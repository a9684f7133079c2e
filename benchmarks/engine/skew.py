"""How far the ranks of a tensor-parallel group are apart, and what it costs when one of them is late.

    python -m benchmarks.engine.skew --device cpu --model 0.1B --ranks 2
    python -m benchmarks.engine.skew --model 8B --ranks 2 --works batch_1,batch_32        # a GPU each; --one-device: all on one

The leader's turns go to its peers by sockets, as in an engine; there is neither scheduler nor front end. *Skew* is from when
the leader launches a step to when the last of its peers does, by the clock of all processes of a host; *first*: of a work's
first step, in which all its prompts are admitted. Then the last rank sleeps before every N-th of its turns, and *added* is what
such a step and the three after it take longer for that, in the median: less than it sleeps where steps under way hide it, more
where others wait for longer than it is away. Works as in `benchmarks.gpu`, rounds on time and late by turns.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.gpu import works as all_works
from benchmarks.gpu.works import Work
from benchmarks.shared.checkpoints import SHAPES, ensure_checkpoint
from benchmarks.shared.options import positive
from benchmarks.shared.ports import free_ports
from benchmarks.shared.ranks import ranks_of
from benchmarks.shared.report import table
from scheduler.protocol.leaders import Command, End, Start
from scheduler.protocol.wire import listen

HOST, TOKEN = "127.0.0.1", "benchmark"
PATIENCE_S = 600.0
AFTER = 4
"""Steps that a late one may hold up, itself included."""


@dataclass(frozen=True, slots=True)
class Asked:
    model: Path
    ranks: int
    device: str
    one_device: bool
    works: tuple[str, ...]
    rounds: int
    late_s: float
    every: int
    options: dict[str, Any]

    @property
    def phases(self) -> list[tuple[str, bool]]:
        """Works one after another, and whether the last rank is late in it: a warm-up of each, then rounds."""
        warm_up = [(work, False) for work in self.works]
        return warm_up + [(work, late) for work in self.works for _ in range(self.rounds) for late in (False, True)]


@dataclass(slots=True)
class Stamped:
    """An executor, and when it was told to execute each step, by phase: one begins with the first row after a step."""

    executor: Any
    launched_s: list[list[float]] = field(default_factory=list)
    _begins: bool = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self.executor, name)

    def admit(self, start: Start) -> None:
        if self._begins:
            self.launched_s.append([])
            self._begins = False
        self.executor.admit(start)

    def execute(self, batch: Any, step: Any) -> Any:
        self.launched_s[-1].append(time.monotonic())
        self._begins = True
        return self.executor.execute(batch, step)


class LateInbox:
    """A peer's, which has every N-th turn of the late phases later than it came."""

    def __init__(self, inbox: Any, asked: Asked) -> None:
        self._inbox, self._asked = inbox, asked
        self._phase, self._turns = -1, 0

    def receive(self) -> tuple[Sequence[Command], Sequence[int]]:
        turn: tuple[Sequence[Command], Sequence[int]] = self._inbox.receive()
        if any(isinstance(command, Start) for command in turn[0]):
            self._phase, self._turns = self._phase + 1, 0
        self._turns += 1
        if self._asked.phases[self._phase][1] and self._turns % self._asked.every == 0:
            time.sleep(self._asked.late_s)
        return turn


def run_rank(rank: int, asked: Asked, store: int, pipe: Connection) -> None:
    if asked.device == "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = str(0 if asked.one_device else rank)
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    else:
        os.environ["OMP_NUM_THREADS"] = "1"  # two ranks of two threads on two cores crawl
    import torch

    from benchmarks.gpu.bare_loop import BareLoop
    from workers.loop.leader import follow
    from workers.loop.link import Greeting, SocketFeed, SocketInbox
    from workers.parallel.connect import connect

    listener = listen(HOST) if rank == 0 else None
    if listener is not None:
        pipe.send(listener.getsockname()[1])
    port = pipe.recv()
    comm = connect(
        rank, asked.ranks, device=torch.device("cuda", 0) if asked.device == "cuda" else torch.device("cpu"),
        address=f"{HOST}:{store}", timeout_s=PATIENCE_S, custom_all_reduce=asked.options["custom_all_reduce"],
    )  # fmt: skip
    loop = BareLoop(asked.model, comm, asked.device, tensor_parallel_size=asked.ranks, **asked.options)
    stamped = Stamped(loop.rank.executor)
    loop.rank.executor = stamped
    if listener is None:
        inbox = SocketInbox(HOST, port, TOKEN, Greeting(rank, ""), comm.abort, lambda _: None)
        late = rank == asked.ranks - 1
        follow(loop.rank, LateInbox(inbox, asked) if late else inbox)
        pipe.send(stamped.launched_s)
    else:
        feed = SocketFeed(listener, asked.ranks - 1, TOKEN, comm.abort, lambda _: None, PATIENCE_S)
        took_s = [lead(loop, feed, getattr(all_works, work)(0)) for work, _ in asked.phases]
        feed.send([End("done")])
        pipe.send((stamped.launched_s, took_s))
    pipe.recv()
    comm.close()


def lead(loop: Any, feed: Any, work: Work) -> float:
    """Seconds of it."""
    from workers.loop.leader import begin_turn

    commands: list[Command] = list(loop.starts(work))
    begun_s = time.monotonic()
    while True:
        loop.rank.step(begin_turn(loop.rank, feed, commands))
        commands = []
        if loop.rank.idle:
            return time.monotonic() - begun_s


def measure(asked: Asked) -> dict[str, dict[str, float]]:
    """By work."""
    [store] = free_ports(1)
    with ranks_of(asked.ranks, run_rank, asked, store) as pipes:
        port = pipes[0].recv()
        for pipe in pipes:
            pipe.send(port)
        (launched_s, took_s), *peers_s = [pipe.recv() for pipe in pipes]
    return {work: figures_of(work, asked, launched_s, took_s, peers_s) for work in asked.works}


def figures_of(
    name: str, asked: Asked, launched_s: list[list[float]], took_s: list[float], peers_s: list[list[list[float]]]
) -> dict[str, float]:  # fmt: skip
    """launched_s, took_s: the leader's, by phase; peers_s: launches of each other rank."""
    phases = [number for number, (work, _) in enumerate(asked.phases) if work == name][1:]
    on_time, late = phases[::2], phases[1::2]
    apart_s = [skews_s(launched_s[number], [each[number] for each in peers_s]) for number in on_time]
    skews = sorted(1e6 * skew for phase in apart_s for skew in phase)
    steps = len(launched_s[on_time[0]])
    turns = range(asked.every - 1, steps - AFTER, asked.every)
    usual_s, late_s = (
        [statistics.median(around_s(launched_s[number], turn) for number in numbers) for turn in turns]
        for numbers in (on_time, late)
    )
    return {
        "steps": steps,
        "step_ms": 1e3 * statistics.median(took_s[number] for number in on_time) / steps,
        "skew_p50_us": skews[len(skews) // 2],
        "skew_p99_us": skews[len(skews) * 99 // 100],
        "skew_first_us": 1e6 * statistics.median(phase[0] for phase in apart_s),
        "late_ms": 1e3 * asked.late_s,
        "added_ms": 1e3 * statistics.median(late - usual for late, usual in zip(late_s, usual_s, strict=True)),
    }


def around_s(launched_s: Sequence[float], step: int) -> float:
    """From the launch of the step before to that of the one after those which a late step may hold up."""
    return launched_s[step + AFTER] - launched_s[step - 1]


def skews_s(leader_s: Sequence[float], peers_s: Sequence[Sequence[float]]) -> list[float]:
    """Of each step: how long after the leader the last of its peers was told to execute it."""
    return [max(peers) - leader for leader, *peers in zip(leader_s, *peers_s, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="0.6B", choices=list(SHAPES), help="shape of a random checkpoint (%(default)s)")
    parser.add_argument("--ranks", type=positive, default=2)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--one-device", action="store_true", help="all ranks share a GPU")
    parser.add_argument(
        "--custom-all-reduce", action=argparse.BooleanOptionalAction, default=True,
        help="small sums by kernels over joined memory",
    )  # fmt: skip
    parser.add_argument("--works", default="batch_1,batch_32")
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--late-ms", type=float, default=2.0, help="how long the last rank sleeps (%(default)s)")
    parser.add_argument("--every", type=positive, default=32, help="in one of so many of its turns (%(default)s)")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "manta-benchmarks")
    parser.add_argument("--json", action="store_true", help="print a JSON object as well")
    asked = parser.parse_args()
    if asked.ranks < 2:
        parser.error("--ranks: one rank has no peers")
    figures = measure(
        Asked(
            ensure_checkpoint(asked.model, asked.cache), asked.ranks, asked.device, asked.one_device,
            tuple(asked.works.split(",")), asked.rounds, 1e-3 * asked.late_ms, asked.every,
            {"max_num_seqs": 32, "kv_memory": 1 << 30, "custom_all_reduce": asked.custom_all_reduce},
        )
    )  # fmt: skip
    columns = list(next(iter(figures.values())))
    rows = [[work, *(f"{figure:g}" if name == "steps" else f"{figure:.2f}" for name, figure in row.items())]
            for work, row in figures.items()]  # fmt: skip
    print(table(["work", *columns], rows))
    if asked.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
