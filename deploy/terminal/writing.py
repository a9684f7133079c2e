"""Files that commands write results to. A disk that is full, or gone, does not say which file it was: what is raised here does.
Imports nothing."""

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

STDOUT = "stdout"


@contextmanager
def naming(name: str) -> Iterator[None]:
    """An OSError that comes out of it has a file name."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = name
        raise


def open_written(path: Path | str) -> BinaryIO:
    """A new file in place of what is there, buffered. Errors: OSError. Each names it, that of closing too."""
    return io.BufferedWriter(_Named(path, "wb"))


def open_appended(path: Path | str) -> BinaryIO:
    """As `open_written`, but what is there stays, and can be read."""
    return cast(BinaryIO, io.BufferedRandom(_Named(path, "a+b")))


def name_stdout() -> None:
    """From now on an error of sys.stdout names it, too, as far as it is a file."""
    before = sys.stdout
    if not isinstance(before, io.TextIOWrapper) or not isinstance(getattr(before.buffer, "raw", before.buffer), io.FileIO):
        return
    before.flush()
    named = _Named(before.fileno(), "wb", closefd=False, called=STDOUT)
    unbuffered = isinstance(before.buffer, io.FileIO)  # `python -u`
    sys.stdout = io.TextIOWrapper(
        cast(BinaryIO, named if unbuffered else io.BufferedWriter(named)), before.encoding, before.errors,
        line_buffering=before.line_buffering, write_through=before.write_through,
    )  # fmt: skip


class _Named(io.FileIO):
    """All that a buffer before it writes, when it is closed too, goes through here. called: if not by its name."""

    def __init__(self, file: Path | str | int, mode: str, *, closefd: bool = True, called: str | None = None) -> None:
        super().__init__(file, mode, closefd)
        self._called = called or str(file)

    def write(self, data: Any) -> int:
        with naming(self._called):
            return super().write(data)

    def truncate(self, size: int | None = None) -> int:
        with naming(self._called):
            return super().truncate(size)
