"""Files that commands write results to. A disk that is full, or gone, does not say which file it was: what is raised here does.
Imports nothing."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast


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


class _Named(io.FileIO):
    """All that a buffer before it writes, when it is closed too, goes through here."""

    def write(self, data: Any) -> int:
        with naming(str(self.name)):
            return super().write(data)

    def truncate(self, size: int | None = None) -> int:
        with naming(str(self.name)):
            return super().truncate(size)
