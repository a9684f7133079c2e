"""Thousands of short requests, many of them given up by their clients, against `manta serve`: what is left afterwards?

Blocks: none is held. Processes: as many as before, with as many threads and file descriptors, and as much memory, give or take
a bound. Linux only; never imports an engine. Exits with 1 if anything was lost or has grown.

    python -m benchmarks.serving.soak --requests 10000 --replicas 2 --json
"""

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.shared.endpoint import Ask, Clients, Endpoint, ServingError, completion, serving
from benchmarks.shared.load import Outcome
from benchmarks.shared.options import positive
from benchmarks.shared.processes import Process
from benchmarks.shared.report import table

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny"
VOCABULARY = 4096
UNDER_WAY = 48
BATCH = 500
WARM_UP = 2000
"""Requests after which caches, pools and arenas have their size; growth counts from here."""

GROWTH_BYTES = 16 << 20
"""Of one process, for the whole run: 10,000 leaked requests of 2 KiB would show."""

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


def soak(endpoint: Endpoint, clients: Clients, requests: int, seed: int) -> tuple[dict[str, object], list[str]]:
    """What was done, and every way in which something was lost or has grown."""
    draw, outcomes, began_s = random.Random(seed), list[Outcome](), time.monotonic()
    start, warm, early = endpoint.idle_blocks(), dict[int, Process](), endpoint.processes()
    while len(outcomes) < requests:
        outcomes += clients.run(endpoint, asks(draw, min(BATCH, requests - len(outcomes))), limit=UNDER_WAY)
        if not warm and len(outcomes) >= min(WARM_UP, requests // 2):
            endpoint.idle_blocks()
            warm = endpoint.processes()
        print(f"{len(outcomes)} of {requests} requests", file=sys.stderr, flush=True)
    end, late = endpoint.idle_blocks(), endpoint.processes()
    seconds = time.monotonic() - began_s
    failed = [outcome for outcome in outcomes if not (outcome.complete or outcome.left)]
    faults = [f"{len(failed)} requests failed, the first: {failed[0]}"] if failed else []
    if sum(end.values()) != sum(start.values()):
        faults.append(f"blocks at the start {start}, at the end {end}")
    faults += grown(warm, late)
    left = sum(outcome.left for outcome in outcomes)
    print(f"\n{requests} requests in {seconds:.0f} s, {left} given up by their clients, {len(failed)} failed")
    print(f"blocks at the start {start}, at the end {end}")
    print(growth_table(early, warm, late), flush=True)
    return {"requests": requests, "left": left, "failed": len(failed), "blocks": end, "seconds": seconds}, faults


def grown(warm: dict[int, Process], late: dict[int, Process]) -> list[str]:
    """Processes that came, went, or hold more than they did."""
    faults = [f"{late[pid].name} ({pid}) is new" for pid in late.keys() - warm.keys()]
    faults += [f"{warm[pid].name} ({pid}) has gone" for pid in warm.keys() - late.keys()]
    for pid in warm.keys() & late.keys():
        before, after = warm[pid], late[pid]
        if after.rss_bytes - before.rss_bytes > GROWTH_BYTES:
            faults.append(f"{after.name} ({pid}) has grown from {before.rss_bytes >> 20} to {after.rss_bytes >> 20} MiB")
        for what in ("threads", "descriptors"):
            one, other = (before.threads, after.threads) if what == "threads" else (before.descriptors, after.descriptors)
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
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print a JSON object as well")
    options = parser.parse_args()
    flags = ["--local"] if options.local else ["--replicas", str(options.replicas)]
    log = Path(tempfile.gettempdir()) / "manta-benchmarks" / "logs" / "soak.log"
    try:
        with serving(TINY, [*flags, "--threads", "1", "--kv-memory", "64MiB"], log) as endpoint, Clients() as clients:
            result, faults = soak(endpoint, clients, options.requests, options.seed)
    except ServingError as error:
        sys.exit(f"error: {error}")
    if options.json:
        print(json.dumps(result | {"faults": faults}))
    if faults:
        sys.exit("\n".join(["error:", *faults]))


if __name__ == "__main__":
    main()
