"""What the tests of the batch job share: input lines, a backend without a model, and one run of a job."""

import asyncio
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

from deploy.batch.backends.backend import LineAnswer
from deploy.batch.job import BatchJob
from deploy.batch.journal import Journal, open_journal
from deploy.batch.limits import Limits
from deploy.batch.lines import BatchRequest
from deploy.batch.progress import JobTally
from deploy.batch.storage import Location

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def entry(custom_id: str, url: str = COMPLETIONS, **body: Any) -> dict[str, Any]:
    prompt = {"messages": [{"role": "user", "content": custom_id}]} if url == CHAT else {"prompt": custom_id}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": prompt | {"max_tokens": 8} | body}


def as_lines(entries: Iterable[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(each).encode() + b"\n" for each in entries)


def results(content: bytes) -> list[dict[str, Any]]:
    """Every line of an output; each must be whole."""
    assert content == b"" or content.endswith(b"\n")
    return [json.loads(line) for line in content.splitlines()]


def read(path: Path) -> list[dict[str, Any]]:
    return results(path.read_bytes())


def custom_ids(entries: Iterable[dict[str, Any]]) -> Counter[str | None]:
    return Counter(each["custom_id"] for each in entries)


class FakeBackend:
    """Echoes the custom_id. before: called first for each request, with the number of requests before it; may raise."""

    def __init__(self, before: Callable[[BatchRequest, int], None] = lambda _, __: None) -> None:
        self._before = before
        self.asked: list[str] = []
        self.under_way = self.most_under_way = self.tokens = self.most_tokens = 0

    async def answer(self, request: BatchRequest) -> LineAnswer:
        self.asked.append(request.custom_id)
        self.under_way += 1
        self.tokens += request.tokens
        self.most_under_way = max(self.most_under_way, self.under_way)
        self.most_tokens = max(self.most_tokens, self.tokens)
        try:
            self._before(request, len(self.asked) - 1)
            for _ in range(len(self.asked) % 7):  # out of order
                await asyncio.sleep(0)
            return LineAnswer(200, json.dumps({"echo": request.custom_id}).encode(), output_tokens=3)
        finally:
            self.under_way -= 1
            self.tokens -= request.tokens


def journal_at(path: Path | str) -> Journal:
    return open_journal(Location.parse(str(path)))


def run_job(
    content: bytes | BinaryIO, output: Path | str, backend: FakeBackend, limits: Limits | None = None, total_bytes: int = 0
) -> JobTally:
    """One whole run."""
    tally = JobTally(total_bytes)
    file = io.BytesIO(content) if isinstance(content, bytes) else content
    journal = journal_at(output)

    job = BatchJob(file, journal, limits or Limits(), tally)
    try:
        if job.catch_up():
            asyncio.run(job.run(backend))
    finally:
        journal.close()
    return tally
