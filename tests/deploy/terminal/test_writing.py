"""A disk that is full: what ends because of it says which file could not be written."""

import asyncio
import errno
import gc
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import fsspec
import pytest
import typer

from deploy.batch.job import BatchJob
from deploy.batch.journal import open_journal
from deploy.batch.limits import Limits
from deploy.batch.progress import JobTally
from deploy.batch.storage import Location
from deploy.cli.records import open_records
from deploy.frontend.outputs import RequestOutput
from deploy.terminal.exits import reported_errors
from deploy.terminal.writing import open_appended, open_written
from tests.deploy.batch.jobs import FakeBackend, as_lines, entry

FULL = Path("/dev/full")

pytestmark = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")


@pytest.mark.parametrize("opened", [open_written, open_appended])
def test_whichever_call_reaches_the_disk_names_the_file(opened: Callable[[Path], BinaryIO]) -> None:
    file = opened(FULL)
    file.write(b"x")
    for reach in (file.flush, file.close):
        with pytest.raises(OSError, match="No space left on device: '/dev/full'") as failed:
            reach()
        assert (failed.value.errno, failed.value.filename) == (errno.ENOSPC, "/dev/full")


def test_what_is_written_is_there(tmp_path: Path) -> None:
    path = tmp_path / "out"
    for opened, content in ((open_written, b"a\n"), (open_appended, b"a\nb\n"), (open_written, b"c\n")):
        with opened(path) as file:
            file.write(content[-2:])
        assert path.read_bytes() == content


def test_results_of_generate(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as ended, reported_errors(debug=False), open_records(FULL) as record:
        record(0, RequestOutput("1", "a", [1], 0, [], finished=True))
    assert ended.value.exit_code == 1, "the name was right"
    assert capsys.readouterr().err == "manta: error: /dev/full: No space left on device\n"


def test_results_of_a_batch() -> None:
    journal = open_journal(Location.parse(str(FULL)))
    with pytest.raises(OSError, match="/dev/full"):
        journal.append(b"{}\n")
    with pytest.raises(OSError, match="/dev/full"):
        journal.close()


def test_results_in_a_store_that_takes_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    class StoreError(Exception):
        """As packages of stores raise."""

    def refuse(*_: object, **__: object) -> None:
        raise StoreError("the quota is used up")

    url = "memory://full/out.jsonl"
    journal = open_journal(Location.parse(url))
    journal.append(b"{}\n")
    monkeypatch.setattr(type(fsspec.filesystem("memory")), "pipe_file", refuse)
    with pytest.raises(OSError, match=r"cannot write to memory://full/out\.jsonl: the quota is used up"):
        journal.keep()


def test_a_batch_tells_once_that_its_disk_is_full(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others of its results were under way when the first could not be written."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # which no device can
    journal = open_journal(Location.parse(str(FULL)))
    job = BatchJob(io.BytesIO(as_lines(map(entry, "abcdefgh"))), journal, Limits(), JobTally(0))
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        asyncio.run(job.run(FakeBackend()))
    with pytest.raises(OSError, match="/dev/full"):
        journal.close()
    gc.collect()
    assert not caplog.records
