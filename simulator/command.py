"""`manta replay`: a trace against the production scheduler in virtual time. Shows progress and a table.

Imports neither torch nor ray. Exit codes as elsewhere: 0 done, 2 bad input.
"""

import sys
from collections.abc import Iterable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Any, BinaryIO, ClassVar

import msgspec
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from typer.core import TyperCommand

from deploy.config.load import ConfigError
from deploy.terminal.exits import reported_errors
from deploy.terminal.options import DebugOption, flag
from deploy.terminal.writing import open_written
from scheduler.placement.why import Decision
from simulator.options import (
    EventOptions,
    LinkOptions,
    LoadOptions,
    OutputOptions,
    ShapeOptions,
    TargetOptions,
    TimeOptions,
    spread,
)
from simulator.report import Outcome
from simulator.run import POLICIES, Drain, Outage, Scenario, replay
from simulator.synthetic import SCHEME, make_trace, parse_synthetic
from simulator.traces import TraceRequest, read_trace

FIGURES = ("hit %", "busiest", "TTFT mean", "p50", "p99 s", "TPOT p50", "p99 s", "good/s", "preempted", "refused", "core s")
WIDTH = 120

TraceArgument = Annotated[
    str,
    typer.Argument(
        help="Mooncake JSONL, a request log of manta serve, CSV of Azure or BurstGPT, or "
        "synthetic:requests=N,rate=PER_S,prompt=TOKENS,output=TOKENS,shared=PART,users=N.",
        show_default=False,
    ),
]
PolicyOption = Annotated[
    list[str] | None, flag("--policy", f"One of {', '.join(POLICIES)}; repeatable. Default: all, one after the other.")
]


class OldSpellings(TyperCommand):
    """Takes what these options were called before version 0.1, too, and those that have lost their meaning, and says so."""

    RENAMED: ClassVar = {"--pages": "--blocks", "--page-size": "--block-size", "--host-pages": "--host-blocks"}
    GONE: ClassVar = {"--relieve", "--no-relieve"}

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        taken = []
        for argument in args:
            name, equals, value = argument.partition("=")
            if name in self.GONE:
                sys.stderr.write(f"{name} does nothing any more; it goes with the next version\n")
                continue
            if (now := self.RENAMED.get(name)) is not None:
                sys.stderr.write(f"{name} is called {now} now; the old name goes with the next version\n")
                argument = now + equals + value
            taken.append(argument)
        return super().parse_args(ctx, taken)


@spread
def command(
    trace: TraceArgument,
    *,
    policy: PolicyOption = None,
    shape: ShapeOptions,
    links: LinkOptions,
    load: LoadOptions,
    events: EventOptions,
    times: TimeOptions,
    target: TargetOptions,
    output: OutputOptions,
    debug: DebugOption = False,
) -> None:
    """Replay a trace against the scheduler in virtual time, under several policies: what if?

    manta replay conversation_trace.jsonl --groups 8 --speed-up 1.5 --policy manta --policy round-robin
    """
    with reported_errors(debug):
        for name in policy or ():
            if name not in POLICIES:
                raise ConfigError(f"--policy {name} is not one of {', '.join(POLICIES)}")
        cluster = shape.shape(links.links(), times.times())
        outages = tuple(Outage(*_event("--fail", text)) for text in events.fail)
        drains = tuple(Drain(*_event("--drain", text)) for text in events.drain)
        scenario = Scenario(cluster, load.speed_up, load.seed, outages, drains, events.lag, target.target())
        outcomes = _replays(_requests(trace, load.seed, load.limit), policy or POLICIES, scenario, output.quiet, output.why)
        console = Console()
        console.width = max(console.width, WIDTH)  # a narrow window wraps lines, which is better than figures cut off
        console.print(summary(outcomes))
        if output.json:
            sys.stdout.write(msgspec.json.encode({each.policy: each for each in outcomes}).decode() + "\n")


def _requests(trace: str, seed: int, limit: int | None) -> list[TraceRequest]:
    """Errors: TraceError, OSError."""
    if trace.startswith(SCHEME):
        return make_trace(parse_synthetic(trace), seed, limit)
    return read_trace(Path(trace), seed, limit)


def _event(option: str, text: str) -> tuple[int, float] | tuple[int, float, float]:
    """(group, when, and how long if that is said)."""
    group, _, when = text.partition("@")
    at, _, lasting = when.partition(":")
    try:
        return (int(group), float(at), float(lasting)) if lasting else (int(group), float(at))
    except ValueError:
        raise ConfigError(f"{option} {text} is not GROUP@SECONDS[:SECONDS]: write for example 3@600:120") from None


class Explained(msgspec.Struct, frozen=True):
    """A line of `--why`. decision: of the request with this number in the trace, which is its `stream`."""

    policy: str
    decision: Decision


def _replays(
    requests: list[TraceRequest], policies: Iterable[str], scenario: Scenario, quiet: bool, why: Path | None
) -> list[Outcome]:
    """One policy after the other, each once."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    outcomes = []
    with open_written(why) if why is not None else nullcontext() as file:
        for policy in dict.fromkeys(policies):
            tell = partial(_tell, file, policy) if file is not None else None
            with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bars:
                progress = partial(_show, bars, bars.add_task(policy, total=len(requests)))
                outcomes.append(replay(requests, policy, scenario, progress, tell))
    return outcomes


def _show(bars: Progress, task: TaskID, done: int) -> None:
    bars.update(task, completed=done)


def _tell(file: BinaryIO, policy: str, decision: Decision) -> None:
    file.write(msgspec.json.encode(Explained(policy, decision)) + b"\n")


def summary(outcomes: list[Outcome]) -> Table:
    """A line for each policy."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("policy", no_wrap=True)
    for name in FIGURES:
        table.add_column(name, justify="right", no_wrap=True)
    for each in outcomes:
        table.add_row(
            each.policy, f"{100 * each.token_hit_rate:.2f}", f"{each.busiest_over_mean:.3f}",
            *(f"{value:.2f}" for value in (each.ttft_s.mean, each.ttft_s.p50, each.ttft_s.p99)),
            f"{each.tpot_s.p50:.3f}", f"{each.tpot_s.p99:.3f}", f"{each.goodput:.2f}", f"{each.preemptions:,}",
            f"{each.refused:,}", f"{each.core_cpu_s:.2f}",
        )  # fmt: skip
    return table
