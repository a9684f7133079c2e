"""The file for replay: what it says, that it never holds anybody up, and that nothing is lost in silence."""

import json
import logging
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from deploy.frontend.service.observation import PromptUse
from deploy.observing.request_log import RequestLog
from kvcache.hashing import hash_blocks
from tests.deploy.frontend.observations import observation


def read(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_has_the_keys_of_mooncakes_traces_and_no_content(tmp_path: Path) -> None:
    log = RequestLog(str(tmp_path / "requests.jsonl"), "tiny")
    log.write(observation())
    log.close()
    assert read(tmp_path / "requests.jsonl") == [
        {
            "timestamp": 1_750_000_000_250, "input_length": 300, "output_length": 11, "hash_ids": [2**63 + 1, 7],
            "block_size": 128, "priority": 2, "outcome": "stop", "model": "tiny",
        }
    ]  # fmt: skip


def test_each_choice_of_each_prompt_is_a_line_as_the_scheduler_sees_it(tmp_path: Path) -> None:
    tokens = np.arange(40, dtype=np.int32)
    hashes = np.array(hash_blocks(tokens, 16), "<u8").tobytes()
    log = RequestLog(str(tmp_path / "requests.jsonl"))
    log.write(observation(prompts=(PromptUse(40, hashes, (3, 5)), PromptUse(7, b"", (2,)))))
    log.close()
    lines = read(tmp_path / "requests.jsonl")
    assert [(line["input_length"], line["output_length"]) for line in lines] == [(40, 3), (40, 5), (7, 2)]
    assert [line["hash_ids"] for line in lines] == [hash_blocks(tokens, 16)] * 2 + [[]]


def test_two_processes_may_share_a_file(tmp_path: Path) -> None:
    logs = [RequestLog(str(tmp_path / "requests.jsonl")) for _ in range(2)]
    for number in range(500):
        logs[number % 2].write(observation(priority=number))
    for log in logs:
        log.close()
    assert sorted(int(str(line["priority"])) for line in read(tmp_path / "requests.jsonl")) == [*range(500)]


def test_a_disk_that_stands_still_costs_lines_not_time(tmp_path: Path) -> None:
    """A pipe that nobody reads stands for the disk: when its 64 KiB are full, the writer waits, and `write` must not."""
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    log = RequestLog(str(tmp_path / "pipe"), max_waiting=8)
    for _ in range(5_000):
        log.write(observation())
    assert log.dropped > 1_000
    os.set_blocking(reader, True)
    read_all: list[bytes] = []
    thread = threading.Thread(target=lambda: read_all.extend(iter(lambda: os.read(reader, 1 << 16), b"")))
    thread.start()
    log.close()
    thread.join()
    os.close(reader)
    assert b"".join(read_all).count(b"\n") + log.dropped == 5_000, "each request is in the file or counted as missing"


def test_a_failing_disk_is_named_once_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    log = RequestLog(str(tmp_path / "pipe"))
    os.close(reader)
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            log.write(observation())
        log.close()
    assert log.dropped == 3
    (said,) = [entry.getMessage() for entry in caplog.records]
    assert said == f"the request log {tmp_path / 'pipe'} cannot be written: Broken pipe"


def test_a_file_that_cannot_be_opened_is_said_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        RequestLog(str(tmp_path / "missing" / "requests.jsonl"))
