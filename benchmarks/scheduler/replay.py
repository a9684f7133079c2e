"""The tables of docs/replay.md, made anew in one go and printed as Markdown: policies, seeds, groups that go, and the scale.

    python -m benchmarks.scheduler.replay conversation_trace.jsonl                       # half an hour on one quiet core
    python -m benchmarks.scheduler.replay conversation_trace.jsonl --limit 5000 --tables loads seeds

Virtual times are the same on every machine; what the core costs is CPU time of this one. Imports `simulator`; no torch.
"""

import argparse
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from simulator.engines import ClusterShape
from simulator.report import Outcome
from simulator.run import POLICIES, Drain, Outage, Scenario, replay
from simulator.synthetic import Synthetic, make_trace
from simulator.time_model import TimeModel
from simulator.traces import TraceRequest, read_trace

ROUTERS = ("round-robin", "least-load", "approximate", "lagging", "longest-prefix", "precise")
MANTA = ("manta", "manta-fetch", "manta-host")
SATURATING_RATE = 5000.0
"""Prompt tokens a second of a group with which round robin saturates at the trace's own speed."""

SCALES = (1, 8, 32, 128, 512)
SCALE_SECONDS = {1: 32.0, 8: 16.0, 32: 16.0, 128: 8.0, 512: 4.0}
REQUESTS_PER_S = 31.25
"""Of each group: 1,000 a second on 32 groups."""

SCALE_SHAPE = ClusterShape(blocks=2500, max_num_batched_tokens=4096, time=TimeModel(50_000.0, 0.012, 3e-5, 5e-9))
"""Near an 8B model on one H100 (estimated): about 230 sequences of 1,000 prompt and 250 output tokens run at that rate."""

Row = list[str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace", type=Path, help="the conversation trace, in Mooncake's format")
    parser.add_argument("--limit", type=int, default=None, help="only so many requests of it (default: all)")
    tables: dict[str, Callable[[Path, int | None], None]] = {
        "loads": print_loads, "seeds": print_seeds, "events": print_events, "scale": print_scale,
    }  # fmt: skip
    parser.add_argument("--tables", nargs="+", choices=tables, default=list(tables), help="which (default: all)")
    options = parser.parse_args()
    for name in options.tables:
        tables[name](options.trace, options.limit)


def print_loads(path: Path, limit: int | None) -> None:
    """Every policy at the trace's own speed and at 1.5 times that."""
    trace = read_trace(path, 0, limit)
    for speed_up in (1.0, 1.5):
        scenario = Scenario(ClusterShape(), speed_up)
        outcomes = {name: _run(trace, name, scenario) for name in POLICIES}
        rows = [[name, *_figures(each), f"{each.tpot_s.p50:.3f}", f"{each.goodput:.2f}"] for name, each in outcomes.items()]
        columns = ("policy", "hit %", "busiest / mean", "TTFT mean", "p50", "p99", "TPOT p50", "goodput/s")
        _print_table(f"speed-up {speed_up}", columns, rows)
        bound = outcomes["single-pool"].token_hit_rate
        best = min(outcomes[name].ttft_s.p99 for name in ROUTERS)
        for name in MANTA:
            of_bound, of_best = outcomes[name].token_hit_rate / bound, outcomes[name].ttft_s.p99 / best
            print(f"{name}: {100 * of_bound:.1f}% of the single pool's hits; p99 TTFT {of_best:.3f} of the best router's\n")


def print_seeds(path: Path, limit: int | None) -> None:
    """On a cluster that round robin saturates, at the trace's own speed."""
    scenario = Scenario(ClusterShape(time=TimeModel(prefill_tokens_per_s=SATURATING_RATE)))
    names = (*MANTA, "round-robin", "approximate", "precise")
    rows = []
    for seed in range(3):
        trace = read_trace(path, seed, limit)
        outcomes = [_run(trace, name, replace(scenario, seed=seed)) for name in names]
        rows.append([str(seed), *(f"{each.ttft_s.mean:.2f}, {each.ttft_s.p99:.2f}" for each in outcomes)])
    _print_table(f"{SATURATING_RATE:.0f} prompt tokens/s a group: mean, p99 TTFT", ("seed", *names), rows)


def print_events(path: Path, limit: int | None) -> None:
    """A group dies for five minutes; a group is drained for good."""
    trace, rows = read_trace(path, 0, limit), []
    events = {
        "3 dies at 900 s for 300 s": Scenario(ClusterShape(), outages=(Outage(3, 900.0, 300.0),)),
        "3 is drained at 900 s": Scenario(ClusterShape(), drains=(Drain(3, 900.0),)),
    }
    for event, scenario in events.items():
        for name in MANTA if scenario.drains else (*MANTA, "precise", "round-robin"):
            outcome = _run(trace, name, scenario)
            rows.append([event, name, *_figures(outcome), str(outcome.preemptions), str(outcome.migrations)])
    columns = ("event", "policy", "hit %", "busiest / mean", "TTFT mean", "p50", "p99", "preempted", "migrated")
    _print_table("groups that go", columns, rows)


def print_scale(path: Path, limit: int | None) -> None:  # noqa: ARG001
    """The core's cost as the cluster grows, with load in proportion."""
    rows = []
    for groups in SCALES:
        rate = groups * REQUESTS_PER_S
        trace = make_trace(Synthetic(round(rate * SCALE_SECONDS[groups]), rate, users=62 * groups))
        outcome = _run(trace, "manta", Scenario(replace(SCALE_SHAPE, groups=groups)))
        rows.append(
            [
                str(groups), f"{rate:,.0f}", f"{outcome.live_per_group:.0f}", f"{outcome.core_us_per_request:.0f}",
                f"{outcome.core_share / groups * 1e6:,.0f}", f"{outcome.core_share:.3f}", f"{outcome.index_bytes / 2**20:.0f}",
                f"{outcome.busiest_over_mean:.3f}",
            ]
        )  # fmt: skip
    columns = (
        "groups", "requests/s", "running in each", "core, us a request", "us a group-second", "of one core", "MiB",
        "busiest / mean",
    )  # fmt: skip
    _print_table("scale", columns, rows)


def _run(trace: list[TraceRequest], name: str, scenario: Scenario) -> Outcome:
    sys.stderr.write(f"{name}, {scenario.shape.groups} groups, speed-up {scenario.speed_up}, seed {scenario.seed}\n")
    return replay(trace, name, scenario)


def _figures(outcome: Outcome) -> Row:
    ttft_s = outcome.ttft_s
    return [
        f"{100 * outcome.token_hit_rate:.2f}", f"{outcome.busiest_over_mean:.3f}",
        *(f"{value:.2f}" for value in (ttft_s.mean, ttft_s.p50, ttft_s.p99)),
    ]  # fmt: skip


def _print_table(title: str, columns: Iterable[str], rows: Iterable[Row]) -> None:
    names = list(columns)
    print(f"\n{title}\n")
    for row in (names, ["---"] * len(names), *rows):
        print(f"| {' | '.join(row)} |")
    print(flush=True)


if __name__ == "__main__":
    main()
