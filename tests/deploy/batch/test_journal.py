"""The output as a journal: what runs leave behind, wherever they end, and what the next one makes of it."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from deploy.batch import journal as journals
from deploy.batch.journal import PartJournal
from deploy.batch.lines import Result, encode, key_of, result_id
from deploy.batch.storage import Location
from deploy.config.load import ConfigError
from tests.deploy.batch.jobs import journal_at


def result(name: str) -> bytes:
    return encode(Result(result_id(name), name))


def key(name: str) -> bytes:
    return key_of(result_id(name))


def keys(*names: str) -> set[bytes]:
    return {key(name) for name in names}


# ---- a local file ----


def test_a_file_grows_by_each_run(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    for name, before in (("a", keys()), ("b", keys("a")), ("c", keys("a", "b"))):
        journal = journal_at(output)
        assert journal.done() == before
        journal.append(result(name))
        assert output.read_bytes().endswith(result(name)), "it waits for nothing"
        journal.finish()
        journal.close()
    assert output.read_bytes() == result("a") + result("b") + result("c")


def test_a_torn_last_line_is_cut_off_wherever_it_was_torn(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    for length in range(len(result("b"))):
        output.write_bytes(result("a") + result("b")[:length])
        journal = journal_at(output)
        assert journal.done() == keys("a")
        journal.append(result("b"))
        journal.close()
        assert output.read_bytes() == result("a") + result("b")


@pytest.mark.parametrize(
    "content",
    [b"precious", b'{"custom_id": "a"}\n', b'{"id":"batch_req_7"}\n', b'{"id":"batch_req_' + b"0" * 32 + b'", oops}\n', b"\n"],
)
def test_a_file_that_is_no_output_is_left_alone(tmp_path: Path, content: bytes) -> None:
    output = tmp_path / "out.jsonl"
    output.write_bytes(content)
    journal = journal_at(output)
    with pytest.raises(ConfigError, match=r"out.jsonl, line 1, is not a result"):
        journal.done()
    journal.close()
    assert output.read_bytes() == content


def test_one_job_at_a_time_writes_to_a_file(tmp_path: Path) -> None:
    first = journal_at(tmp_path / "out.jsonl")
    with pytest.raises(ConfigError, match="another job writes"):
        journal_at(tmp_path / "out.jsonl")
    first.close()
    journal_at(tmp_path / "out.jsonl").close()


# ---- a store ----


@pytest.fixture
def url() -> str:
    return f"memory://{uuid.uuid4().hex}/out[1].jsonl"


def content(url: str) -> bytes:
    data: bytes = fsspec.filesystem("memory").cat_file(url)
    return data


def stored(url: str) -> list[str]:
    """Names of all objects beside the output."""
    folder = url.rpartition("/")[0].removeprefix("memory:/")
    return sorted(path.removeprefix(folder + "/") for path in fsspec.filesystem("memory").find(folder))


def test_a_store_gets_numbered_parts_and_in_the_end_one_object(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journals, "PART_BYTES", 2 * len(result("a")))
    journal = journal_at(url)
    assert isinstance(journal, PartJournal)
    assert journal.done() == set()
    for name in "abcde":
        journal.append(result(name))
    parts = stored(url)
    assert [part.partition("-")[0] for part in parts] == ["out[1].jsonl.parts/000000", "out[1].jsonl.parts/000001"]
    journal.finish()
    assert stored(url) == ["out[1].jsonl"]
    assert content(url) == b"".join(result(name) for name in "abcde")


def test_old_results_are_stored_even_if_few(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journals, "PART_S", -1.0)
    journal = journal_at(url)
    journal.append(result("a"))
    assert journal_at(url).done() == keys("a")


def test_a_run_goes_on_from_the_parts_of_those_before(url: str) -> None:
    for name, before in (("a", keys()), ("b", keys("a"))):
        journal = journal_at(url)
        assert journal.done() == before
        journal.append(result(name))
        journal.keep()  # and the run is ended here
    last = journal_at(url)
    assert last.done() == keys("a", "b")
    last.finish()
    assert content(url) == result("a") + result("b")


def test_without_any_result_there_is_an_empty_object(url: str) -> None:
    journal = journal_at(url)
    assert journal.done() == set()
    journal.finish()
    assert content(url) == b""


def test_a_run_over_a_finished_output_adds_to_it(url: str) -> None:
    for name in "ab":
        journal = journal_at(url)
        journal.done()
        journal.append(result(name))
        journal.finish()
    assert content(url) == result("a") + result("b")
    again = journal_at(url)
    assert again.done() == keys("a", "b")
    again.finish()
    assert content(url) == result("a") + result("b")


def test_two_runs_at_once_lose_nothing_and_repeat_nothing(url: str) -> None:
    first, second = journal_at(url), journal_at(url)
    assert first.done() == second.done() == set()
    for journal, names in ((first, "ab"), (second, "bc")):
        for name in names:
            journal.append(result(name))
        journal.keep()
    first.finish()
    assert sorted(content(url).splitlines(keepends=True)) == sorted(result(name) for name in "abc")
    second.append(result("d"))
    second.finish()
    assert sorted(content(url).splitlines(keepends=True)) == sorted(result(name) for name in "abcd")


def test_a_run_that_ends_before_its_parts_are_removed_is_mended_by_the_next(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = journal_at(url)
    journal.append(result("a"))
    with monkeypatch.context() as broken:
        broken.setattr(type(Location.parse(url).fs), "rm_file", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            journal.finish()
    assert content(url) == result("a")
    assert len(stored(url)) > 1
    later = journal_at(url)
    assert later.done() == keys("a")
    later.finish()
    assert stored(url) == ["out[1].jsonl"]
    assert content(url) == result("a")


def test_an_output_is_replaced_whole_or_not_at_all(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = journal_at(url)
    first.append(result("a"))
    first.finish()
    second = journal_at(url)
    second.append(result("b"))
    second.keep()
    with monkeypatch.context() as broken:
        broken.setattr(journals, "read_results", failing_reader)
        with pytest.raises(OSError, match="the store is gone"):
            second.finish()
    assert content(url) == result("a")
    third = journal_at(url)
    assert third.done() == keys("a", "b")
    third.finish()
    assert content(url) == result("a") + result("b")


def failing_reader(*_: object) -> Iterator[tuple[bytes, bytes]]:
    yield key("a"), result("a")
    raise OSError("the store is gone")


def test_a_store_that_cannot_be_written_to_is_said_before_the_work(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise FileNotFoundError("The specified bucket does not exist")

    monkeypatch.setattr(type(Location.parse(url).fs), "pipe_file", refuse)
    with pytest.raises(ConfigError, match=r"cannot write to memory://.*: The specified bucket does not exist"):
        journal_at(url)


def test_an_object_that_is_no_output_is_left_alone(url: str) -> None:
    fsspec.filesystem("memory").pipe_file(url, b"precious\n")
    with pytest.raises(ConfigError, match="line 1, is not a result"):
        journal_at(url).done()
    assert content(url) == b"precious\n"


# ---- locations ----


def test_a_store_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(protocol: str, *_: object, **__: object) -> None:
        raise ImportError(f"Install s3fs to access {protocol}")

    monkeypatch.setattr("fsspec.core.get_filesystem_class", missing)
    with pytest.raises(ConfigError, match=r"s3:// needs .*pip install 'manta-serve\[cloud\]'"):
        Location.parse("s3://bucket/in.jsonl")


def test_unknown_schemes_and_missing_objects_are_said(url: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nosuch"):
        Location.parse("nosuch://x")
    for missing in (url, str(tmp_path / "in.jsonl")):
        with pytest.raises(ConfigError, match="does not exist"):
            Location.parse(missing).size_bytes()


def test_relative_paths_are_told_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert str(Location.parse("in.jsonl")) == str(tmp_path / "in.jsonl")
    assert not Location.parse("in.jsonl").in_job_folder
    assert Location.parse("/tmp/ray/session/runtime_resources/working_dir_files/_ray_pkg_0/out.jsonl").in_job_folder
