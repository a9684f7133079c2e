"""Traces of requests: when each came, how long it was, and what it shares with others. Read once, into one form.

Content is not in a trace, only names of blocks: tokens are made from the names, so that equal names give equal tokens and
the scheduler hashes, matches and verifies them as in production. Imports NumPy and msgspec.
"""

import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

MOONCAKE_BLOCK_TOKENS = 512
MOONCAKE_BUCKET_S = 3.0
"""Mooncake's timestamps are rounded to this; each request gets a random place inside it."""

MASK = np.uint64((1 << 64) - 1)

Names = npt.NDArray[np.uint64]


class TraceError(ValueError):
    """The file is not a trace that can be read; says where and what was expected."""


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One sequence. arrived_s: since the first of the trace, at its own speed.

    names: uint64 [blocks] of the leading blocks of `block_tokens` tokens, the last one perhaps partly filled; equal names
    after equal names are equal tokens. What they do not cover is the request's own. number: its place in the trace.
    """

    number: int
    arrived_s: float
    prompt_tokens: int
    output_tokens: int
    names: Names
    block_tokens: int
    priority: int = 0

    def tokens(self) -> npt.NDArray[np.int32]:
        """[prompt_tokens] the same at every call."""
        blocks = -(-self.prompt_tokens // self.block_tokens)
        own: Names = MASK - np.uint64(self.number << 24) - np.arange(max(0, blocks - len(self.names)), dtype=np.uint64)
        names: Names = np.concatenate([self.names[:blocks], own])
        offsets: Names = np.arange(1, self.block_tokens + 1).astype(np.uint64)
        mixed: Names = names[:, None] * np.uint64(0x9E3779B97F4A7C15) + offsets
        mixed *= np.uint64(0xBF58476D1CE4E5B9)
        mixed ^= mixed >> np.uint64(29)
        return (mixed.reshape(-1)[: self.prompt_tokens] >> np.uint64(33)).astype(np.int32)


def read_trace(path: Path, seed: int = 0, limit: int | None = None) -> list[TraceRequest]:
    """The first `limit` requests, in order of arrival. The kind of file is seen from its first line.

    seed: places requests inside the intervals to which a trace has rounded them. Errors: TraceError, OSError.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        first = file.readline()
        file.seek(0)
        reader = _reader(first, path)
        try:
            requests = [each for each, _ in zip(reader(file, seed), range(limit or 1 << 62), strict=False)]
        except UnicodeDecodeError as error:
            raise TraceError(f"{path} is not UTF-8 text: {error}") from error
        except TraceError as error:
            raise TraceError(f"{path}: {error}") from error
    if not requests:
        raise TraceError(f"{path} holds no request")
    requests.sort(key=lambda request: request.arrived_s)
    began_s = requests[0].arrived_s
    return [replace(each, number=at, arrived_s=each.arrived_s - began_s) for at, each in enumerate(requests)]


Lines = Iterator[str]
Reader = Callable[[Lines, int], Iterator[TraceRequest]]


def _reader(first: str, path: Path) -> Reader:
    if first.lstrip().startswith("{"):
        return _read_json
    columns = {name.strip() for name in first.split(",")}
    if columns.issuperset(AZURE):
        return partial(_read_lengths, AZURE, lambda text: datetime.fromisoformat(text).timestamp())
    if columns.issuperset(BURST):
        return partial(_read_lengths, BURST, float)
    raise TraceError(
        f"{path} is no trace that Manta knows: give JSON lines with timestamp, input_length, output_length and hash_ids "
        f"(Mooncake, or a request log of manta serve), or CSV with the columns {', '.join(AZURE)} or {', '.join(BURST)}"
    )


class _Line(msgspec.Struct, frozen=True):
    """Mooncake's keys, and those that Manta's request log adds to them: see `deploy/observing/request_log.py`."""

    timestamp: float  # ms
    input_length: int
    output_length: int
    hash_ids: list[int] = []
    block_size: int | None = None
    priority: int = 0


def _read_json(lines: Lines, seed: int) -> Iterator[TraceRequest]:
    """A request log names the full blocks alone, and its times are exact."""
    random = np.random.default_rng(seed)
    decode = msgspec.json.Decoder(_Line).decode
    for number, text in enumerate(lines):
        if not text.strip():
            continue
        try:
            line = decode(text)
        except msgspec.DecodeError as error:
            raise TraceError(f"line {number + 1}: {error}") from error
        rounded_s = MOONCAKE_BUCKET_S if line.block_size is None else 0.0
        yield _request(
            number, line.timestamp / 1e3 + rounded_s * random.random(), line.input_length, line.output_length,
            np.array(line.hash_ids, np.uint64), line.block_size or MOONCAKE_BLOCK_TOKENS, line.priority,
        )  # fmt: skip


AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
BURST = ("Timestamp", "Request tokens", "Response tokens")
NO_NAMES = np.empty(0, np.uint64)


def _read_lengths(
    columns: tuple[str, str, str], seconds: Callable[[str], float], lines: Lines, seed: int  # noqa: ARG001
) -> Iterator[TraceRequest]:  # fmt: skip
    """Lengths alone: nothing is shared, and times are exact."""
    time, prompt, output = columns
    for number, row in enumerate(csv.DictReader(lines, skipinitialspace=True)):
        try:
            arrived_s, lengths = seconds(row[time]), (int(row[prompt]), int(row[output]))
        except (ValueError, TypeError) as error:
            raise TraceError(f"line {number + 2}: {error}") from error
        yield _request(number, arrived_s, *lengths, NO_NAMES, MOONCAKE_BLOCK_TOKENS, 0)


def _request(
    number: int, arrived_s: float, prompt: int, output: int, names: Names, block: int, priority: int
) -> TraceRequest:
    """Failed requests of a trace have no output, and some no prompt: a scheduler needs a token of each."""
    return TraceRequest(number, arrived_s, max(1, prompt), max(1, output), names, block, priority)
