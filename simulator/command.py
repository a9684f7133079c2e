"""`manta replay`: a trace against the production scheduler in virtual time. Reads its options, shows progress and a table.

Imports neither torch nor ray. Exit codes as elsewhere: 0 done, 2 bad input.
"""

# ruff: noqa: B008 - an option is declared where it is named, as the parameter's default

import sys
from collections.abc import Iterable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import msgspec
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from typer.core import TyperCommand

from deploy.config.load import ConfigError
from deploy.terminal.exits import reported_errors
from deploy.terminal.options import DebugOption
from scheduler.placement.why import Decision
from simulator.engines import ClusterShape
from simulator.report import LatencyTarget, Outcome
from simulator.run import POLICIES, Drain, Outage, Scenario, replay
from simulator.synthetic import SCHEME, make_trace, parse_synthetic
from simulator.time_model import TimeModel, calibrated
from simulator.traces import TraceRequest, read_trace
from simulator.transfers import LinkModel

FIGURES = ("hit %", "busiest", "TTFT mean", "p50", "p99 s", "TPOT p50", "p99 s", "good/s", "preempted", "refused", "core s")
WIDTH = 120

SHAPE, TIMES, LINKS, TARGET = ClusterShape(), TimeModel(), LinkModel(), LatencyTarget()


def _flag(name: str, default: Any, help: str, shown: str = "") -> Any:
    """shown: the default in words, where the value says too little."""
    return typer.Option(default, name, help=f"{help} Default: {shown or default}.", show_default=False)


def _repeatable(name: str, help: str) -> Any:
    return typer.Option([], name, help=help, show_default=False)


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


def command(
    trace: str = typer.Argument(
        help="Mooncake JSONL, a request log of manta serve, CSV of Azure or BurstGPT, or "
        "synthetic:requests=N,rate=PER_S,prompt=TOKENS,output=TOKENS,shared=PART,users=N.",
        show_default=False,
    ),
    policy: list[str] = _repeatable(
        "--policy", f"One of {', '.join(POLICIES)}; repeatable. Default: all, one after the other."
    ),
    groups: int = _flag("--groups", SHAPE.groups, "Groups of workers."),
    blocks: int = _flag("--blocks", SHAPE.blocks, "Blocks in the pool of each group."),
    block_size: int = _flag("--block-size", SHAPE.block_size, "Tokens in a block, a power of two."),
    max_num_seqs: int = _flag("--max-num-seqs", SHAPE.max_num_seqs, "Sequences that one group runs at once."),
    max_num_batched_tokens: int = _flag(
        "--max-num-batched-tokens", SHAPE.max_num_batched_tokens, "Tokens that one step of a group computes."
    ),
    window: int | None = _flag(
        "--window", None, "Tokens that every layer of the model sees: blocks before them are given back.", "all"
    ),
    hash_stride: int = _flag(
        "--hash-stride", SHAPE.hash_stride, "Tokens in common from which part of a block is reused; 0: none is."
    ),
    wait_for_prefix: bool = _flag(
        "--wait-for-prefix/--no-wait-for-prefix", SHAPE.wait_for_prefix,
        "Manta lets a sequence wait for a prefix that another is computing.", "it does",
    ),
    host_blocks: int = _flag("--host-blocks", SHAPE.host_blocks, "Blocks in the host memory of each group, for manta-host."),
    fetch_rate: float = _flag(
        "--fetch-rate", LINKS.fetch_tokens_per_s, "Tokens a second that a group sends, or receives.", "100000"
    ),
    host_rate: float = _flag("--host-rate", LINKS.host_tokens_per_s, "Tokens a second to host memory, or from it.", "250000"),
    speed_up: float = _flag("--speed-up", 1.0, "Load, as a multiple of the trace's own."),
    limit: int | None = _flag("--limit", None, "Only so many requests, the first in the file.", "all"),
    seed: int = _flag("--seed", 0, "Makes a replay repeatable: equal seeds, equal results."),
    fail: list[str] = _repeatable(
        "--fail", "GROUP@SECONDS[:DOWN]: its workers die then, and are back DOWN seconds later (60); repeatable."
    ),
    drain: list[str] = _repeatable(
        "--drain", "GROUP@SECONDS[:STAY]: takes nobody new then; who runs there STAY seconds later (0) moves; repeatable."
    ),
    lag: float = _flag("--lag", 1.0, "Seconds by which the view of the lagging router is old."),
    calibrate: str | None = _flag(
        "--calibrate", None, "FILE[:MODEL]: times from the output of python -m benchmarks.engine --json.", "the four below"
    ),
    prefill_rate: float | None = _flag("--prefill-rate", None, "Prompt tokens a second of one group.", "6000"),
    decode_step: float | None = _flag("--decode-step", None, "Seconds of any step.", str(TIMES.decode_step_s)),
    sequence_time: float | None = _flag(
        "--sequence-time", None, "Seconds more for each decoding sequence.", str(TIMES.sequence_s)
    ),
    context_time: float | None = _flag(
        "--context-time", None, "Seconds more for each token of its context.", str(TIMES.context_token_s)
    ),
    ttft: float = _flag("--ttft", TARGET.ttft_s, "Seconds to the first token that goodput allows."),
    tpot: float = _flag("--tpot", TARGET.tpot_s, "Seconds a token after it that goodput allows."),
    why: Path | None = _flag(
        "--why", None, "A file for one JSON line each time Manta sends a request to a group: why there.", "none"
    ),
    json: bool = _flag("--json", False, "One JSON object, by policy, as the last line of stdout.", "no"),
    quiet: bool = _flag("--quiet", False, "No progress on stderr.", "no"),
    debug: DebugOption = False,
) -> None:  # fmt: skip
    """Replay a trace against the scheduler in virtual time, under several policies: what if?

    manta replay conversation_trace.jsonl --groups 8 --speed-up 1.5 --policy manta --policy round-robin
    """
    with reported_errors(debug):
        for name in policy:
            if name not in POLICIES:
                raise ConfigError(f"--policy {name} is not one of {', '.join(POLICIES)}")
        shape = ClusterShape(
            groups=groups, blocks=blocks, block_size=block_size, max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens, host_blocks=host_blocks, hash_stride=hash_stride,
            wait_for_prefix=wait_for_prefix, window=window, links=LinkModel(fetch_rate, host_rate),
            time=_times(calibrate, prefill_rate, decode_step, sequence_time, context_time),
        )  # fmt: skip
        outages = tuple(Outage(*_event("--fail", text)) for text in fail)
        drains = tuple(Drain(*_event("--drain", text)) for text in drain)
        scenario = Scenario(shape, speed_up, seed, outages, drains, lag, LatencyTarget(ttft, tpot))
        outcomes = _replays(_requests(trace, seed, limit), policy or POLICIES, scenario, quiet, why)
        console = Console()
        console.width = max(console.width, WIDTH)  # a narrow window wraps lines, which is better than figures cut off
        console.print(summary(outcomes))
        if json:
            sys.stdout.write(msgspec.json.encode({each.policy: each for each in outcomes}).decode() + "\n")


def _requests(trace: str, seed: int, limit: int | None) -> list[TraceRequest]:
    """Errors: TraceError, OSError."""
    if trace.startswith(SCHEME):
        return make_trace(parse_synthetic(trace), seed, limit)
    return read_trace(Path(trace), seed, limit)


def _times(
    calibrate: str | None, prefill: float | None, decode: float | None, sequence: float | None, context: float | None
) -> TimeModel:
    """Errors: ValueError, OSError."""
    base = TIMES
    if calibrate is not None:
        name, _, model = calibrate.partition(":")
        base = calibrated(Path(name), model or None)
    return TimeModel(
        base.prefill_tokens_per_s if prefill is None else prefill,
        base.decode_step_s if decode is None else decode,
        base.sequence_s if sequence is None else sequence,
        base.context_token_s if context is None else context,
    )


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
    with why.open("wb") if why is not None else nullcontext() as file:
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
