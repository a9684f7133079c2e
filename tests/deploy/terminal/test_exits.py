"""SIGTERM: wherever it is heard, the command ends, and tidily."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

IN_A_DESTRUCTOR = """
class Garbage:
    def __del__(self):
        print("here", flush=True)
        time.sleep(0.3)
while True:
    Garbage()
    time.sleep(0.3)
"""
IN_A_CALL = """
print("here", flush=True)
time.sleep(3600)
"""
CAUGHT = """
print("here", flush=True)
try:
    time.sleep(3600)
except KeyboardInterrupt:
    with interrupts_held():
        print("tidied", flush=True)
"""


@pytest.mark.parametrize("work", [IN_A_DESTRUCTOR, IN_A_CALL, CAUGHT], ids=["in a destructor", "in a call", "caught"])
def test_sigterm_is_not_lost(work: str) -> None:
    body = "\n".join("        " + line for line in work.splitlines())
    code = (
        "import time, typer\nfrom deploy.terminal.exits import Termination, interrupts_held, reported_errors\n"
        f"def command():\n    with reported_errors(False):\n        pass\n{body}\n"
        "Termination.install()\ntyper.run(command)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert (process.returncode, said.strip()) == (143, "manta: terminated")


def test_sigterm_that_ray_has_taken_for_itself_is_heard_all_the_same() -> None:
    """As it is while Ray starts: its handlers raise SystemExit, with codes of their own."""
    code = (
        "import os, signal, sys, time, typer\nfrom cluster.join import _own_sigterm\n"
        "from deploy.terminal.exits import Termination, reported_errors\n"
        "def command():\n    with reported_errors(False), _own_sigterm():\n"
        "        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n        time.sleep(3600)\n"
        "Termination.install()\ntyper.run(command)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr.strip()) == (143, "manta: terminated")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("asked", [["--help"], ["version"], ["generate", "--help"]], ids=" ".join)
def test_stdout_that_is_full_is_named(asked: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "manta", *asked]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert (done.returncode, done.stderr.strip()) == (1, "manta: error: stdout: No space left on device")


def test_nobody_who_reads_the_help_to_its_end_is_no_error_to_speak_of() -> None:
    command = [sys.executable, "-m", "manta", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
