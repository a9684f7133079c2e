"""Thousands of short requests, many of them given up by their clients, against `manta serve`: what is left afterwards?

Blocks: none is held. Processes: as many as before, with as many threads and file descriptors, and as much memory, give or take
a bound. With `--fault-every` ranks are killed and stopped meanwhile (`benchmarks.chaos`), of which no client may notice more
than that it is told to come again. SIGINT ends it early; what was done until then is counted. Linux only; never imports an
engine. Exits with 1 if anything was lost or has grown.

    python -m benchmarks.serving.soak --requests 10000 --replicas 2 --json
    python -m benchmarks.serving.soak --requests 100000 --fault-every 60
"""

import argparse
import contextlib
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.chaos.faults import faults_of
from benchmarks.chaos.run import Shape
from benchmarks.chaos.striking import Striking
from benchmarks.shared.endpoint import Ask, Clients, Endpoint, ServingError, completion, serving
from benchmarks.shared.load import Outcome
from benchmarks.shared.options import positive
from benchmarks.shared.processes import Process
from benchmarks.shared.report import table

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny"
VOCABULARY, LONGEST = 4096, 2046
UNDER_WAY = 48
BATCH = 500
WARM_UP = 2000
"""Requests after which caches, pools and arenas have their size; growth counts from here."""

GROWTH_BYTES = 16 << 20
"""Of one process, for the whole run: 10,000 leaked requests of 2 KiB would show."""

COME_AGAIN = (429, 503)
SURVIVED = "kill:peer,kill:leader,stop:peer,stop:leader,pause:scheduler"
"""Faults of which no request is lost."""

REMEMBERING = "gcs_server"
"""Ray's own, which keeps something of each process that there was: where ranks are replaced, that is told, and no fault."""

GROWTH_HANDLES = 8
"""Threads or file descriptors that pools may still open."""


def asks(draw: random.Random, count: int) -> list[Ask]:
    """Short requests. A third of the clients hang up, a third of those before the first token; half share a beginning."""
    shared = random.Random(0).choices(range(VOCABULARY), k=300)
    made = []
    for _ in range(count):
        own = draw.choices(range(VOCABULARY), k=draw.randint(8, 200))
        prompt = shared + own if draw.random() < 0.5 else own
        leave_after = draw.choice((0, 1, draw.randint(2, 16))) if draw.random() < 1 / 3 else None
        made.append(Ask(completion(prompt, draw.randint(1, 32)), leave_after=leave_after))
    return made


def widths() -> list[Ask]:
    """Prompts of every width that a step may have on a CPU (`workers/model/layers/padding.py`): a rank compiles kernels for
    each and keeps them, which would else look like growth over thousands of requests."""
    draw, sizes = random.Random(1), [*range(1, 16), *(round(16 * 2 ** (at / 16)) for at in range(7 * 16)), LONGEST]
    return [Ask(completion(draw.choices(range(VOCABULARY), k=size), 1)) for size in sizes if size <= LONGEST]


@dataclass(slots=True)
class Soak:
    """striking: the faults that are made meanwhile, if any. done: requests that were answered, given up or lost. left: those
    given up. refused: how often one was told to come again, and did."""

    endpoint: Endpoint
    clients: Clients
    striking: Striking | None
    done: int = 0
    left: int = 0
    failed: list[Outcome] = field(default_factory=list)
    refused: int = 0
    enough: bool = False
    """Whether it has been interrupted."""

    def end(self, *_: object) -> None:
        """After the batch that is under way: a handler of a signal."""
        self.enough = True

    def run(self, requests: int, seed: int) -> tuple[dict[str, object], list[str]]:
        """What was done, and every way in which something was lost or has grown."""
        draw, began_s, warm = random.Random(seed), time.monotonic(), dict[int, Process]()
        start, early = self.endpoint.idle_blocks(), self.endpoint.processes()
        self.clients.run(self.endpoint, widths(), limit=1)
        if self.striking is not None:
            self.striking.start()
        while self.done < requests and not self.enough:
            self._ask(asks(draw, min(BATCH, requests - self.done)))
            if not warm and self.done >= min(WARM_UP, requests // 2):
                warm = self._whole()
            print(f"{self.done} of {requests} requests, {len(self.failed)} failed", file=sys.stderr, flush=True)
        if self.striking is not None:
            self.striking.settle()
        end, late = self.endpoint.idle_blocks(), self.endpoint.processes()
        warm = warm or late  # it was interrupted before
        faults = [f"{len(self.failed)} requests failed, the first: {self.failed[0]}"] if self.failed else []
        if sum(end.values()) != sum(start.values()):
            faults.append(f"blocks at the start {start}, at the end {end}")
        faults += grown(warm, late, replaced=self.striking is not None)
        seconds = time.monotonic() - began_s
        made = Counter(self.striking.made) if self.striking is not None else Counter[str]()
        print(f"\n{self.done} requests in {seconds:.0f} s, {self.left} given up by their clients, {len(self.failed)} failed")
        print(f"faults: {dict(made)}; {self.refused} times a request was told to come again")
        print(f"blocks at the start {start}, at the end {end}")
        print(growth_table(early, warm, late), flush=True)
        return {
            "requests": self.done, "left": self.left, "failed": len(self.failed), "blocks": end, "seconds": seconds,
            "made": dict(made), "refused": self.refused,
        }, faults  # fmt: skip

    def _whole(self) -> dict[int, Process]:
        """The processes at a moment without requests and faults: of a group that is starting, not all are there, and those that
        are have other names (Ray's title of a named actor is `ray::NAME:CLASS.__init__` until it is made)."""
        with self.striking.between if self.striking is not None else contextlib.nullcontext():
            self.endpoint.idle_blocks()
            return self.endpoint.processes()

    def _ask(self, asked: list[Ask]) -> None:
        """Until each has been answered, given up or lost: who is told to come again does."""
        while asked:
            again: list[Ask] = []
            for ask, outcome in zip(asked, self.clients.run(self.endpoint, asked, limit=UNDER_WAY), strict=True):
                if outcome.status in COME_AGAIN:
                    again.append(ask)
                    continue
                self.done += 1
                self.left += outcome.left
                if not (outcome.complete or outcome.left):
                    self.failed.append(outcome)
            self.refused += len(again)
            asked = again


def grown(warm: dict[int, Process], late: dict[int, Process], replaced: bool) -> list[str]:
    """Processes that came, went, or hold more than they did. replaced: others may have come for those that went."""
    if replaced:
        before, after = (Counter(each.name.partition(".")[0] for each in moment.values()) for moment in (warm, late))
        faults = [f"{after[name]} processes are called {name}, it were {before[name]}" for name in before | after
                  if before[name] != after[name]]  # fmt: skip
    else:
        faults = [f"{late[pid].name} ({pid}) is new" for pid in late.keys() - warm.keys()]
        faults += [f"{warm[pid].name} ({pid}) has gone" for pid in warm.keys() - late.keys()]
    for pid in warm.keys() & late.keys():
        if not (replaced and late[pid].name.startswith(REMEMBERING)):
            faults += _grown(warm[pid], late[pid], pid)
    return faults


def _grown(before: Process, after: Process, pid: int) -> list[str]:
    faults = []
    if after.rss_bytes - before.rss_bytes > GROWTH_BYTES:
        faults.append(f"{after.name} ({pid}) has grown from {before.rss_bytes >> 20} to {after.rss_bytes >> 20} MiB")
    for what, one, other in (
        ("threads", before.threads, after.threads),
        ("descriptors", before.descriptors, after.descriptors),
    ):
        if other - one > GROWTH_HANDLES:
            faults.append(f"{after.name} ({pid}) had {one} {what} and has {other}")
    return faults


def growth_table(*moments: dict[int, Process]) -> str:
    """A line for each process that was there all the time: at the start, after the warm-up, at the end."""
    rows = []
    for pid in sorted(set(moments[0]).intersection(*moments[1:])):
        seen = [moment[pid] for moment in moments]
        rows.append(
            [
                seen[-1].name,
                " / ".join(f"{each.rss_bytes / (1 << 20):.1f}" for each in seen),
                " / ".join(str(each.threads) for each in seen),
                " / ".join(str(each.descriptors) for each in seen),
            ]
        )
    return table(["start / warm / end", "resident MiB", "threads", "descriptors"], rows)


def main() -> None:
    """Parse the command line, soak, and say what was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=positive, default=10_000, help="(%(default)s)")
    parser.add_argument("--replicas", type=positive, default=2, help="front ends on Ray (%(default)s)")
    parser.add_argument("--local", action="store_true", help="one process, without Ray")
    parser.add_argument("--fault-every", type=float, metavar="SECONDS", help="with 2 groups of 2 ranks (no faults)")
    parser.add_argument("--faults", type=faults_of, default=faults_of(SURVIVED), help=f"kind:role,... ({SURVIVED})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print a JSON object as well")
    options = parser.parse_args()
    shape = Shape(replicas=options.replicas) if options.fault_every else Shape(1, 1, options.replicas)
    flags = ["--local"] if options.local else shape.flags
    log = Path(tempfile.gettempdir()) / "manta-benchmarks" / "logs" / "soak.log"
    try:
        with serving(TINY, [*flags, "--threads", "1", "--kv-memory", "64MiB"], log) as endpoint, Clients() as clients:
            striking = None
            if options.fault_every:
                striking = Striking(endpoint, shape, options.faults, options.fault_every, options.seed)
            soak = Soak(endpoint, clients, striking)
            signal.signal(signal.SIGINT, soak.end)
            result, faults = soak.run(options.requests, options.seed)
    except ServingError as error:
        sys.exit(f"error: {error}")
    if options.json:
        print(json.dumps(result | {"faults": faults}))
    if faults:
        sys.exit("\n".join(["error:", *faults]))


if __name__ == "__main__":
    main()
