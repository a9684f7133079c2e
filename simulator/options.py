"""What a replay may be told: records of options that belong together, and a command of them.

Imports typer, and whatever the defaults are taken from.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from deploy.terminal.options import flag
from simulator.engines import ClusterShape
from simulator.report import LatencyTarget
from simulator.time_model import TimeModel, calibrated
from simulator.transfers import LinkModel

SHAPE, TIMES, LINKS, TARGET = ClusterShape(), TimeModel(), LinkModel(), LatencyTarget()


def _flag(name: str, default: Any, help: str) -> Any:
    """default: in words."""
    return flag(name, f"{help} Default: {default}.")


@dataclass(frozen=True, kw_only=True)
class ShapeOptions:
    """Of the cluster, by the names of `ClusterShape`."""

    groups: Annotated[int, _flag("--groups", SHAPE.groups, "Groups of workers.")] = SHAPE.groups
    blocks: Annotated[int, _flag("--blocks", SHAPE.blocks, "Blocks in the pool of each group.")] = SHAPE.blocks
    block_size: Annotated[
        int, _flag("--block-size", SHAPE.block_size, "Tokens in a block, a power of two.")
    ] = SHAPE.block_size
    max_num_seqs: Annotated[
        int, _flag("--max-num-seqs", SHAPE.max_num_seqs, "Sequences that one group runs at once.")
    ] = SHAPE.max_num_seqs
    max_num_batched_tokens: Annotated[
        int, _flag("--max-num-batched-tokens", SHAPE.max_num_batched_tokens, "Tokens that one step of a group computes.")
    ] = SHAPE.max_num_batched_tokens
    window: Annotated[
        int | None, _flag("--window", "all", "Tokens that every layer of the model sees: blocks before them are given back.")
    ] = None
    narrow: Annotated[
        int | None,
        _flag("--narrow", "none do", "Tokens that some layers see, beside others that see all: they have blocks of their own."),
    ] = None
    narrow_share: Annotated[
        float, _flag("--narrow-share", SHAPE.narrow_share, "The part of a token's KV that is these layers'.")
    ] = SHAPE.narrow_share
    hash_stride: Annotated[
        int, _flag("--hash-stride", SHAPE.hash_stride, "Tokens in common from which part of a block is reused; 0: none is.")
    ] = SHAPE.hash_stride
    wait_for_prefix: Annotated[
        bool,
        _flag(
            "--wait-for-prefix/--no-wait-for-prefix", "it does",
            "Manta lets a sequence wait for a prefix that another is computing.",
        ),
    ] = SHAPE.wait_for_prefix
    host_blocks: Annotated[
        int, _flag("--host-blocks", SHAPE.host_blocks, "Blocks in the host memory of each group, for manta-host.")
    ] = SHAPE.host_blocks

    def shape(self, links: LinkModel, time: TimeModel) -> ClusterShape:
        """Errors: ValueError."""
        return ClusterShape(**asdict(self), links=links, time=time)


@dataclass(frozen=True, kw_only=True)
class LinkOptions:
    """How fast blocks move."""

    fetch_rate: Annotated[
        float, _flag("--fetch-rate", "100000", "Tokens a second that a group sends, or receives.")
    ] = LINKS.fetch_tokens_per_s
    host_rate: Annotated[
        float, _flag("--host-rate", "250000", "Tokens a second to host memory, or from it.")
    ] = LINKS.host_tokens_per_s

    def links(self) -> LinkModel:
        return LinkModel(self.fetch_rate, self.host_rate)


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How much of the trace, and how fast."""

    speed_up: Annotated[float, _flag("--speed-up", 1.0, "Load, as a multiple of the trace's own.")] = 1.0
    limit: Annotated[int | None, _flag("--limit", "all", "Only so many requests, the first in the file.")] = None
    seed: Annotated[int, _flag("--seed", 0, "Makes a replay repeatable: equal seeds, equal results.")] = 0


@dataclass(frozen=True, kw_only=True)
class EventOptions:
    """What happens meanwhile."""

    fail: Annotated[
        list[str],
        flag("--fail", "GROUP@SECONDS[:DOWN]: its workers die then, and are back DOWN seconds later (60); repeatable."),
    ] = field(default_factory=list)
    drain: Annotated[
        list[str],
        flag(
            "--drain", "GROUP@SECONDS[:STAY]: takes nobody new then; who runs there STAY seconds later (0) moves; repeatable."
        ),
    ] = field(default_factory=list)
    lag: Annotated[float, _flag("--lag", 1.0, "Seconds by which the view of the lagging router is old.")] = 1.0


@dataclass(frozen=True, kw_only=True)
class TimeOptions:
    """What steps take."""

    calibrate: Annotated[
        str | None,
        _flag("--calibrate", "the four below", "FILE[:MODEL]: times from the output of python -m benchmarks.engine --json."),
    ] = None
    prefill_rate: Annotated[
        float | None, _flag("--prefill-rate", "6000", "Prompt tokens a second of one group.")
    ] = None
    decode_step: Annotated[float | None, _flag("--decode-step", TIMES.decode_step_s, "Seconds of any step.")] = None
    sequence_time: Annotated[
        float | None, _flag("--sequence-time", TIMES.sequence_s, "Seconds more for each decoding sequence.")
    ] = None
    context_time: Annotated[
        float | None, _flag("--context-time", TIMES.context_token_s, "Seconds more for each token of its context.")
    ] = None

    def times(self) -> TimeModel:
        """Errors: ValueError, OSError."""
        base = TIMES
        if self.calibrate is not None:
            name, _, model = self.calibrate.partition(":")
            base = calibrated(Path(name), model or None)
        return TimeModel(
            base.prefill_tokens_per_s if self.prefill_rate is None else self.prefill_rate,
            base.decode_step_s if self.decode_step is None else self.decode_step,
            base.sequence_s if self.sequence_time is None else self.sequence_time,
            base.context_token_s if self.context_time is None else self.context_time,
        )


@dataclass(frozen=True, kw_only=True)
class TargetOptions:
    """What counts as served well."""

    ttft: Annotated[float, _flag("--ttft", TARGET.ttft_s, "Seconds to the first token that goodput allows.")] = TARGET.ttft_s
    tpot: Annotated[float, _flag("--tpot", TARGET.tpot_s, "Seconds a token after it that goodput allows.")] = TARGET.tpot_s

    def target(self) -> LatencyTarget:
        return LatencyTarget(self.ttft, self.tpot)


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """What is told, and where."""

    why: Annotated[
        Path | None,
        _flag("--why", "none", "A file for one JSON line each time Manta sends a request to a group: why there."),
    ] = None
    json: Annotated[bool, _flag("--json", "no", "One JSON object, by policy, as the last line of stdout.")] = False
    quiet: Annotated[bool, _flag("--quiet", "no", "No progress on stderr.")] = False


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the fields of each record that it takes as options of its own, in the record's place."""
    hints = get_type_hints(command, include_extras=True)
    records: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}

    @functools.wraps(command)
    def run(**given: Any) -> None:
        made = {name: record(**{f.name: given.pop(f.name) for f in fields(record)}) for name, record in records.items()}
        command(**made, **given)

    every: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        record = records.get(parameter.name)
        every += _options(record) if record is not None else [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)]
    run.__signature__ = inspect.Signature(every)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in every}
    return run


def _options(record: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(record, include_extras=True)
    return [
        inspect.Parameter(
            f.name, inspect.Parameter.KEYWORD_ONLY, annotation=hints[f.name],
            default=f.default if f.default_factory is MISSING else f.default_factory(),
        )
        for f in fields(record)
    ]  # fmt: skip
