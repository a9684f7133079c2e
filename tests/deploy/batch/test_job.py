"""The job over a backend without a model: every id once, bounded memory, retries, and how it ends."""

import asyncio
import io
import json
import random
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from cluster.engine import EngineError
from deploy.batch import job as jobs
from deploy.batch.job import READ_LINES, BatchJob
from deploy.batch.limits import Limits
from deploy.batch.lines import BatchRequest
from deploy.batch.progress import JobTally
from deploy.config.load import ConfigError
from deploy.frontend.errors import RETRY_AFTER_S, Fault, RequestError
from tests.deploy.batch.jobs import FakeBackend, as_lines, custom_ids, entry, journal_at, read, run_job

PATIENCE_S = 60.0


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "FIRST_BACKOFF_S", 0.0)


@pytest.fixture
def no_sleep(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The event loops of this thread sleep no more, but say for how long they would. Those of others do."""
    sleep, here = asyncio.sleep, threading.get_ident()

    def told(say: Callable[[float], object] = lambda _: None) -> None:
        async def instead(delay_s: float, result: object = None) -> object:
            if threading.get_ident() != here:
                return await sleep(delay_s, result)
            say(delay_s)
            return await sleep(0, result)

        monkeypatch.setattr(asyncio, "sleep", instead)

    return told


def test_every_request_has_its_answer(output: Path) -> None:
    names = [f"r{number}" for number in range(100)]
    tally = run_job(as_lines(map(entry, names)), output, FakeBackend())
    answers = {each["custom_id"]: each for each in read(output)}
    assert sorted(answers) == sorted(names)
    for name, answer in answers.items():
        assert answer["error"] is None
        assert answer["response"]["status_code"] == 200
        assert answer["response"]["body"] == {"echo": name}
        assert answer["response"]["request_id"] == answer["id"]
    assert len({answer["id"] for answer in answers.values()}) == len(names)
    assert (tally.answered, tally.failed, tally.skipped, tally.output_tokens) == (100, 0, 0, 300)


def test_bad_lines_are_answered_too_and_stop_nothing(output: Path) -> None:
    content = b"oops\n" + as_lines([entry("a")]) + b'{"custom_id": "b", "method": "PUT"}\n\n[]\n' + as_lines([entry("c")])
    tally = run_job(content, output, FakeBackend())
    found = {each["error"]["line"] if each["error"] else 0: each for each in read(output)}
    assert custom_ids(read(output)) == {None: 2, "a": 1, "b": 1, "c": 1}
    assert {line: each["error"]["code"] for line, each in found.items() if line} == {
        1: "invalid_json_line",
        3: "invalid_method",
        5: "invalid_line",
    }
    assert all(each["response"] is None for line, each in found.items() if line)
    assert (tally.answered, tally.failed) == (2, 3)
    again = run_job(content, output, FakeBackend())
    assert (again.answered, again.failed, again.skipped) == (0, 0, 5)
    assert len(read(output)) == 5


def test_an_id_that_comes_twice_belongs_to_its_first_line(output: Path) -> None:
    content = as_lines([entry("a", seed=1), entry("b"), entry("a", seed=2), entry("a", seed=1)])
    backend = FakeBackend()
    run_job(content, output, backend)
    assert sorted(backend.asked) == ["a", "b"]
    assert custom_ids(read(output)) == {"a": 1, "b": 1, None: 2}
    duplicates = [each["error"] for each in read(output) if each["custom_id"] is None]
    assert [error["code"] for error in duplicates] == ["duplicate_custom_id"] * 2
    assert sorted(error["line"] for error in duplicates) == [3, 4]
    assert run_job(content, output, FakeBackend()).skipped == 4
    assert len(read(output)) == 4


def test_what_is_done_is_not_asked_again_and_more_input_is(output: Path) -> None:
    first, second = [entry(f"a{n}") for n in range(5)], [entry(f"b{n}") for n in range(5)]
    run_job(as_lines(first), output, FakeBackend())
    backend = FakeBackend()
    tally = run_job(as_lines(second[:2] + first + second[2:]), output, backend)
    assert sorted(backend.asked) == [each["custom_id"] for each in second]
    assert (tally.answered, tally.skipped) == (5, 5)
    assert custom_ids(read(output)) == custom_ids(first + second)


# ---- memory ----


class Endless(io.RawIOBase):
    """An input that is made as it is read; remembers how much of it that was."""

    def __init__(self, lines: int) -> None:
        self._left = iter(range(lines))
        self._rest = b""
        self.made = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._rest and (number := next(self._left, None)) is not None:
            self._rest = as_lines([entry(f"r{number}", user="x" * 500)])
            self.made += 1
        taken = self._rest[: len(buffer)]
        buffer[: len(taken)] = taken
        self._rest = self._rest[len(taken) :]
        return len(taken)


def test_requests_under_way_and_lines_read_ahead_are_bounded(output: Path) -> None:
    lines, limits = 8_000, Limits(requests=32)
    source = Endless(lines)
    most_ahead = 0

    def look(_: BatchRequest, before: int) -> None:
        nonlocal most_ahead
        most_ahead = max(most_ahead, source.made - before)

    backend = FakeBackend(look)
    tally = run_job(io.BufferedReader(source), output, backend, limits)
    assert tally.answered == lines
    assert limits.requests // 2 < backend.most_under_way <= limits.requests
    assert most_ahead <= READ_LINES + limits.requests + io.DEFAULT_BUFFER_SIZE // 500
    assert len(custom_ids(read(output))) == lines


def test_tokens_under_way_are_bounded_and_a_large_request_goes_alone(output: Path) -> None:
    limits = Limits(requests=100, tokens=1000)
    alone: list[int] = []
    backend = FakeBackend(lambda request, _: alone.append(backend.under_way) if request.custom_id == "large" else None)
    entries = [entry(f"r{number}", max_tokens=90) for number in range(200)]
    entries.insert(100, entry("large", max_tokens=5000))
    run_job(as_lines(entries), output, backend, limits)
    assert alone == [1]
    assert 5 < backend.most_under_way <= 10
    assert custom_ids(read(output)) == custom_ids(entries)


# ---- failures ----


@pytest.mark.parametrize("fault", [Fault.INVALID, Fault.NOT_FOUND, Fault.UNPROCESSABLE, Fault.INTERNAL, Fault.TIMED_OUT])
def test_a_request_that_fails_has_its_status_and_error(output: Path, fault: Fault) -> None:
    def fail(request: BatchRequest, _: int) -> None:
        if request.custom_id == "bad":
            raise RequestError(fault, "no", param="prompt", code="c")

    backend = FakeBackend(fail)
    tally = run_job(as_lines([entry("good"), entry("bad")]), output, backend)
    (bad,) = [each for each in read(output) if each["custom_id"] == "bad"]
    assert bad["error"] is None
    assert bad["response"]["status_code"] == fault.status
    assert bad["response"]["body"] == {"error": {"message": "no", "type": fault.type, "param": "prompt", "code": "c"}}
    assert (tally.answered, tally.failed) == (1, 1)
    assert backend.asked.count("bad") == 1


def test_a_bug_fails_its_request_only(output: Path) -> None:
    def fail(_: BatchRequest, before: int) -> None:
        if before == 1:
            raise KeyError("oops")

    run_job(as_lines([entry("a"), entry("b"), entry("c")]), output, FakeBackend(fail))
    assert sorted(each["response"]["status_code"] for each in read(output)) == [200, 200, 500]


def test_a_full_queue_is_waited_out_for_as_long_as_it_takes(output: Path, no_sleep: Callable[..., None]) -> None:
    no_sleep()  # however long: the next test has how long

    def refuse(_: BatchRequest, before: int) -> None:
        if before < 50:
            raise RequestError(Fault.OVERLOADED, "the queue is full")

    backend = FakeBackend(refuse)
    run_job(as_lines([entry("a"), entry("b")]), output, backend, Limits(retries=0))
    assert custom_ids(read(output)) == {"a": 1, "b": 1}
    assert len(backend.asked) == 52


def test_the_pause_is_what_was_asked_for_at_least(
    output: Path, monkeypatch: pytest.MonkeyPatch, no_sleep: Callable[..., None]
) -> None:
    pauses: list[float] = []

    def refuse(_: BatchRequest, before: int) -> None:
        if before < 12:
            raise RequestError(Fault.OVERLOADED, "full", retry_after_s=7.0 if before == 11 else 0.0)

    monkeypatch.setattr(jobs, "FIRST_BACKOFF_S", 0.5)
    no_sleep(pauses.append)
    run_job(as_lines([entry("a")]), output, FakeBackend(refuse))
    waits = [pause for pause in pauses if pause]
    assert len(waits) == 12
    least = RETRY_AFTER_S  # what every such refusal asks for
    assert all(max(least, 0.25 * 2**n) <= pause <= max(least, 0.5 * 2**n) for n, pause in enumerate(waits[:6]))
    assert all(15.0 <= pause <= 30.0 for pause in waits[7:11])
    assert waits[11] >= 7.0


def test_an_absence_is_outlived_within_the_retries(output: Path) -> None:
    def absent(_: BatchRequest, before: int) -> None:
        if before < 3:
            raise RequestError(Fault.UNAVAILABLE, "the scheduler is gone")

    run_job(as_lines([entry("a")]), output, FakeBackend(absent), Limits(retries=3))
    assert custom_ids(read(output)) == {"a": 1}


def test_an_absence_beyond_them_ends_the_job_not_the_requests(output: Path) -> None:
    gone = False

    def absent(_: BatchRequest, before: int) -> None:
        if gone and before >= 40:
            raise RequestError(Fault.UNAVAILABLE, "the scheduler is gone")

    entries = [entry(f"r{number}") for number in range(200)]
    gone = True
    with pytest.raises(EngineError, match=r"the scheduler is gone \(tried 3 times\)"):
        run_job(as_lines(entries), output, FakeBackend(absent), Limits(requests=8, retries=2))
    done = read(output)
    assert 0 < len(done) < 200
    assert all(each["response"]["status_code"] == 200 for each in done)
    gone = False
    run_job(as_lines(entries), output, FakeBackend(absent))
    assert custom_ids(read(output)) == custom_ids(entries)


def test_a_job_that_was_set_up_wrong_ends_at_once(output: Path) -> None:
    def refuse(_: BatchRequest, __: int) -> None:
        raise ConfigError("the key is wrong")

    with pytest.raises(ConfigError, match="the key is wrong"):
        run_job(as_lines([entry("a"), entry("b")]), output, FakeBackend(refuse))
    assert read(output) == []


def test_a_disk_that_is_full_ends_the_job(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("deploy.batch.journal.FileJournal.append", full)
    with pytest.raises(OSError, match="No space left"):
        run_job(as_lines([entry("a"), entry("b")]), output, FakeBackend())


@pytest.mark.parametrize("url", ["", "memory://cancelled/out.jsonl"])
def test_cancelled_runs_leave_whole_results_and_together_do_each_request_once(output: Path, url: str) -> None:
    """Cancelled anywhere: while reading, asking, writing."""
    dice = random.Random(5)
    entries = [entry(f"r{number}") for number in range(300)]
    runs = 0

    async def run_until(asked: int) -> bool:
        task = asyncio.current_task()
        assert task is not None

        def cancel(_: BatchRequest, before: int) -> None:
            if before == asked:
                task.cancel()

        journal = journal_at(url or output)
        try:
            job = BatchJob(io.BytesIO(as_lines(entries)), journal, Limits(requests=16), JobTally(0))
            if job.catch_up():
                await job.run(FakeBackend(cancel))
        except asyncio.CancelledError:
            return False
        finally:
            journal.close()
        return True

    while not asyncio.run(run_until(dice.randrange(10, 120))):
        runs += 1
    assert runs > 2
    if url:
        import fsspec

        found = [json.loads(line) for line in fsspec.filesystem("memory").cat_file(url).splitlines()]
    else:
        found = read(output)
    assert custom_ids(found) == custom_ids(entries)


# ---- progress ----


def test_progress_says_how_far_how_fast_and_how_long() -> None:
    tally = JobTally(4_000_000)
    tally.start(100.0)
    for _ in range(2000):
        tally.skip(1000)
    assert tally.words(101.0) == "0 answered, 0 failed, 2,000 done before, 50.0% of 4.0 MB, 0 tokens/s"
    for number in range(1000):
        tally.count(1000, failed=number < 10, output_tokens=5)
    assert tally.words(111.0) == "990 answered, 10 failed, 2,000 done before, 75.0% of 4.0 MB, 500 tokens/s, 0:00:11 left"
    assert tally.words(113.0) == "990 answered, 10 failed, 2,000 done before, 75.0% of 4.0 MB, 0 tokens/s, 0:00:13 left"
    assert tally.summary(120.0) == "990 answered, 10 failed, 2,000 done before; 5,000 tokens in 0:00:20, 250 tokens/s"


def test_a_run_that_has_not_begun_tells_no_duration() -> None:
    tally = JobTally(1000)
    tally.skip(500)
    tally.count(500, failed=True)
    assert tally.summary(2670.0) == "0 answered, 1 failed, 1 done before"


def test_whoever_answers_is_not_needed_where_nothing_is_left(output: Path) -> None:
    content = b"oops\n" + as_lines([entry("a"), entry("a")])
    with closing(journal_at(output)) as journal:
        assert BatchJob(io.BytesIO(content), journal, Limits(), JobTally(0)).catch_up()
    assert [each["error"]["line"] for each in read(output)] == [1]
    run_job(content, output, FakeBackend())
    finished = output.read_bytes()
    with closing(journal_at(output)) as journal:
        tally = JobTally(0)
        assert not BatchJob(io.BytesIO(content), journal, Limits(), tally).catch_up()
    assert (tally.answered, tally.failed, tally.skipped) == (0, 0, 3)
    assert output.read_bytes() == finished


def test_an_empty_input_is_done_at_once(output: Path) -> None:
    assert run_job(b"", output, FakeBackend()).answered == 0
    assert output.read_bytes() == b""
    assert JobTally(0).words(1.0).startswith("0 answered, 0 failed, 100.0% of 0 bytes")


@pytest.mark.parametrize("wrong", [{"requests": 0}, {"tokens": 0}, {"retries": -1}])
def test_limits_say_what_is_wrong(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="raise it"):
        Limits(**wrong)
