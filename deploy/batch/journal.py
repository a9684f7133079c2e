"""The output of a job, which is its journal too: what is in it is done, and a job that begins again goes on from there.

A local file is appended to. A store has no append: there, results go to numbered parts beside the output, which is put together
when all are there. Imports `lines`, `storage`, and the commands' way of writing files.
"""

import fcntl
import io
import logging
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import BinaryIO, Protocol

import msgspec

from deploy.batch.lines import RESULT_HEAD, key_of
from deploy.batch.storage import Location
from deploy.config.load import ConfigError
from deploy.terminal.writing import naming, open_appended

logger = logging.getLogger(__name__)

SYNC_S = 5.0
"""What a crash of the machine may cost; a crash of the job costs nothing that was appended."""

PART_END = ".jsonl"
PART_BYTES = 16 << 20
PART_S = 30.0
"""What a crash of the job may cost where results go to a store."""


class Journal(Protocol):
    """Used by one thread at a time; every call may take as long as the disk or the store."""

    def done(self) -> set[bytes]:
        """Keys of the results that former runs have written; what they left half-written is mended. Called first, once.

        Errors: ConfigError if the output holds anything else.
        """
        ...

    def append(self, line: bytes) -> None: ...

    def keep(self) -> None:
        """All that was appended outlives whatever happens now."""
        ...

    def finish(self) -> None:
        """Every result is there: the output stands whole."""
        ...

    def close(self) -> None: ...


def open_journal(location: Location) -> Journal:
    """Errors: ConfigError, OSError."""
    return FileJournal(location.path) if location.local else PartJournal(location)


class FileJournal:
    """A local file. One job at a time: the file is locked."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._file = open_appended(path)
        self._synced_s = time.monotonic()
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ConfigError(f"another job writes to {path}: wait for it, or choose another --output") from None
        except OSError as error:  # some file systems cannot
            logger.warning("%s cannot be locked (%s): no other job may write to it meanwhile", path, error)

    def done(self) -> set[bytes]:
        self._file.seek(0)
        keys, end = set(), 0
        for key, line in read_results(self._file, self._path):
            keys.add(key)
            end += len(line)
        self._file.truncate(end)  # a run that was killed may have left part of a line
        return keys

    def append(self, line: bytes) -> None:
        self._file.write(line)
        self._file.flush()
        if time.monotonic() - self._synced_s > SYNC_S:
            self.keep()

    def keep(self) -> None:
        with naming(self._path):
            os.fsync(self._file.fileno())
        self._synced_s = time.monotonic()

    def finish(self) -> None:
        self.keep()

    def close(self) -> None:
        self._file.close()


class PartJournal:
    """An object of a store, and `OUTPUT.parts/` beside it until it is whole.

    Parts appear at once or not at all. Their names carry the run, so that two runs never write the same one; a result that both
    have computed is taken once. The output is replaced at once too, and the parts go after that: a run that ends in between
    leaves what the next one can put together again. A store has no locks: two runs must not finish at the same moment.
    """

    def __init__(self, location: Location) -> None:
        """Errors: ConfigError if nothing can be written there, before anything has been computed."""
        self._output = location
        self._folder = f"{location.path}.parts"
        self._run = secrets.token_hex(4)
        probe = f"{self._folder}/{self._run}.probe"
        try:
            location.fs.pipe_file(probe, b"")
            location.fs.rm_file(probe)
        except Exception as error:  # each store has errors of its own
            raise ConfigError(f"cannot write to {location}: {error}") from error
        self._number = 0
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._stored_s = time.monotonic()

    def done(self) -> set[bytes]:
        parts = _parts(self._left())
        self._number = len(parts)
        return {key for key, _ in self._results(parts)}

    def append(self, line: bytes) -> None:
        self._pending.append(line)
        self._pending_bytes += len(line)
        if self._pending_bytes >= PART_BYTES or time.monotonic() - self._stored_s > PART_S:
            self.keep()

    def keep(self) -> None:
        if self._pending:
            with self._storing():
                self._output.fs.pipe_file(f"{self._folder}/{self._number:06d}-{self._run}{PART_END}", b"".join(self._pending))
            self._pending, self._pending_bytes = [], 0
            self._number += 1
        self._stored_s = time.monotonic()

    def finish(self) -> None:
        self.keep()
        left = self._left()
        parts = _parts(left)
        if not parts and self._exists():
            return
        whole = f"{self._folder}/{self._run}.whole"
        with self._storing():
            with self._output.fs.open(whole, "wb") as file:
                for _, line in self._results(parts):
                    file.write(line)
            self._output.fs.cp_file(whole, self._output.path)
        for path in (whole, *left):  # not what another run has stored since
            self._output.fs.rm_file(path)

    def close(self) -> None:
        """Nothing is held open."""

    @contextmanager
    def _storing(self) -> Iterator[None]:
        """Errors: OSError that names the output, whatever the store's own is."""
        try:
            yield
        except ConfigError:
            raise
        except Exception as error:  # each store has errors of its own
            raise OSError(f"cannot write to {self._output}: {error or type(error).__name__}") from error

    def _results(self, parts: Sequence[str]) -> Iterator[tuple[bytes, bytes]]:
        """Each once, of the output as it was and of all parts."""
        seen: set[bytes] = set()
        for path in [self._output.path] * self._exists() + list(parts):
            with io.BufferedReader(self._output.fs.open(path, "rb")) as file:
                for key, line in read_results(file, path):
                    if key not in seen:
                        seen.add(key)
                        yield key, line

    def _left(self) -> list[str]:
        """Parts, and what runs that were killed while they put them together have left."""
        self._output.fs.invalidate_cache()
        return sorted(self._output.fs.find(self._folder))

    def _exists(self) -> bool:
        return bool(self._output.fs.exists(self._output.path))


def _parts(left: Sequence[str]) -> list[str]:
    return [path for path in left if path.endswith(PART_END)]


class _Done(msgspec.Struct):
    id: str


def read_results(file: BinaryIO, name: str) -> Iterator[tuple[bytes, bytes]]:
    """(key, line) of every whole line. Errors: ConfigError for a line that no job has written."""
    for number, line in enumerate(file, start=1):
        whole = line.endswith(b"\n")
        try:
            if not line.startswith(RESULT_HEAD[: len(line)]):
                raise ValueError("it does not begin as a result does")
            if whole:
                yield key_of(msgspec.json.decode(line, type=_Done).id), line
        except ValueError as error:
            raise ConfigError(
                f"{name}, line {number}, is not a result of a batch job ({error}): choose another --output, or move it away"
            ) from None
