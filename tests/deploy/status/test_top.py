"""`manta top`: the same numbers in a terminal; once for a pipe, again and again until a key."""

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import msgspec
import numpy as np
import pytest
from rich.color import Color
from rich.console import Console

from deploy.status.document import ExpertsLine, GroupLine, Sample, StatusDocument, Totals
from deploy.status.maps import pack
from deploy.status.top import COLOURS, pool, render, spark, top
from scheduler.server.stats import GroupStart
from tests.deploy.status.fake_cluster import FakeCluster
from tests.deploy.status.serving import Server, make_app, serving

PATIENCE_S = 60.0


@pytest.fixture
def cluster() -> FakeCluster:
    cluster = FakeCluster(groups=3, blocks=600, load=5)
    for _ in range(6):
        cluster.advance(4.0)
    return cluster


def line(states: list[int], **changes: object) -> GroupLine:
    """One group by the states of its blocks."""
    counts = [states.count(state) for state in range(4)]
    one = GroupLine(
        group=0, state="up", total=len(states), free=counts[0], held=counts[1], shared=counts[2], cached=counts[3], running=2,
        starved=0, backlog_tokens=0, evictions=0, step_ms=None, step_tokens=None, map=pack(np.array(states, dtype=np.uint8)),
    )  # fmt: skip
    return msgspec.structs.replace(one, **changes)


def document(**changes: object) -> StatusDocument:
    one = StatusDocument(
        phase="ready", connected=True, model="tiny", block_size=256, progress=(), starting=(), uptime_s=61.0, front_ends=1,
        target_groups=1, oldest_wait_s=0.25, waiting_tokens=0, blocks_per_cell=1, groups=(line([1, 1, 2, 3, 0, 0]),),
        totals=Totals(started_tokens=100, cached_tokens=25, miss_cold=75),
        now=Sample(5.0, 0, 12, 3, 1, 8412.0, 31_200.0, 0.25, 84.0, 1410.0, 9.5, 23.0, 0.5, 0.16, 0.031),
    )  # fmt: skip
    return msgspec.structs.replace(one, **changes)


def shown(what: StatusDocument, width: int = 100, height: int | None = None, notice: str = "") -> str:
    console = Console(file=io.StringIO(), width=width, record=True)
    console.print(render(what, notice, width, height, colour=False))
    return console.export_text()


def test_the_numbers_are_those_of_the_page() -> None:
    text = shown(document())
    for words in (
        "Manta tiny   ● ready   scheduler up 1 min, epoch 0: never restarted", "8,412",
        "31.2k", "25 %", "84 ms", "p99 1.41 s", "9.5 ms",
        "p99 23 ms", "3.1 % busy", "oldest 0.2 s", "found 25 %", "cold 75 %",
        "2 held", "1 shared", "1 cached", "2 free", "▒▒█░··",
    ):  # fmt: skip
        assert words in text


def test_of_a_model_with_experts_the_busiest_is_shown() -> None:
    assert "expert" not in shown(document())
    experts = ExpertsLine(3, 2.58, 4.25, 3, 12)
    lines = (line([1, 0], experts=experts), line([1, 0], group=1, state="down"))
    text = shown(document(groups=lines))
    assert "Busiest expert" in text
    assert "4.2x mean, 12 of layer 3" in text
    rows = shown(document(groups=lines), 40, 50).rstrip("\n").split("\n")
    assert max(map(len, rows)) <= 40


def test_what_is_not_known_is_not_a_number() -> None:
    gone = document(phase="unreachable", now=Sample(9.0), groups=(), history=(Sample(8.0, epoch=0),))
    text = shown(gone)
    assert "The scheduler cannot be reached" in text
    assert "–" in text
    assert "epoch" not in text
    starting = document(phase="starting", now=Sample(9.0), groups=(), starting=(GroupStart(0, "loading weights", 3, 4),))
    assert "group 0: loading weights, 75 %" in shown(starting)
    assert "No answer since noon" in shown(document(), notice="No answer since noon")


@pytest.mark.parametrize("width", [40, 80, 120, 200])
@pytest.mark.parametrize("groups", [1, 8, 64])
def test_the_screen_is_kept(width: int, groups: int) -> None:
    lines = tuple(line([1, 0, 3, 2] * 400, group=group) for group in range(groups))
    text = shown(document(groups=lines), width, height=50)
    rows = text.rstrip("\n").split("\n")
    assert max(map(len, rows)) <= width
    assert len(rows) <= 50
    listed = len(re.findall(r"^\d+ +up ", text, re.MULTILINE))
    assert listed == groups or f"and {groups - listed} more" in text


@pytest.mark.parametrize("groups", [1, 3, 64])
def test_a_small_terminal_shows_groups_rather_than_bars(groups: int) -> None:
    """The usual 80 x 24 less a frame."""
    lines = tuple(line([1, 0, 3, 2] * 400, group=group) for group in range(groups))
    text = shown(document(groups=lines, history=(document().now,) * 20), 70, height=20)
    rows = text.rstrip("\n").split("\n")
    assert len(rows) <= 20
    listed = len(re.findall(r"^\d+ +up ", text, re.MULTILINE))
    assert listed == groups or f"and {groups - listed} more" in rows[-1]
    assert listed


@pytest.mark.parametrize(("width", "height"), [(70, 12), (40, 20), (30, 6), (20, 1)])
def test_a_screen_that_is_too_small_says_so(width: int, height: int) -> None:
    groups = tuple(line([1, 0, 3, 2] * 400, group=group) for group in range(3))
    whole = shown(document(groups=groups), width, 200).rstrip("\n").split("\n")
    rows = shown(document(groups=groups), width, height).rstrip("\n").split("\n")
    assert len(rows) == height
    left = int(re.match(r"(\d+) lines more", rows[-1])[1])  # type: ignore[index]
    assert height - 1 + left <= len(whole)
    assert width < 60 or rows[-1].rstrip() == f"{left} lines more: enlarge the terminal, which has {height}"


def test_a_pool_in_half_blocks() -> None:
    drawn = pool(line([1, 2, 0, 0, 3, 0, 0, 2]), 1, width=4, rows=1, colour=True)
    assert drawn.plain == "▀▀·▄"
    console = Console(force_terminal=True, color_system="truecolor", file=io.StringIO())
    first, second, _, fourth = (segment.style for segment in drawn.render(console) if segment.text.strip())
    assert first is not None
    assert second is not None
    assert fourth is not None
    held, shared, cached = (Color.parse(COLOURS[state]) for state in (1, 2, 3))
    assert (first.color, first.bgcolor) == (held, cached)
    assert (second.color, second.bgcolor) == (shared, None)  # below is free: the terminal's own ground
    assert fourth.color == shared


@pytest.mark.parametrize(
    ("values", "bars"), [([], ""), ([0.0, 0.0], "▁▁"), ([0.0, 7.0], "▁█"), ([None, 4.0, 8.0], " ▅█"), ([1.0] * 24, "█" * 12)]
)
def test_sparks(values: list[float | None], bars: str) -> None:
    assert spark(values) == bars


def test_one_look_for_a_pipe(cluster: FakeCluster, server: Server) -> None:
    file = io.StringIO()
    top(server.url, None, 1.0, console=Console(file=file, width=100))
    assert f"{sum(len(pool.running) for pool in cluster.pools)}" in file.getvalue()
    assert "\x1b" not in file.getvalue()
    assert len(re.findall(r"^\d +up ", file.getvalue(), re.MULTILINE)) == 3


def test_errors_say_what_to_do(cluster: FakeCluster) -> None:
    with serving(make_app(cluster, api_key="secret")) as server:
        with pytest.raises(ValueError, match="give --api-key-file"):
            top(server.url, "wrong", 1.0, once=True)
        top(server.url, "secret", 1.0, once=True, console=Console(file=io.StringIO()))
        url = server.url
    with pytest.raises(OSError, match=f"no answer from {url}"):
        top(url, None, 1.0, once=True)
    with pytest.raises(ValueError, match="above 0"):
        top(url, None, 0.0)
    with pytest.raises(ValueError, match="no address"):
        top("ftp://there", None, 1.0)


class Terminal:
    """`manta top` on a pseudo-terminal."""

    def __init__(self, url: str) -> None:
        self._leader, follower = pty.openpty()
        command = f"from deploy.status.top import top; top({url!r}, None, 0.05)"
        environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"}
        self._child = subprocess.Popen(
            [sys.executable, "-c", command], stdin=follower, stdout=follower, stderr=follower, env=environment
        )
        os.close(follower)
        self.text = ""

    def wait(self, words: str) -> None:
        """Until it has shown these words since the last wait."""
        deadline_s = time.monotonic() + PATIENCE_S
        while words not in self.text:
            assert time.monotonic() < deadline_s, f"no {words!r} in {self.text!r}"
            if select.select([self._leader], [], [], 0.1)[0]:
                self.text += os.read(self._leader, 65536).decode(errors="replace")
        self.text = self.text.partition(words)[2]

    def press(self, key: str) -> None:
        os.write(self._leader, key.encode())

    def interrupt(self) -> None:
        self._child.send_signal(signal.SIGINT)

    def ended(self) -> int:
        """Its exit code; what it still writes is read, so that it never waits for this side."""
        deadline_s = time.monotonic() + PATIENCE_S
        while (code := self._child.poll()) is None:
            assert time.monotonic() < deadline_s
            if select.select([self._leader], [], [], 0.05)[0]:
                self._drain()
        self._drain()
        os.close(self._leader)
        return code

    def _drain(self) -> None:
        try:
            self.text += os.read(self._leader, 65536).decode(errors="replace")
        except OSError:  # Linux says so when the other side has closed
            return


@pytest.mark.parametrize("key", ["q", "Ctrl-C"])
def test_a_terminal_until_it_is_left(key: str, cluster: FakeCluster) -> None:
    with serving(make_app(cluster)) as server:
        port, terminal = server.port, Terminal(server.url)
        terminal.wait("\x1b[?1049h")  # the other screen
        terminal.wait("epoch 0")
    terminal.wait("No answer from")
    cluster.restart()
    with serving(make_app(cluster), port):
        terminal.wait("epoch 1")
        if key == "q":
            terminal.press("q")
        else:
            terminal.interrupt()
        assert terminal.ended() == 0
        assert "\x1b[?1049l" in terminal.text
        assert "Traceback" not in terminal.text


def test_of_several_models_one_is_asked_for_by_its_name(cluster: FakeCluster) -> None:
    console = Console(file=io.StringIO(), width=100, record=True)
    with serving(make_app(cluster, further={"org/other": FakeCluster(groups=1, blocks=100, load=0)})) as server:
        top(server.url, None, 1.0, once=True, console=console, model="org/other")
        assert "Manta org/other" in console.export_text()
        with pytest.raises(ValueError, match="serves no model 'third'"):
            top(server.url, None, 1.0, once=True, console=console, model="third")
