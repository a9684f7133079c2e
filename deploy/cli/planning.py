"""`manta plan`: whether a model fits, before anything is loaded. Imports torch when asked."""

from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from deploy.config.load import load_config, parse_size
from deploy.terminal.exits import reported_errors
from deploy.terminal.options import ConfigOption, DebugOption, flag, with_options

if TYPE_CHECKING:
    from cluster.config import EngineConfig
    from kvcache.layout import BlockLayout
    from scheduler.config.core import Resolved
    from workers.model.reading import DecoderConfig
    from workers.process.footprint import Footprint

UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


@with_options
def plan(
    model: Annotated[str, typer.Argument(help="As of --model: a folder, an id or a URL. Its config.json is enough.")],
    memory: Annotated[
        str | None, flag("--memory", help='What each rank has for weights and KV, "80GiB". Default: not asked.')
    ] = None,
    config: ConfigOption = None,
    debug: DebugOption = False,
    *,
    engine: dict[str, Any],
) -> None:
    """Say what a model takes, weights and KV of each rank, and how long a context there is room for. Nothing is loaded.

    manta plan /models/Qwen3-30B-A3B --tensor-parallel-size 2 --memory 80GiB

    Ends with 1 where there is no room for one sequence of the longest context.
    """
    with reported_errors(debug):
        settings = load_config(config, {**engine, "model": model}).engine
        lines, fits = plan_lines(settings, None if memory is None else parse_size("memory", memory))
        for line in lines:
            typer.echo(line)
    if not fits:
        raise typer.Exit(1)


def plan_lines(config: "EngineConfig", memory: int | None) -> tuple[list[str], bool]:
    """And whether there is room. memory: bytes of each rank; None: not known. Activations and graphs are not counted: a GPU
    measures them at start. Weights that a GPU keeps in fewer bits are counted so, but for device cpu.

    Errors: ValueError for a model that is not served so.
    """
    from cluster.resolve import check_adapters, model_length
    from workers.model.config.architectures import torch_dtype
    from workers.model.reading import read_model
    from workers.model.sources.files import Need
    from workers.model.sources.find import find_checkpoint
    from workers.process.footprint import footprint

    found = read_model(find_checkpoint(config, Need.CONFIG), config)
    size, longest = config.tensor_parallel_size, model_length(found, config.max_model_len)
    dtype = found.dtype or torch_dtype("bfloat16") if config.dtype == "auto" else torch_dtype(config.dtype)
    check_adapters(config, found)
    taken = footprint(
        found, size, dtype, config.block_size, config.kv_dtype, keeps=config.device != "cpu",
        adapters=config.lora_room,
    )  # fmt: skip
    weights_are = "" if found.scheme is None else f", weights quantised: {found.scheme}, {taken.kept}"
    layout, resolved = taken.layout, resolve_lengths(found, longest, config)
    kinds = kinds_of(found, resolved, layout)
    numbers = str(dtype).removeprefix("torch.")
    lines = [
        f"{found.architecture}, {numbers}, KV in {layout.dtype}, {size} rank(s) a group{weights_are}",
        f"weights          {in_units(taken.weight_bytes)} a rank",
        *([f"LoRA adapters    {in_units(taken.adapter_bytes)} a rank"] if taken.adapter_bytes else []),
        f"KV               {in_units(layout.token_bytes)} a token, {in_units(layout.block_bytes)} a block of "
        f"{layout.block_size} tokens, a rank",
        *([f"  of that        {in_units(kinds[1].layout.token_bytes)} in layers that see a window"] if kinds[1:] else []),
        f"longest context  {longest:,} tokens: {in_units(_bytes(kinds))} a rank",
    ]
    room = config.kv_memory
    if memory is not None:
        left = int(memory * config.gpu_memory_fraction) - taken.weight_bytes - taken.adapter_bytes
        lines.append(f"room for KV      {in_units(max(0, left))} of {in_units(memory)}, less what steps need beside weights")
        if left < layout.block_bytes:
            return [*lines, "it does not fit: raise tensor_parallel_size, or choose a smaller dtype"], False
        if room is not None and room > left:
            return [*lines, f"it does not fit: kv_memory is {in_units(room)}; lower it to what there is room for"], False
        room = left if room is None else room
    if room is None:
        needs = [_needs_line(taken, config.gpu_memory_fraction, kinds, rows) for rows in sorted({1, config.max_num_seqs})]
        return [*lines, *needs], True
    said, fits = _room_lines(room, kinds, resolved, config.max_num_seqs)
    return [*lines, *said], fits


class Kind(NamedTuple):
    """Layers that see equally far, in a model. layout: of their blocks. held: that the longest sequence holds at once; resting:
    while it decodes."""

    layout: "BlockLayout"
    held: int
    resting: int


def kinds_of(found: "DecoderConfig", resolved: "Resolved", layout: "BlockLayout") -> list[Kind]:
    """One, or those that see all and those that see a window."""
    from kvcache.layout import LayerKinds
    from scheduler.state.window import Window

    blocks, block_size = layout.blocks_for(resolved.max_model_len), layout.block_size
    whole, narrow = Window.of(resolved, block_size), Window.of_narrow(resolved, block_size)
    if narrow is None:
        held = blocks if whole is None else min(blocks, whole.most)
        return [Kind(layout, held, held)]
    of = LayerKinds(found.narrow(resolved.max_model_len)[0])
    resting = min(blocks, narrow.at_rest(resolved.grant_ahead, block_size))
    return [
        Kind(layout.of_kind(of, False), blocks, blocks), Kind(layout.of_kind(of, True), min(blocks, narrow.most), resting)
    ]  # fmt: skip


def resolve_lengths(found: "DecoderConfig", longest: int, config: "EngineConfig") -> "Resolved":
    """As on a GPU, where more is granted ahead."""
    from cluster.resolve import DEPTH, REPORTING, prefill_ahead
    from scheduler.config.core import Resolved

    depth, steps = max(DEPTH.values()), config.report_steps or max(steps for steps, _ in REPORTING.values())
    return Resolved(
        longest, 2 * (min(steps, config.block_size) + depth), found.window(longest), prefill_ahead(config, depth),
        found.narrow(longest)[1],
    )  # fmt: skip


def _bytes(kinds: list[Kind], rows: int = 1) -> int:
    """Of so many sequences of the longest context, of which one is in its prompt."""
    return sum(((rows - 1) * kind.resting + kind.held) * kind.layout.block_bytes for kind in kinds)


def _needs_line(taken: "Footprint", share: float, kinds: list[Kind], rows: int) -> str:
    """What a rank must have, of which `share` is used."""
    needs = in_units(int((taken.weight_bytes + taken.adapter_bytes + _bytes(kinds, rows)) / share))
    blocks = rows * kinds[0].held
    return f"batch of {rows:<7} {blocks:,} blocks, at the longest context: {needs} a rank, and what steps need beside"


def _room_lines(room: int, kinds: list[Kind], resolved: "Resolved", rows: int) -> tuple[list[str], bool]:
    """And whether one sequence of the longest context fits."""
    from workers.execution.spec import pool_sizes

    layout, held = kinds[0].layout, kinds[0].held
    one = sum(kind.layout.block_bytes for kind in kinds)
    if room < one:
        return [f"blocks           none: one takes {in_units(one)}; raise kv_memory, or lower block_size"], False
    blocks, narrow = pool_sizes(room, [kind.layout for kind in kinds], resolved, rows)
    tokens = blocks * layout.block_size
    beside: list[str] = []
    if kinds[1:]:
        resting = min(blocks, kinds[1].resting)
        beside = [f"  and            {narrow:,} of layers that see a window: {resting} for a sequence that decodes"]
        rows = min(rows, narrow // resting)
    if blocks < held:
        said = f"blocks           {blocks:,}: a sequence of {tokens:,} tokens at most; lower max_model_len to that"
        if _bytes(kinds) <= room:  # `divide` keeps half of them for others
            beside.append("  since          the longest would leave too few blocks of layers that see a window for others")
        return [said, *beside], False
    at_once = min(rows, blocks // held)
    said = f"blocks           {blocks:,}, {tokens:,} tokens: {at_once} sequence(s) of the longest context at once"
    return [said, *beside], True


def in_units(number: int) -> str:
    """Bytes, for people."""
    amount, unit = float(number), 0
    while amount >= 1024 and unit < len(UNITS) - 1:
        amount, unit = amount / 1024, unit + 1
    return f"{amount:,.0f} {UNITS[unit]}" if unit == 0 else f"{amount:,.2f} {UNITS[unit]}"
