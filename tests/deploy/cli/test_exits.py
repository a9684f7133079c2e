"""SIGTERM: wherever it is heard, the command ends, and tidily."""

import signal
import subprocess
import sys

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
        "import time, typer\nfrom deploy.cli.exits import Termination, interrupts_held, reported_errors\n"
        f"def command():\n    with reported_errors(False):\n        pass\n{body}\n"
        "Termination.install()\ntyper.run(command)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert (process.returncode, said.strip()) == (143, "manta: terminated")
