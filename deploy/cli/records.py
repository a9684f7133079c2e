"""Results as JSON lines, in the order of the prompts, each written as soon as those before it are."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from deploy.frontend.outputs import CompletionOutput, RequestOutput
from deploy.terminal.writing import open_written

STDOUT = "-"

Record = Callable[[int, RequestOutput], None]
"""Takes (position of the prompt, its output, which has ended)."""


class RecordWriter:
    """A line for each output."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._waiting: dict[int, RequestOutput] = {}
        self._next = 0

    def write(self, position: int, output: RequestOutput) -> None:
        """Takes a finished output in any order."""
        self._waiting[position] = output
        while self._next in self._waiting:
            self._put(self._next)
            self._next += 1
        self._file.flush()

    def finish(self) -> None:
        """After an interruption, what has ended beyond a gap is written too; `index` says which it is."""
        for position in sorted(self._waiting):
            self._put(position)
        self._file.flush()

    def _put(self, position: int) -> None:
        self._file.write(msgspec.json.encode(_record(position, self._waiting.pop(position))) + b"\n")


@contextmanager
def open_records(path: Path | None) -> Iterator[Record]:
    """`RecordWriter.write`. path: None writes nothing, - is stdout. It is opened before the work begins, so that a bad one
    costs nothing. Errors: OSError, which names the file."""
    if path is None:
        yield lambda _, __: None
        return
    with nullcontext(sys.stdout.buffer) if str(path) == STDOUT else open_written(path) as file:
        writer = RecordWriter(file)
        try:
            yield writer.write
        finally:
            writer.finish()


def _record(position: int, output: RequestOutput) -> dict[str, Any]:
    record: dict[str, Any] = {
        "index": position,
        "prompt": output.prompt,
        "prompt_token_ids": output.prompt_token_ids,
        "num_cached_tokens": output.num_cached_tokens,
        "outputs": [_choice(choice) for choice in output.outputs],
    }
    failure = {"error": output.error, "error_type": output.fault.type if output.fault else None}
    return record | (failure if output.error else {})


def _choice(choice: CompletionOutput) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "index": choice.index,
        "text": choice.text,
        "token_ids": choice.token_ids,
        "finish_reason": choice.finish_reason,
        "stop_reason": choice.stop_reason,
    }
    return fields | ({} if choice.logprobs is None else {"logprobs": choice.logprobs})
