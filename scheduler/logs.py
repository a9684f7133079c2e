"""The log lines of every process, in one form: text for people, or JSON for collectors.

    logger.info("request ended", extra=fields(request_id="cmpl-1", ttft_s=0.012))

    2026-01-02T03:04:05.678Z INFO deploy.observing.logs: request ended request_id=cmpl-1 ttft_s=0.012
    {"time":"2026-01-02T03:04:05.678Z","level":"INFO","logger":"deploy.observing.logs","message":"request ended",...}

Imports logging and msgspec; each process calls `configure` once, at its start.
"""

import logging
import re
import sys
from datetime import UTC, datetime
from typing import Any

import msgspec

ROOMS = ("kvcache", "scheduler", "workers", "cluster", "deploy", "simulator")
"""Whose INFO lines are shown; of other libraries only warnings are."""

_PLAIN = re.compile(r"[\w.:/@+-]+")


def fields(**values: Any) -> dict[str, Any]:
    """The `extra` of a logging call: what the line says beside its message, by name."""
    return {"fields": values}


def configure(log_format: str, **process: Any) -> None:
    """Sends this process's lines to stderr. log_format: "text" or "json". process: what tells it from others, in every line."""
    handler = StderrHandler()
    handler.setFormatter((JsonFormatter if log_format == "json" else TextFormatter)(process))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for room in ROOMS:
        logging.getLogger(room).setLevel(logging.INFO)


def configured_format() -> str:
    """What this process has configured, for one that it starts."""
    return "json" if any(isinstance(each.formatter, JsonFormatter) for each in logging.root.handlers) else "text"


class StderrHandler(logging.Handler):
    """To what is `sys.stderr` at the time: bars on a terminal stand in for it while they are shown."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(f"{self.format(record)}\n")
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


class TextFormatter(logging.Formatter):
    """Fields follow the message as name=value; a value that is more than a word is quoted, so that a line stays a line."""

    def __init__(self, process: dict[str, Any]) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        said = _fields(record) | self._process
        words = [f"{_time(record)} {record.levelname} {record.name}: {record.getMessage()}"]
        words += [f"{name}={_word(value)}" for name, value in said.items() if value is not None]
        line = " ".join(words)
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """One object a line; a traceback is in `exception`."""

    def __init__(self, process: dict[str, Any]) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        line = {"time": _time(record), "level": record.levelname, "logger": record.name, "message": record.getMessage()}
        line |= _fields(record) | self._process
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line, enc_hook=str).decode()


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    found: dict[str, Any] = record.__dict__.get("fields", {})
    return found


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _word(value: Any) -> str:
    word = str(value)
    return word if _PLAIN.fullmatch(word) else msgspec.json.encode(word).decode()
