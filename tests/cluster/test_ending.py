"""What was started ends within seconds: late steps are left behind, a signal ends the wait, leftovers are found by files."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cluster.ending import Ending, kill, writers

NEVER_S = 3600.0


def test_a_step_that_returns_is_waited_for_and_what_it_raises_is_no_fault() -> None:
    done: list[int] = []

    def fails() -> None:
        done.append(1)
        raise RuntimeError("the GCS has gone")

    with Ending() as ending:
        assert ending.give(NEVER_S, lambda: done.append(0))
        assert ending.give(NEVER_S, fails)
    assert done == [0, 1]


def test_a_step_that_hangs_is_left_behind() -> None:
    with Ending() as ending:
        assert not ending.give(0.1, threading.Event().wait)
        assert ending.give(NEVER_S, lambda: None), "the next one has its own time"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_waiting_and_nothing_else(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    begun, ran = threading.Event(), threading.Event()

    def hangs() -> None:
        begun.set()
        threading.Event().wait()

    def interrupt() -> None:
        begun.wait()
        signal.raise_signal(number)

    with Ending() as ending:
        threading.Thread(target=interrupt).start()
        assert not ending.give(NEVER_S, hangs)
        assert ending.hurried
        ending.give(NEVER_S, ran.set)
    assert ran.wait(60.0), "it is begun all the same"
    assert signal.getsignal(number) == before


def test_it_ends_in_another_thread_too() -> None:
    """Where signals are not heard."""
    said: list[bool] = []

    def end() -> None:
        with Ending() as ending:
            said.append(ending.give(NEVER_S, lambda: None))

    thread = threading.Thread(target=end)
    thread.start()
    thread.join(60.0)
    assert said == [True]


def test_who_writes_into_a_sessions_folder_is_killed_stopped_ones_too(tmp_path: Path) -> None:
    session, other = tmp_path / "session_1", tmp_path / "session_10"
    code = "import sys, time; held = open(sys.argv[1], 'w'); print('open', flush=True); time.sleep(3600)"
    processes: list[subprocess.Popen[str]] = []
    for folder in (session, session, other):
        folder.mkdir(exist_ok=True)
        command = [sys.executable, "-c", code, str(folder / f"{len(processes)}.log")]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "open\n"
        processes[0].send_signal(signal.SIGSTOP)
        assert writers(session) == {process.pid for process in processes[:2]}
        with (session / "driver.log").open("w"):
            kill(session)
        assert [process.wait(60.0) for process in processes[:2]] == [-signal.SIGKILL] * 2
        time.sleep(0.1)
        assert processes[2].poll() is None, "another session's"
    finally:
        for process in processes:
            process.kill()
            process.communicate()
