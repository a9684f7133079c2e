"""`manta top`: the status page in a terminal. Reads an endpoint's `/status.json`; imports httpx, rich and the page's parts.

A map's character is two cells, one above the other, where the terminal has colours; free blocks are its own background.
"""

import contextlib
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby, zip_longest

import httpx
import msgspec
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.segment import Segment
from rich.style import Style
from rich.table import Table
from rich.text import Text

from deploy.config.client import open_client
from deploy.status.document import ExpertsLine, GroupLine, Sample, StatusDocument
from deploy.status.maps import CACHED, FREE, HELD, SHARED, STATE_NAMES, thin, unpack
from deploy.status.words import NOTHING, amount, duration, latency, percent, plural, restarts, share

TIMEOUT_S = 5.0
COLOURS = {HELD: "#4596c1", SHARED: "#ffbf54", CACHED: "#5b7d8b"}
GLYPHS = {FREE: "·", HELD: "▒", SHARED: "█", CACHED: "░"}
BARS = "▁▂▃▄▅▆▇█"
FIGURE_CHARACTERS, SPARK_CHARACTERS = 15, 12
NARROWEST_MAP, TALLEST_MAP = 16, 8
FEWEST_GROUPS = 3
PHASES = {"ready": "green", "starting": "cyan"}


def top(
    url: str, api_key: str | None, interval: float, once: bool = False, console: Console | None = None, model: str | None = None
) -> None:
    """Shows a model of the endpoint at `url`, the first one unless it is named, every `interval` seconds until q or Ctrl-C; one
    look if `once`, or into a pipe.

    Errors: ValueError for a refused key, or an address that cannot be one of Manta's endpoints; OSError if the only look finds
    nobody.
    """
    if not interval > 0:
        raise ValueError(f"interval={interval} is not above 0: give the seconds between two looks")
    console = console or Console()
    asked = {} if model is None else {"model": model}
    with open_client(httpx.Client, url, api_key, timeout=TIMEOUT_S, follow_redirects=True, params=asked) as client:
        if once or not console.is_terminal:
            try:
                document = _ask(client)
            except httpx.HTTPError as error:
                raise OSError(f"no answer from {url}: {error}") from error
            console.print(render(document, "", console.width, None, console.color_system is not None))
            return
        live = Live(console=console, screen=True, auto_refresh=False)
        with contextlib.suppress(KeyboardInterrupt), _keys() as pressed, live:
            _follow(client, live, interval, pressed)


def _ask(client: httpx.Client) -> StatusDocument:
    """Errors: ValueError, httpx.HTTPError while nobody answers, which may pass."""
    answer = client.get("/status.json")
    if answer.status_code in (401, 403):
        raise ValueError(f"{client.base_url} asks for an API key that it knows: give --api-key-file")
    if answer.status_code == 404 and "model" in client.params:
        raise ValueError(f"{client.base_url} serves no model {client.params['model']!r}: /v1/models lists those that it does")
    answer.raise_for_status()
    try:
        return msgspec.json.decode(answer.content, type=StatusDocument)
    except msgspec.DecodeError as error:
        raise ValueError(f"{client.base_url} is not an endpoint of this version of Manta: {error}") from error


def _follow(client: httpx.Client, live: Live, interval: float, pressed: Callable[[float], str]) -> None:
    """Looks again and again; an endpoint that does not answer is a state, not an end."""
    document: StatusDocument | None = None
    since: str | None = None
    while True:
        began_s = time.monotonic()
        try:
            document, since = _ask(client), None
        except httpx.HTTPError:
            since = since or time.strftime("%H:%M:%S")
        lost = f"No answer from {client.base_url} since {since}. Asking again." if since else ""
        console = live.console
        colour = console.color_system is not None
        shown = Text(lost) if document is None else render(document, lost, console.width, console.height, colour)
        live.update(shown, refresh=True)
        while (left_s := began_s + interval - time.monotonic()) > 0:
            if pressed(left_s) in ("q", "Q"):
                return


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """A function that waits so many seconds for a key, and returns it or nothing. Without a terminal it only waits."""
    descriptors = [sys.stdin.fileno()] if sys.stdin.isatty() else []

    def pressed(seconds: float) -> str:
        return os.read(descriptors[0], 1).decode(errors="replace") if select.select(descriptors, [], [], seconds)[0] else ""

    before = [termios.tcgetattr(descriptor) for descriptor in descriptors]
    for descriptor in descriptors:
        tty.setcbreak(descriptor)
    try:
        yield pressed
    finally:
        for descriptor, attributes in zip(descriptors, before, strict=True):
            termios.tcsetattr(descriptor, termios.TCSADRAIN, attributes)


# ---- what is shown -----------------------------------------------------------------------------------------------------


def render(document: StatusDocument, notice: str, width: int, height: int | None, colour: bool) -> RenderableType:
    """The whole screen. height: lines that it may fill, with larger maps, and without the figures' bars where that makes room
    for groups; None: a line for each group."""
    above: list[RenderableType] = [_head(document), *_notice(document, notice), ""]
    below: list[RenderableType] = ["", *_cache(document)]
    if document.groups:
        below += [_legend(document, colour), ""]

    def rest(figures: Table) -> int:
        return (height or 0) - len(above) - len(below) - figures.row_count

    figures = _figures(document, width)
    if height is not None and document.groups and rest(figures) < 1 + min(len(document.groups), FEWEST_GROUPS):
        figures = _figures(document, width, bars=False)
    parts = [*above, figures, *below]
    if document.groups:
        parts.append(_groups(document, width, None if height is None else rest(figures), colour))
    return Group(*parts) if height is None else Screen(Group(*parts), height)


class Screen:
    """As many lines as a terminal has. If that is not all, the last one says so."""

    def __init__(self, content: RenderableType, height: int) -> None:
        self._content = content
        self._height = height

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self._content, options.update(height=None), pad=False)
        shown = lines if len(lines) <= self._height else lines[: self._height - 1]
        for line in shown:
            yield from line
            yield Segment.line()
        if left := len(lines) - len(shown):
            said = f"{plural(left, 'line')} more: enlarge the terminal, which has {self._height}"
            yield Text(said, "yellow", no_wrap=True, overflow="ellipsis")


def _head(document: StatusDocument) -> Text:
    unknown = document.now.epoch is None
    style = PHASES.get(document.phase, "red") if document.connected or unknown else "yellow"
    head = Text(no_wrap=True, overflow="ellipsis")
    head.append("Manta ", "bold").append(document.model, "dim").append("   ● ", style).append(document.phase)
    if document.now.epoch is not None:
        epoch = f"epoch {document.now.epoch}: {restarts(document.now.epoch)}"
        head.append(f"   scheduler up {duration(document.uptime_s)}, {epoch}", "dim")
    return head


def _notice(document: StatusDocument, notice: str) -> list[Text]:
    epochs = [sample.epoch for sample in document.history if sample.epoch is not None]
    if not notice and document.now.epoch is None and epochs:
        notice = "The scheduler cannot be reached. Requests are refused until it is back."
    elif not notice and document.starting:
        notice = "; ".join(
            f"group {start.group}: {start.phase}" + (f", {share(start.done, start.total)}" if start.total else "")
            for start in document.starting
        )
    elif not notice and document.phase != "ready":
        notice = document.progress[-1] if document.progress else ""
    return [Text(notice, "yellow", no_wrap=True, overflow="ellipsis")] if notice else []


def _figures(document: StatusDocument, width: int, bars: bool = True) -> Table:
    """The page's figures: name, value, note, and the last minutes as bars."""
    now, totals, samples = document.now, document.totals, (*document.history, document.now)
    up = sum(group.state != "down" for group in document.groups)
    hits = share(totals.cached_tokens, totals.started_tokens)
    wait = f"oldest {duration(document.oldest_wait_s)}" if now.waiting else ""
    figures: list[tuple[str, str, str, Callable[[Sample], float | None]]] = [
        ("Running", amount(now.running), f"in {plural(up, 'group')}", lambda s: s.running),
        ("Queued", amount(now.waiting), wait, lambda s: s.waiting),
        ("Preempted", amount(now.preempted), f"{amount(totals.preemptions)} in all", lambda s: s.preempted),
        ("Output tok/s", amount(now.output_tps), f"{amount(totals.output_tokens)} in all", lambda s: s.output_tps),
        ("Prompt tok/s", amount(now.prompt_tps), f"{amount(totals.started_tokens)} in all", lambda s: s.prompt_tps),
        ("Hit rate", percent(now.hit_rate), f"{hits} in all" if hits != NOTHING else "", lambda s: s.hit_rate),
        ("TTFT p50", latency(now.ttft_p50_ms), f"p99 {latency(now.ttft_p99_ms)}", lambda s: s.ttft_p50_ms),
        ("TPOT p50", latency(now.tpot_p50_ms), f"p99 {latency(now.tpot_p99_ms)}", lambda s: s.tpot_p50_ms),
        ("Scheduler", f"{percent(now.busy)} busy", plural(document.front_ends, "front end"), lambda s: s.busy),
    ]
    lines = -(-len(figures) // max(1, width // FIGURE_CHARACTERS))
    across = -(-len(figures) // lines)
    table = Table.grid(padding=(0, 2, 0, 0), expand=True)
    for _ in range(across):
        table.add_column(ratio=1, no_wrap=True)
    for at in range(0, len(figures), across):
        row = figures[at : at + across]
        table.add_row(*(Text(name, "dim") for name, *_ in row))
        table.add_row(*(Text(value, "bold") for _, value, *_ in row))
        table.add_row(*(Text(note, "dim") for _, _, note, _ in row))
        if bars:
            table.add_row(*(Text(spark([read(sample) for sample in samples]), COLOURS[HELD]) for *_, read in row))
    return table


def spark(values: Sequence[float | None]) -> str:
    """The newest values as bars from zero to the highest, each bar the mean of a stretch; a blank where nothing is known."""
    if not values:
        return ""
    per = -(-len(values) // SPARK_CHARACTERS)
    stretches = [[v for v in values[max(0, end - per) : end] if v is not None] for end in range(len(values), 0, -per)][::-1]
    means = [sum(stretch) / len(stretch) if stretch else None for stretch in stretches]
    highest = max((mean for mean in means if mean is not None), default=0.0) or 1.0
    return "".join(" " if mean is None else BARS[round((len(BARS) - 1) * mean / highest)] for mean in means)


def _cache(document: StatusDocument) -> list[Text]:
    totals = document.totals
    if not totals.started_tokens:
        return []
    parts = {
        "found": totals.cached_tokens,
        "inside a block": totals.miss_inside_block,
        "routed away": totals.miss_routed,
        "evicted": totals.miss_evicted,
        "cold": totals.miss_cold,
    }
    words = ", ".join(f"{name} {share(tokens, totals.started_tokens)}" for name, tokens in parts.items())
    return [Text.assemble(("Prefix cache  ", "dim"), words, no_wrap=True, overflow="ellipsis")]


def _legend(document: StatusDocument, colour: bool) -> Text:
    legend = Text("Blocks  ", "dim", no_wrap=True, overflow="ellipsis")
    for state in (HELD, SHARED, CACHED, FREE):
        count = sum((group.free, group.held, group.shared, group.cached)[state] for group in document.groups)
        mark = GLYPHS[state] if not colour or state == FREE else "■"
        legend.append(f"{mark} ", Style(color=COLOURS.get(state), dim=False))
        legend.append(f"{count:,}", "not dim").append(f" {STATE_NAMES[state]}   ")
    return legend


def _groups(document: StatusDocument, width: int, height: int | None, colour: bool) -> Table:
    """A line for each group, with its pool as large as the rest of the screen lets it be."""
    names = ["Group", "State", "Running", "In use", "Step", "Batch"]
    if any(group.experts for group in document.groups):
        names.append("Busiest expert")
    lines = len(document.groups) if height is None else max(1, height - 1)
    many = len(document.groups) > lines
    groups = document.groups[: max(1, lines - many)]  # one at least: what is too much, the screen cuts
    cells = [_cells(group)[: len(names)] for group in groups]
    taken = sum(2 + max(map(len, column)) for column in zip(names, *cells, strict=True))
    rows = 1 if height is None else max(1, min(TALLEST_MAP, lines // len(cells)))
    table = Table.grid(padding=(0, 2, 0, 0))
    for at in range(len(names)):
        table.add_column(justify="left" if at < 2 else "right", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_row(*(Text(name, "dim") for name in (*names, "Pool")))
    for group, row in zip(groups, cells, strict=True):
        style = "" if group.state == "up" else "yellow"
        drawn = pool(group, document.blocks_per_cell, max(NARROWEST_MAP, width - taken - 2), rows, colour)
        table.add_row(*(Text(cell, style) for cell in row), drawn)
    if many:
        table.add_row(*[""] * len(names), Text(f"and {len(document.groups) - len(groups)} more", "dim"))
    return table


def _cells(group: GroupLine) -> tuple[str, ...]:
    used = share(group.held + group.shared, group.total)
    step = latency(group.step_ms), amount(group.step_tokens)
    return str(group.group), group.state, amount(group.running), used, *step, _load(group.experts)


def _load(experts: ExpertsLine | None) -> str:
    """Of the least even layer."""
    return NOTHING if experts is None else f"{experts.most:.1f}x mean, {experts.expert} of layer {experts.layer}"


def pool(group: GroupLine, blocks_per_cell: int, width: int, rows: int, colour: bool) -> Text:
    """A pool in at most `rows` lines: with colours two cells a character, without them one."""
    if group.map is None:
        return Text("down", "dim")
    states = unpack(group.map, -(-group.total // blocks_per_cell))
    high = 2 if colour else 1
    states = thin(states.tobytes(), max(1, -(-len(states) // (width * rows * high))))
    lines = [states[at : at + width].tolist() for at in range(0, len(states), width)]
    if not colour:
        return Text("\n".join("".join(map(GLYPHS.__getitem__, line)) for line in lines))
    pairs = zip_longest(lines[::2], lines[1::2], fillvalue=())
    return Text("\n").join(_half_blocks(zip_longest(upper, lower, fillvalue=FREE)) for upper, lower in pairs)


def _half_blocks(cells: Iterable[tuple[int, int]]) -> Text:
    """One line: a character for each (upper, lower) cell."""
    line = Text()
    for (upper, lower), run in groupby(cells):
        if upper == lower == FREE:
            mark, style = GLYPHS[FREE], Style(dim=True)
        elif upper == FREE:
            mark, style = "▄", Style(color=COLOURS[lower])
        else:
            mark, style = "▀", Style(color=COLOURS[upper], bgcolor=COLOURS.get(lower))
        line.append(mark * len(list(run)), style)
    return line
