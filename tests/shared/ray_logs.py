"""What went wrong in the processes of a Ray cluster, by their logs: what a failed test shows beside its own output."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

MOST_LINES = 60
RECENT_S = 60.0
"""A cluster that runs writes something more often than this."""

BAD = ("WARNING", "ERROR", "CRITICAL")

_TIME = r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d[.,]\d{3}"
_FORMS = tuple(re.compile(form) for form in (
    rf"(?P<time>{_TIME})Z (?P<level>[A-Z]+) ",  # Manta's (scheduler/logs.py)
    rf'{{"time":"(?P<time>{_TIME})Z","level":"(?P<level>[A-Z]+)"',  # the same for collectors
    rf"(?P<level>[A-Z]+) (?P<time>{_TIME}) ",  # Serve's, which says why a replica failed; in local time
))  # fmt: skip
_PID = re.compile(r"(\d+)\.err$")


@dataclass(slots=True)
class _Record:
    """One call of a logger. lines: its own, then those of its traceback."""

    time: str
    lines: list[str] = field(default_factory=list)


def troubles(folder: Path, since_s: float) -> list[str]:
    """The last `MOST_LINES` lines that actors have written of WARNING or worse, with their tracebacks, in the order of their
    times, each after the id of its process. folder: Ray's (`RAY_TMPDIR`). since_s: by the clock of files; a cluster that has
    written nothing for `RECENT_S` by then was somebody else's."""
    files = [file for logs in _running(folder, since_s) for file in logs.glob("worker-*.err")]
    records = sorted((record for file in files for record in _records(file)), key=lambda record: record.time)
    return [line for record in records for line in record.lines][-MOST_LINES:]


def _running(folder: Path, since_s: float) -> Iterator[Path]:
    """The folders of logs of Ray's sessions that ran at that time, or later."""
    for logs in folder.glob("ray/session_2*/logs"):
        if any(file.stat().st_mtime >= since_s - RECENT_S for file in logs.iterdir() if file.is_file()):
            yield logs


def _records(file: Path) -> Iterator[_Record]:
    pid = _PID.search(file.name)
    record = None
    for line in file.read_text(errors="replace").splitlines():
        begun = next((match for form in _FORMS if (match := form.match(line))), None)
        if begun is not None:
            if record is not None:
                yield record
            record = _Record(begun["time"].replace(" ", "T").replace(",", ".")) if begun["level"] in BAD else None
        if record is not None:
            record.lines.append(f"[{pid[1] if pid else '?'}] {line}")
    if record is not None:
        yield record
