"""`manta replay`: a trace against the production scheduler in virtual time. Reads its options, shows progress and a table.

Imports neither torch nor ray. Exit codes as elsewhere: 0 done, 2 bad input.
"""

import sys
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

from deploy.cli.exits import reported_errors
from deploy.cli.options import DebugOption, flag
from deploy.config.load import ConfigError
from scheduler.placement.why import Decision
from simulator.engines import ClusterShape
from simulator.report import Outcome, Target
from simulator.run import POLICIES, Drain, Outage, Scenario, replay
from simulator.synthetic import SCHEME, make_trace, parse_synthetic
from simulator.time_model import TimeModel, calibrated
from simulator.traces import TraceRequest, read_trace
from simulator.transfers import LinkModel

FIGURES = ("hit %", "busiest", "TTFT mean", "p50", "p99 s", "TPOT p50", "p99 s", "good/s", "preempted", "refused", "core s")
WIDTH = 120

SHAPE, TIMES, LINKS, TARGET = ClusterShape(), TimeModel(), LinkModel(), Target()



TraceArgument = Annotated[
    str,
    typer.Argument(
        help="Mooncake JSONL, a request log of manta serve, CSV of Azure or BurstGPT, or "
        "synthetic:requests=N,rate=PER_S,prompt=TOKENS,output=TOKENS,shared=PART,users=N.",
        show_default=False,
    ),
]
PolicyOption = Annotated[
    list[str], flag("--policy", f"One of {', '.join(POLICIES)}; repeatable. Default: all, one after the other.")
]
GroupsOption = Annotated[int, flag("--groups", f"Groups of workers. Default: {SHAPE.groups}.")]
BlocksOption = Annotated[int, flag("--blocks", f"Blocks in the pool of each group. Default: {SHAPE.blocks}.")]
BlockSizeOption = Annotated[int, flag("--block-size", f"Tokens in a block, a power of two. Default: {SHAPE.block_size}.")]
SequencesOption = Annotated[
    int, flag("--max-num-seqs", f"Sequences that one group runs at once. Default: {SHAPE.max_num_seqs}.")
]
TokensOption = Annotated[
    int,
    flag(
        "--max-num-batched-tokens",
        f"Tokens that one step of a group computes. Default: {SHAPE.max_num_batched_tokens}.",
    ),
]
StrideOption = Annotated[
    int,
    flag(
        "--hash-stride", f"Tokens in common from which part of a block is reused; 0: none is. Default: {SHAPE.hash_stride}."
    ),
]
WaitOption = Annotated[
    bool,
    flag(
        "--wait-for-prefix/--no-wait-for-prefix",
        "Manta lets a sequence wait for a prefix that another is computing. Default: it does.",
    ),
]
HostOption = Annotated[
    int, flag("--host-blocks", f"Blocks in the host memory of each group, for manta-host. Default: {SHAPE.host_blocks}.")
]
FetchOption = Annotated[
    float,
    flag("--fetch-rate", f"Tokens a second that a group sends, or receives. Default: {LINKS.fetch_tokens_per_s:.0f}."),
]
HostRateOption = Annotated[
    float,
    flag("--host-rate", f"Tokens a second to host memory, or from it. Default: {LINKS.host_tokens_per_s:.0f}."),
]
SpeedOption = Annotated[float, flag("--speed-up", "Load, as a multiple of the trace's own. Default: 1.0.")]
LimitOption = Annotated[int | None, flag("--limit", "Only so many requests, the first in the file. Default: all.")]
SeedOption = Annotated[int, flag("--seed", "Makes a replay repeatable: equal seeds, equal results. Default: 0.")]
FailOption = Annotated[
    list[str],
    flag("--fail", "GROUP@SECONDS[:DOWN]: its workers die then, and are back DOWN seconds later (60); repeatable."),
]
DrainOption = Annotated[
    list[str],
    flag("--drain", "GROUP@SECONDS[:STAY]: takes nobody new then; who runs there STAY seconds later (0) moves; repeatable."),
]
LagOption = Annotated[float, flag("--lag", "Seconds by which the view of the lagging router is old. Default: 1.0.")]
CalibrateOption = Annotated[
    str | None,
    flag("--calibrate", "FILE[:MODEL]: times from the output of python -m benchmarks.engine --json. Default: the four below."),
]
RateOption = Annotated[
    float | None, flag("--prefill-rate", f"Prompt tokens a second of one group. Default: {TIMES.prefill_tokens_per_s:.0f}.")
]
StepOption = Annotated[float | None, flag("--decode-step", f"Seconds of any step. Default: {TIMES.decode_step_s}.")]
SequenceOption = Annotated[
    float | None, flag("--sequence-time", f"Seconds more for each decoding sequence. Default: {TIMES.sequence_s}.")
]
ContextOption = Annotated[
    float | None, flag("--context-time", f"Seconds more for each token of its context. Default: {TIMES.context_token_s}.")
]
TtftOption = Annotated[float, flag("--ttft", f"Seconds to the first token that goodput allows. Default: {TARGET.ttft_s}.")]
TpotOption = Annotated[float, flag("--tpot", f"Seconds a token after it that goodput allows. Default: {TARGET.tpot_s}.")]
WhyOption = Annotated[
    Path | None,
    flag("--why", "A file for one JSON line each time Manta sends a request to a group: why there. Default: none."),
]
JsonOption = Annotated[bool, flag("--json", "One JSON object, by policy, as the last line of stdout. Default: no.")]
QuietOption = Annotated[bool, flag("--quiet", "No progress on stderr. Default: no.")]


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
    trace: TraceArgument,
    policy: PolicyOption = [],  # noqa: B006
    groups: GroupsOption = SHAPE.groups,
    blocks: BlocksOption = SHAPE.blocks,
    block_size: BlockSizeOption = SHAPE.block_size,
    max_num_seqs: SequencesOption = SHAPE.max_num_seqs,
    max_num_batched_tokens: TokensOption = SHAPE.max_num_batched_tokens,
    hash_stride: StrideOption = SHAPE.hash_stride,
    wait_for_prefix: WaitOption = SHAPE.wait_for_prefix,
    host_blocks: HostOption = SHAPE.host_blocks,
    fetch_rate: FetchOption = LINKS.fetch_tokens_per_s,
    host_rate: HostRateOption = LINKS.host_tokens_per_s,
    speed_up: SpeedOption = 1.0,
    limit: LimitOption = None,
    seed: SeedOption = 0,
    fail: FailOption = [],  # noqa: B006
    drain: DrainOption = [],  # noqa: B006
    lag: LagOption = 1.0,
    calibrate: CalibrateOption = None,
    prefill_rate: RateOption = None,
    decode_step: StepOption = None,
    sequence_time: SequenceOption = None,
    context_time: ContextOption = None,
    ttft: TtftOption = TARGET.ttft_s,
    tpot: TpotOption = TARGET.tpot_s,
    why: WhyOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Replay a trace against the scheduler in virtual time, under several policies: what if?

    manta replay conversation_trace.jsonl --groups 8 --speed-up 1.5 --policy manta --policy round-robin
    """
    with reported_errors(debug):
        for name in policy:
            if name not in POLICIES:
                raise ConfigError(f"--policy {name} is not one of {', '.join(POLICIES)}")
        times = _times(calibrate, prefill_rate, decode_step, sequence_time, context_time)
        shape = ClusterShape(
            groups=groups, blocks=blocks, block_size=block_size, max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens, host_blocks=host_blocks, hash_stride=hash_stride,
            wait_for_prefix=wait_for_prefix, time=times, links=LinkModel(fetch_rate, host_rate),
        )  # fmt: skip
        outages = tuple(Outage(*_event("--fail", text)) for text in fail)
        drains = tuple(Drain(*_event("--drain", text)) for text in drain)
        scenario = Scenario(shape, speed_up, seed, outages, drains, lag, Target(ttft, tpot))
        requests = _requests(trace, seed, limit)
        with why.open("wb") if why is not None else nullcontext() as file:
            outcomes = [_replay(requests, name, scenario, quiet, file) for name in dict.fromkeys(policy or POLICIES)]
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


def _replay(requests: list[TraceRequest], policy: str, scenario: Scenario, quiet: bool, why: BinaryIO | None) -> Outcome:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    encode = msgspec.json.Encoder().encode

    def tell(decision: Decision) -> None:
        assert why is not None
        why.write(encode(Explained(policy, decision)) + b"\n")

    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bars:
        task = bars.add_task(policy, total=len(requests))
        progress = partial(_show, bars, task)
        return replay(requests, policy, scenario, progress, tell if why is not None else None)


def _show(bars: Progress, task: TaskID, done: int) -> None:
    bars.update(task, completed=done)


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
