"""Every kind of trace becomes the same form; equal names are equal tokens."""

from pathlib import Path

import msgspec
import numpy as np
import pytest

from deploy.observing.request_log import LoggedRequest
from kvcache.hashing import hash_blocks
from simulator.traces import MOONCAKE_BUCKET_S, TraceError, read_trace
from tests.simulator.excerpts import conversations


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def test_mooncake(tmp_path: Path) -> None:
    path = write(
        tmp_path / "trace.jsonl",
        '{"timestamp": 0, "input_length": 1000, "output_length": 5, "hash_ids": [0, 1]}',
        '{"timestamp": 3000, "input_length": 700, "output_length": 6, "hash_ids": [0, 2]}',
        '{"timestamp": 9000, "input_length": 1024, "output_length": 7, "hash_ids": [0, 1]}',
    )
    first, second, third = read_trace(path)
    assert [each.prompt_tokens for each in (first, second, third)] == [1000, 700, 1024]
    assert [each.output_tokens for each in (first, second, third)] == [5, 6, 7]
    assert first.arrived_s == 0.0
    assert 9.0 - MOONCAKE_BUCKET_S < third.arrived_s < 9.0 + MOONCAKE_BUCKET_S
    assert len(second.tokens()) == 700
    assert (second.tokens()[:512] == first.tokens()[:512]).all()
    assert (second.tokens()[512:] != first.tokens()[512:700]).any()
    assert (third.tokens()[:1000] == first.tokens()).all()
    assert third.tokens().dtype == np.int32
    assert (third.tokens() >= 0).all()


def test_jitter_is_the_seed_s(tmp_path: Path) -> None:
    path = conversations(tmp_path / "trace.jsonl")

    def arrivals(seed: int) -> list[float]:
        return [each.arrived_s for each in read_trace(path, seed)]

    assert arrivals(1) == arrivals(1) == sorted(arrivals(1))
    assert arrivals(1) != arrivals(2)
    assert len(set(arrivals(1))) == len(arrivals(1))


def test_own_request_log_shares_what_its_hashes_share(tmp_path: Path) -> None:
    block, prompts = 16, [np.arange(40, dtype=np.int32), np.arange(56, dtype=np.int32)]
    logged = [
        LoggedRequest(1_700_000_000_000 + 250 * at, len(prompt), 3, hash_blocks(prompt, block), block, 2, "stop")
        for at, prompt in enumerate(prompts)
    ]
    path = tmp_path / "requests.jsonl"
    path.write_bytes(msgspec.json.Encoder().encode_lines(logged))
    first, second = read_trace(path)
    assert second.arrived_s == pytest.approx(0.25)
    assert first.priority == 2
    assert (first.tokens()[:32] == second.tokens()[:32]).all()
    assert (first.tokens()[32:] != second.tokens()[32:40]).any(), "the log names full blocks alone"


@pytest.mark.parametrize(
    "lines",
    [
        [f'{{"timestamp": {at}, "input_length": 9, "output_length": 5}}' if at != 1 else "" for at in range(3)],
        ["TIMESTAMP,ContextTokens,GeneratedTokens", "2023-11-16 18:15:46,9,5", "2023-11-16 18:15:47,9,5"],
    ],
)
def test_a_byte_order_mark_and_blank_lines_are_passed_over(tmp_path: Path, lines: list[str]) -> None:
    path = tmp_path / "trace"
    path.write_bytes("\r\n".join(["\ufeff" + lines[0], *lines[1:], ""]).encode())
    assert [(each.prompt_tokens, each.output_tokens) for each in read_trace(path)] == [(9, 5)] * 2


def test_lengths_only(tmp_path: Path) -> None:
    azure = write(
        tmp_path / "azure.csv",
        "TIMESTAMP,ContextTokens,GeneratedTokens",
        "2023-11-16 18:15:46.6805900,374,44",
        "2023-11-16 18:15:50.9951690,396,109",
    )
    burst = write(
        tmp_path / "burst.csv",
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type",
        "5,ChatGPT,472,18,490,Conversation log",
        "45,ChatGPT,1087,0,1317,Conversation log",
    )
    first, second = read_trace(azure)
    assert (first.prompt_tokens, second.output_tokens) == (374, 109)
    assert second.arrived_s == pytest.approx(4.314579)
    assert (first.tokens() != second.tokens()[:374]).any()
    first, second = read_trace(burst)
    assert (second.arrived_s, second.prompt_tokens, second.output_tokens) == (40.0, 1087, 1)
    assert len(read_trace(burst, limit=1)) == 1


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["a,b,c", "1,2,3"], "no trace that Manta knows"),
        (['{"timestamp": 0, "input_length": "long", "output_length": 1}'], "line 1"),
        (["TIMESTAMP,ContextTokens,GeneratedTokens", "yesterday,1,2"], "line 2"),
        (["TIMESTAMP,ContextTokens,GeneratedTokens"], "no request"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path: Path, lines: list[str], words: str) -> None:
    with pytest.raises(TraceError, match=words):
        read_trace(write(tmp_path / "trace", *lines))
