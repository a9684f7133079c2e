"""What the terminal shows: progress, text as it streams, and the closing table. Imports rich; nothing of the engine but
its stats."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from cluster.engine import EngineStats
from deploy.config.serve import ServeConfig
from deploy.frontend.outputs import RequestOutput
from scheduler.server.stats import ClusterStatus

LIVE_LINES = 4
"""Lines of each request under way that a terminal shows; the whole text follows when it has ended."""

REFRESH_PER_S = 10


Show = Callable[[int, RequestOutput], None]
"""Takes (position of the prompt, its output so far)."""


class PlainView:
    """For pipes and files: one output after the other in the order of the prompts, each as it grows once it is its
    turn.

    A single output is its bare text; several have a line above each that says which it is.
    """

    def __init__(self, labels: Sequence[str]) -> None:
        self._labels = labels
        self._latest: dict[int, RequestOutput] = {}
        self._position = 0  # of the request whose turn it is
        self._choice = 0
        self._written = -1  # characters of that choice; -1 before its heading

    def show(self, position: int, output: RequestOutput) -> None:
        self._latest[position] = output
        while (current := self._latest.get(self._position)) is not None and self._write(current):
            del self._latest[self._position]
            self._position, self._choice = self._position + 1, 0

    def _write(self, output: RequestOutput) -> bool:
        """Writes what is new of one request; True once all of it is out."""
        while self._choice < len(output.outputs):
            choice = output.outputs[self._choice]
            if self._written < 0:
                self._head(len(output.outputs))
            sys.stdout.write(choice.text[self._written :])
            self._written = len(choice.text)
            if choice.finish_reason is None:
                sys.stdout.flush()
                return False
            if not choice.text.endswith("\n"):
                sys.stdout.write("\n")
            self._choice, self._written = self._choice + 1, -1
        sys.stdout.flush()
        return True

    def _head(self, choices: int) -> None:
        self._written = 0
        if len(self._labels) > 1 or choices > 1:
            which = f", choice {self._choice + 1}" if choices > 1 else ""
            count = f"{self._position + 1}/{len(self._labels)}{which}"
            sys.stdout.write(f"── {count}: {self._labels[self._position]} ──\n")


class LiveView:
    """For a terminal: the last lines of everything under way and a progress bar below; what has ended scrolls up
    whole."""

    def __init__(self, labels: Sequence[str], console: Console) -> None:
        self._labels = labels
        self._console = console
        self._growing: dict[int, RequestOutput] = {}
        self._tokens = 0
        self._bar = _bar(console)
        self._task = self._bar.add_task("", total=len(labels), tokens=0)
        self.live = Live(
            get_renderable=self._render, console=console, refresh_per_second=REFRESH_PER_S, transient=True,
            vertical_overflow="crop",
        )  # fmt: skip

    def show(self, position: int, output: RequestOutput) -> None:
        self._tokens += sum(choice.new_tokens for choice in output.outputs)
        if output.finished:
            self._growing.pop(position, None)
            self._console.print(self._panel(position, output, None))
            self._bar.advance(self._task)
        else:
            self._growing[position] = output
        self._bar.update(self._task, tokens=self._tokens)

    def _render(self) -> RenderableType:
        room = max(1, (self._console.height - 2) // (LIVE_LINES + 2))
        growing = sorted(self._growing.copy().items())[:room]
        return Group(*(self._panel(position, output, LIVE_LINES) for position, output in growing), self._bar)

    def _panel(self, position: int, output: RequestOutput, lines: int | None) -> Panel:
        texts = [_last_lines(choice.text, lines) for choice in output.outputs]
        if output.error:
            texts.append(f"failed: {output.error}")
        title = Text(f"{position + 1}: {self._labels[position]}")
        style = "red" if output.error else "green" if output.finished else "dim"
        return Panel(Text("\n┄┄┄\n".join(texts)), title=title, title_align="left", border_style=style)


@contextmanager
def request_bar(total: int, shown: bool) -> Iterator[Callable[[RequestOutput], None]]:
    """A bar on stderr that counts ended requests and their tokens; nothing where stderr is not a terminal."""
    console = Console(stderr=True)
    if not shown or not console.is_terminal:
        yield lambda _: None
        return
    with _bar(console) as bar:
        task = bar.add_task("", total=total, tokens=0)
        tokens = 0

        def advance(output: RequestOutput) -> None:
            nonlocal tokens
            tokens += sum(len(choice.token_ids) for choice in output.outputs)
            bar.update(task, advance=1, tokens=tokens)

        yield advance


@contextmanager
def start_progress(shown: bool) -> Iterator[Callable[[str], None]]:
    """What the start is doing: a spinner on a terminal, one line each elsewhere."""
    console = Console(stderr=True)
    if not shown:
        yield lambda _: None
    elif console.is_terminal:
        with console.status("Starting") as status:
            yield lambda words: status.update(Text(words))
    else:
        yield lambda words: console.print(words, markup=False, highlight=False, soft_wrap=True)


class StartView:
    """What an endpoint's start is doing, on stderr: a bar for each group on a terminal, one line a phase elsewhere; then where
    it listens, on stdout."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bars = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            console=self._console, transient=True,
        )  # fmt: skip
        self._tasks: dict[int, TaskID] = {}
        self._phases: dict[int, str] = {}
        self._said = 0

    def say(self, words: str) -> None:
        self._console.print(words, markup=False, highlight=False, soft_wrap=True)

    def show(self, status: ClusterStatus) -> None:
        """The cluster as it stands; what was shown before is not said again."""
        for words in status.progress[self._said :]:
            self.say(words)
        self._said = len(status.progress)
        for start in status.starting:
            if self._console.is_terminal:
                self._bars.start()
                task = self._tasks.get(start.group)
                if task is None:
                    task = self._tasks[start.group] = self._bars.add_task("")
                words = f"group {start.group}: {start.phase}"
                self._bars.update(task, description=words, completed=start.done, total=start.total or None)
            elif self._phases.get(start.group) != start.phase:
                self._phases[start.group] = start.phase
                self.say(f"group {start.group}: {start.phase}")

    def ready(self, model: str, serve: ServeConfig) -> None:
        """Where it listens, and a request to paste."""
        self.close()
        url = f"http://{serve.host}:{serve.port}"
        body = json.dumps({"model": model, "prompt": "def add(a, b):", "max_tokens": 32})
        grpc = f", gRPC on {serve.host}:{serve.grpc_port}" if serve.grpc_port is not None else ""
        lines = (
            f"{model} is ready at {url}{grpc}", "",
            f"  curl {url}/v1/completions -H 'Content-Type: application/json' -d '{body}'", "",
            f"The cluster at a glance: {url}/ or `manta top {url}`. Ctrl-C ends it.",
        )  # fmt: skip
        sys.stdout.write("\n".join(lines) + "\n")
        sys.stdout.flush()

    def close(self) -> None:
        self._bars.stop()


def print_summary(stats: EngineStats, elapsed_s: float) -> None:
    """The closing table, on stderr: counters of the run, then the blocks of each group."""
    console = Console(stderr=True)
    run = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    rate = stats.output_tokens / elapsed_s if elapsed_s > 0 else 0.0
    columns = {
        "requests": f"{stats.requests:,}",
        "prompt tokens": f"{stats.prompt_tokens:,}",
        "cached tokens": f"{stats.cached_tokens:,}",
        "output tokens": f"{stats.output_tokens:,}",
        "tokens/s": f"{rate:,.1f}",
        "preemptions": f"{stats.preemptions:,}",
    }
    for name in columns:
        run.add_column(name, justify="right")
    run.add_row(*columns.values())
    groups = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("group", "state", "blocks held", "cached", "free", "total"):
        groups.add_column(name, justify="right")
    for group in stats.groups:
        blocks = (group.held_blocks, group.cached_blocks, group.free_blocks, group.total_blocks)
        groups.add_row(str(group.group), "up" if group.up else "down", *(f"{count:,}" for count in blocks))
    console.print()
    console.print(run)
    console.print()
    console.print(groups)


@contextmanager
def shown_outputs(labels: Sequence[str], stream: bool, quiet: bool) -> Iterator[Show]:
    """stream: the text goes to stdout as it grows; otherwise only progress is shown, on stderr, unless quiet."""
    console = Console()
    if not stream:
        with request_bar(len(labels), not quiet) as advance:
            yield lambda _, output: advance(output) if output.finished else None
    elif console.is_terminal and not quiet:
        view = LiveView(labels, console)
        with view.live:
            yield view.show
    else:
        yield PlainView(labels).show


def _bar(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(), BarColumn(), MofNCompleteColumn(), TextColumn("requests, {task.fields[tokens]:,} tokens"),
        TimeElapsedColumn(), console=console,
    )  # fmt: skip


def _last_lines(text: str, lines: int | None) -> str:
    return text.strip("\n") if lines is None else "\n".join(text.strip("\n").split("\n")[-lines:])
