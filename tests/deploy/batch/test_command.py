"""`python -m deploy.batch` as a process: killed and resumed, ended by signals, used wrongly."""

import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from manta.commands import app
from tests.deploy.batch.jobs import as_lines, custom_ids, entry, read

PATIENCE_S = 60.0
ENGINE = ["--local", "--kv-memory", "64MiB", "--max-num-seqs", "4", "--threads", "1"]


@contextmanager
def job(source: Path, output: Path, *arguments: str) -> Iterator["subprocess.Popen[str]"]:
    """The batch job in a process of its own, gone in the end."""
    command = [sys.executable, "-m", "deploy.batch", "--input", str(source), "--output", str(output), *ENGINE, *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for_lines(output: Path, process: "subprocess.Popen[str]", lines: int) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not output.exists() or output.read_bytes().count(b"\n") < lines:
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline_s, "no results came"
        time.sleep(0.005)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    file = tmp_path / "in.jsonl"
    file.write_bytes(as_lines(ENTRIES) + b"oops\n")
    return file


ENTRIES = [entry(f"def f{number}(", max_tokens=24, ignore_eos=True, seed=number) for number in range(80)]
"""Enough work that a run can be killed in the midst of it."""


@pytest.mark.slow
def test_killed_again_and_again_it_does_every_id_once(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    dice = random.Random(11)
    lines = 0
    for _ in range(2):
        lines = dice.randrange(lines + 1, lines + 30)
        with job(source, output) as process:
            wait_for_lines(output, process, lines)
            process.send_signal(signal.SIGKILL)
            assert process.wait(PATIENCE_S) == -signal.SIGKILL
        content = output.read_bytes()
        output.write_bytes(content + content[: dice.randrange(1, 60)])  # as if the last line had been torn
        lines = content.count(b"\n")
    with job(source, output) as process:
        _, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, said
    assert f"{lines} done before" in said
    found = read(output)
    assert custom_ids(found) == custom_ids(ENTRIES) + custom_ids([{"custom_id": None}])
    for each in found:
        assert list(each) == ["id", "custom_id", "response", "error"]
        if each["custom_id"] is not None:
            assert list(each["response"]) == ["status_code", "request_id", "body"]
            assert each["response"]["body"]["usage"]["completion_tokens"] == 24


@pytest.mark.few(1)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_it_with_whole_lines(source: Path, tmp_path: Path, number: signal.Signals, code: int) -> None:
    output = tmp_path / "out.jsonl"
    with job(source, output) as process:
        wait_for_lines(output, process, 1)
        process.send_signal(number)
        _, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == code, said
    assert "Traceback" not in said
    assert 1 <= len(read(output)) <= len(ENTRIES)
    assert "results go to" in said


# ---- used wrongly ----


def manta(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["batch", *arguments])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "{missing}", "--output", "{out}"], "missing.jsonl does not exist"),
        (["--input", "{in}", "--output", "{in}"], "choose another --output"),
        (["--input", "{in}", "--output", "{folder}/nowhere/out.jsonl"], "nowhere/out.jsonl: No such file or directory"),
        (["--input", "{in}", "--output", "nosuch://x"], "nosuch"),
        (["--input", "{in}", "--output", "{out}", "--concurrency", "0"], "--concurrency 0 is below 1"),
        (["--input", "{in}", "--output", "{out}", "--url", "http://h", "--app", "manta"], "--url and --app exclude each other"),
        (["--input", "{in}", "--output", "{out}", "--url", "http://h", "--groups", "2"], "--groups: for groups that the job"),
        (["--input", "{in}", "--output", "{out}", "--app", "manta", "--engine-seed", "2"], "--engine-seed: for groups"),
        (["--input", "{in}", "--output", "{out}", "--local", "--block-size", "100"], "block_size=100 is not a power of two"),
        (["--input", "{in}", "--output", "{out}", "--local", "--model", "nowhere"], "nowhere is not a folder"),
        (["--input", "{in}", "--output", "{notes}", "--local", "--kv-memory", "64MiB"], "notes.txt, line 1, is not a result"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(tmp_path: Path, arguments: list[str], message: str) -> None:
    paths = {"in": "in.jsonl", "out": "out.jsonl", "missing": "missing.jsonl", "notes": "notes.txt", "folder": ""}
    places = {name: str(tmp_path / path) for name, path in paths.items()}
    (tmp_path / "in.jsonl").write_bytes(as_lines([entry("a")]))
    (tmp_path / "notes.txt").write_text("precious\n")
    result = manta(*(argument.format(**places) for argument in arguments))
    assert result.exit_code == 2, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("manta: error: ")]
    assert message in line
    assert (tmp_path / "notes.txt").read_text() == "precious\n"


def test_a_finished_job_needs_neither_a_model_nor_an_endpoint(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(as_lines([entry("a", max_tokens=2)]) + b"oops\n")
    places = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    first = manta(*places, *ENGINE)
    assert (first.exit_code, "1 answered, 1 failed; 2 tokens in" in first.stderr) == (0, True), first.stderr
    for way in (["--local", "--model", "nowhere"], ["--url", "http://127.0.0.1:9", "--retries", "0"]):
        again = manta(*places, *way)
        assert again.exit_code == 0, again.stderr
        assert again.stderr.splitlines()[-1] == f"0 answered, 0 failed, 2 done before; results go to {tmp_path / 'out.jsonl'}"


def test_an_endpoint_that_nobody_serves_is_exit_1(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(as_lines([entry("a")]))
    places = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    result = manta(*places, "--url", "http://127.0.0.1:9", "--retries", "0")
    assert result.exit_code == 1
    assert "manta: error: http://127.0.0.1:9 cannot be reached" in result.stderr
    assert "0 answered, 0 failed" in result.stderr
    assert read(tmp_path / "out.jsonl") == []


def test_help_names_the_job_and_its_options() -> None:
    result = CliRunner().invoke(app, ["batch", "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    for words in ("--input", "--output", "--url", "--app", "Default: 512.", "--tensor-parallel-size"):
        assert words in result.stdout
    assert "--temperature" not in result.stdout, "each request says for itself"
