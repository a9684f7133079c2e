"""A file of lengths and block hashes of every request, for replay: JSON lines with the keys of Mooncake's traces.

    {"timestamp":1767323045678,"input_length":6758,"output_length":500,"hash_ids":[1467...,9021...],"block_size":256,...}

Equal hashes are equal prefixes; there is no content. Writes from a thread of its own. Imports `service` for `Observation`.
"""

import contextlib
import logging
import os
import queue
import threading
from collections.abc import Iterator

import msgspec
import numpy as np

from deploy.frontend.service.observation import Observation

logger = logging.getLogger(__name__)

MAX_WAITING = 10_000
"""Requests that may wait for the disk; at 1,000 a second ten seconds' worth, in some megabytes."""
MAX_BATCH = 1_000
CLOSE_TIMEOUT_S = 5.0


class LoggedRequest(msgspec.Struct, frozen=True):
    """One sequence: each choice of each prompt is a line of its own, as the scheduler sees it.

    timestamp: arrival, in milliseconds since 1970. hash_ids: chained hashes of the full blocks of `block_size` tokens, which
    mean something within one model. model: its name.
    """

    timestamp: int
    input_length: int
    output_length: int
    hash_ids: list[int]
    block_size: int
    priority: int
    outcome: str
    model: str = ""


class RequestLog:
    """Appends to a file, whole lines at a time, so that models and processes of one host may share it. `write` never waits.

    Errors: OSError if the file cannot be opened.
    """

    def __init__(self, path: str, model: str = "", max_waiting: int = MAX_WAITING) -> None:
        self._path, self._model = path, model
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._waiting: queue.Queue[Observation | None] = queue.Queue(max_waiting)
        self._overflowed = 0  # counted by the caller of `write`
        self._failed = 0  # counted by the thread
        self._thread = threading.Thread(target=self._run, name="manta-request-log", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """Requests that are missing from the file."""
        return self._overflowed + self._failed

    def write(self, observation: Observation) -> None:
        try:
            self._waiting.put_nowait(observation)
        except queue.Full:
            self._overflowed += 1

    def close(self) -> None:
        """Writes what waits, for a few seconds at most."""
        with contextlib.suppress(queue.Full):  # then the disk stands still
            self._waiting.put(None, timeout=CLOSE_TIMEOUT_S)
        self._thread.join(timeout=CLOSE_TIMEOUT_S)

    def _run(self) -> None:
        more, failing = True, False
        while more:
            batch = [self._waiting.get()]
            while len(batch) < MAX_BATCH and not self._waiting.empty():
                batch.append(self._waiting.get())
            more = batch[-1] is not None
            failing = not self._append([observation for observation in batch if observation is not None], failing)
        os.close(self._file)

    def _append(self, batch: list[Observation], failing: bool) -> bool:
        """One system call, so that lines of several processes do not mix. failing: what the last one said already."""
        lines = msgspec.json.Encoder().encode_lines(line for each in batch for line in logged(each, self._model))
        try:
            os.write(self._file, lines)
        except OSError as error:
            self._failed += len(batch)
            if not failing:
                logger.error("the request log %s cannot be written: %s", self._path, error.strerror)
            return False
        return True


def logged(observation: Observation, model: str) -> Iterator[LoggedRequest]:
    """The lines of one request."""
    for use in observation.prompts:
        hash_ids = np.frombuffer(use.hashes, "<u8").tolist()
        for output_tokens in use.output_tokens:
            yield LoggedRequest(
                timestamp=round(observation.started_unix_s * 1e3),
                input_length=use.prompt_tokens,
                output_length=output_tokens,
                hash_ids=hash_ids,
                block_size=observation.block_size,
                priority=observation.priority,
                outcome=observation.outcome,
                model=model,
            )
