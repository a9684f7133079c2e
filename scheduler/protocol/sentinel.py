"""A small process beside another, which wakes it when a signal has stopped it (SIGSTOP): no socket ends then, and whoever waits
for it would wait until all others have given it up. One that is stopped again whenever it is woken is ended after seconds.

Who hears nothing cannot tell what is stopped from what is busy. The kernel can: of a process that a signal has stopped it says
T, and of none that computes, waits, holds Python's lock, swaps or gets no core; and it counts how often each has had a core, so
that one that goes on in between is seen, however briefly. Where there is no /proc nobody is ended.

It is in the process group of whom it watches: who stops all of that, as Ctrl-Z does, stops both, and nobody is ended. Imports
nothing of Manta's, since it runs as a program of its own.

    python sentinel.py PROCESS STOPPED_S                     # as a child of that process
"""

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

logger = logging.getLogger(__name__)

STOPPED_S = 3.0
"""Another scheduler, or front end, is there after about as long."""

WAKE_S = 0.5
"""Nothing is lost by it, so it is soon. Whoever shares out a core by signals lets a process go on more often."""

LOOK_S = 0.25


def watch_this_process(stopped_s: float = STOPPED_S) -> None:
    """From now on, until this process ends."""
    command = [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(stopped_s)]
    try:
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    except OSError as error:
        logger.warning("nobody will notice soon if this process is stopped: %s", error)


def stopped(process: int) -> list[str] | None:
    """How often it has had a core, if a signal has stopped it; else None."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return None
    if not any(line.startswith("State:\tT") for line in lines):
        return None
    return [line for line in lines if "ctxt_switches" in line]


def watch(process: int, stopped_s: float) -> None:
    """Looks are counted, not time: what this process sleeps itself is no silence of the other. That it has had a core since it
    was woken is no sign that it goes on."""
    before, looks, woken = None, 0, False
    while os.getppid() == process:
        time.sleep(LOOK_S)
        now = stopped(process)
        looks = looks + 1 if now is not None and (now == before or woken) else 0
        before, woken = now, False
        if not looks or os.getppid() != process:
            continue
        if looks * LOOK_S >= stopped_s:
            print(f"process {process} has been stopped for {stopped_s:g} s: it is ended", file=sys.stderr, flush=True)
            os.kill(process, signal.SIGKILL)
            looks = 0
        elif looks % round(WAKE_S / LOOK_S) == 0:
            print(f"process {process} was stopped by a signal: it is woken", file=sys.stderr, flush=True)
            os.kill(process, signal.SIGCONT)
            woken = True


if __name__ == "__main__":
    watch(int(sys.argv[1]), float(sys.argv[2]))
