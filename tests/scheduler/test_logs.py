"""Log lines: one a record, whatever a client put into it."""

import json
import logging
import subprocess
import sys
from typing import Any

import pytest

from scheduler.logs import JsonFormatter, TextFormatter, fields


def record(message: str, *arguments: object, **said: Any) -> logging.LogRecord:
    made = logging.LogRecord("deploy.observing.logs", logging.WARNING, __file__, 1, message, arguments, None)
    made.created = 1767323045.678
    made.__dict__.update(fields(**said))
    return made


def test_text_names_the_values_and_the_process() -> None:
    line = TextFormatter({"group": 3}).format(record("%d ended", 2, request_id="cmpl-1", ttft_s=0.5, error=None))
    assert line == "2026-01-02T03:04:05.678Z WARNING deploy.observing.logs: 2 ended request_id=cmpl-1 ttft_s=0.5 group=3"


def test_a_client_cannot_forge_a_line() -> None:
    line = TextFormatter({}).format(record("request ended", request_id='x\n2026 INFO "all is well"'))
    assert line.splitlines() == [line]
    assert line.endswith(r'request_id="x\n2026 INFO \"all is well\""')


def test_json_is_an_object_a_line() -> None:
    line = JsonFormatter({"role": "scheduler"}).format(record("request ended", request_id="a\nb", ttft_s=None))
    assert line.splitlines() == [line]
    assert json.loads(line) == {
        "time": "2026-01-02T03:04:05.678Z", "level": "WARNING", "logger": "deploy.observing.logs", "message": "request ended",
        "request_id": "a\nb", "ttft_s": None, "role": "scheduler",
    }  # fmt: skip


def test_json_keeps_the_traceback() -> None:
    try:
        raise ValueError("out of blocks")
    except ValueError:
        failed = logging.LogRecord("workers.loop.rank", logging.ERROR, __file__, 1, "a rank failed", (), sys.exc_info())
    assert "ValueError: out of blocks" in json.loads(JsonFormatter({}).format(failed))["exception"]
    assert "ValueError: out of blocks" in TextFormatter({}).format(failed)


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_our_rooms_inform_and_libraries_warn(log_format: str) -> None:
    program = (
        "import logging; from scheduler.logs import configure;"
        f"configure({log_format!r}, rank=1); configure({log_format!r}, rank=1);"
        "[logging.getLogger(name).info('from %s', name) for name in ('deploy.app', 'workers.loop.rank', 'httpx')]"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    lines = done.stderr.splitlines()
    assert len(lines) == 2, "each line once"
    assert all("from deploy.app" in line or "from workers.loop.rank" in line for line in lines)


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_line_goes_to_what_stands_in_for_stderr_and_is_told_to_children(log_format: str) -> None:
    program = (
        "import io, sys; from scheduler.logs import configure, configured_format; import logging;"
        f"configure({log_format!r}); sys.stderr = io.StringIO(); logging.getLogger('deploy').info('a line');"
        "print(configured_format(), sys.stderr.getvalue().count('a line'))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == (f"{log_format} 1\n", "")
