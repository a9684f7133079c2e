"""Who is stopped for good is ended by what is beside it, and nobody else is."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from scheduler.protocol import sentinel
from tests.shared.processes import alive, descendants, kept_stopped, wait_gone
from tests.shared.waiting import until

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system has no /proc")

PATIENCE_S = 60.0
LONG_ENOUGH_S = 1.5
"""For whatever should not happen to have happened."""

WAITS = "time.sleep(600)"
HOLDS_THE_LOCK = "sum(range(10 ** 11))"


@pytest.fixture
def watched() -> Iterator[Callable[..., tuple[int, int]]]:
    """A process that does this, in a group of its own, and its sentinel."""
    made: list[subprocess.Popen[str]] = []

    def start(work: str = WAITS, stopped_s: float = 0.5) -> tuple[int, int]:
        code = f"import time; from scheduler.protocol.sentinel import watch_this_process; watch_this_process({stopped_s})"
        made.append(
            subprocess.Popen(
                [sys.executable, "-c", f"{code}; print('here', flush=True); {work}"], stdout=subprocess.PIPE, text=True,
                start_new_session=True,
            )
        )  # fmt: skip
        assert made[-1].stdout is not None
        assert made[-1].stdout.readline() == "here\n"
        (beside,) = descendants(made[-1].pid)
        return made[-1].pid, beside

    yield start
    for process in made:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def looks(beside: int) -> int:
    """How often a sentinel has gone to sleep: it looks in between."""
    [line] = [line for line in Path(f"/proc/{beside}/status").read_text().splitlines() if line.startswith("voluntary_ctxt")]
    return int(line.split()[1])


def let_look(beside: int, times: int) -> None:
    """Waits until a sentinel has looked so often, or has gone."""
    before = looks(beside)
    until("nobody looks", lambda: not alive([beside]) or looks(beside) > before + times, patience_s=PATIENCE_S)


def test_who_is_stopped_is_woken(watched: Callable[..., tuple[int, int]]) -> None:
    """Twice at once, which its sentinel may take for one stop, and again when it has been seen to go on."""
    process, beside = watched(stopped_s=1.5)
    for _ in range(2):
        for _ in range(2):
            os.kill(process, signal.SIGSTOP)
            until("it does not go on", lambda: sentinel.stopped(process) is None, patience_s=PATIENCE_S)
        let_look(beside, 6)
        assert alive([process, beside])


@pytest.mark.parametrize("work", [WAITS, HOLDS_THE_LOCK])
def test_who_is_stopped_whenever_it_is_woken_is_ended(work: str, watched: Callable[..., tuple[int, int]]) -> None:
    process, beside = watched(work, stopped_s=1.5)
    with kept_stopped([process]):
        assert os.waitpid(process, 0)[1] == signal.SIGKILL
    assert not wait_gone([beside]), "and its sentinel with it"


def test_so_does_the_sentinel_of_one_that_ends_by_itself(watched: Callable[..., tuple[int, int]]) -> None:
    process, beside = watched(work="")
    assert os.waitpid(process, 0)[1] == 0
    assert not wait_gone([beside])


@pytest.mark.parametrize("work", [WAITS, HOLDS_THE_LOCK])
def test_who_is_busy_or_idle_is_not(work: str, watched: Callable[..., tuple[int, int]]) -> None:
    process, beside = watched(work)
    time.sleep(LONG_ENOUGH_S)
    assert alive([process, beside])


def test_who_is_stopped_again_and_again_is_not(watched: Callable[..., tuple[int, int]]) -> None:
    """As by what bounds a process's share of a core: it goes on in between."""
    process, _ = watched(stopped_s=1.0)
    deadline = time.monotonic() + 2 * LONG_ENOUGH_S
    while time.monotonic() < deadline:
        os.kill(process, signal.SIGSTOP)
        time.sleep(0.1)
        os.kill(process, signal.SIGCONT)
        time.sleep(0.005)
    assert alive([process])


def test_nor_is_one_that_is_stopped_with_its_group(watched: Callable[..., tuple[int, int]]) -> None:
    """Ctrl-Z, and `fg` later."""
    process, beside = watched()
    os.killpg(process, signal.SIGSTOP)
    time.sleep(LONG_ENOUGH_S)
    os.killpg(process, signal.SIGCONT)
    time.sleep(LONG_ENOUGH_S)
    assert alive([process, beside])


def test_where_no_sentinel_can_be_started_the_process_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    sentinel.watch_this_process()
    assert "nobody will notice soon" in caplog.text
