"""Results as JSON lines, in the order of the prompts, each written as soon as those before it are."""

import sys
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import msgspec

from deploy.frontend.outputs import CompletionOutput, RequestOutput

STDOUT = "-"


class RecordWriter:
    """A line for each output; the destination is opened before the work begins, so that a bad path costs nothing."""

    def __init__(self, file: BinaryIO | None, close: bool) -> None:
        self._file = file
        self._close = close
        self._waiting: dict[int, RequestOutput] = {}
        self._next = 0

    @classmethod
    def open(cls, path: Path | None) -> "RecordWriter":
        """path: None writes nothing, - is stdout. Errors: OSError."""
        if path is None:
            return cls(None, close=False)
        if str(path) == STDOUT:
            return cls(sys.stdout.buffer, close=False)
        return cls(path.open("wb"), close=True)

    def write(self, position: int, output: RequestOutput) -> None:
        """Takes a finished output in any order."""
        if self._file is None:
            return
        self._waiting[position] = output
        while (ready := self._waiting.pop(self._next, None)) is not None:
            self._file.write(msgspec.json.encode(_record(self._next, ready)) + b"\n")
            self._next += 1
        self._file.flush()

    def __enter__(self) -> "RecordWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """After an interruption, what has ended beyond a gap is written too; `index` says which it is."""
        if self._file is None:
            return
        for position in sorted(self._waiting):
            self._file.write(msgspec.json.encode(_record(position, self._waiting[position])) + b"\n")
        self._file.flush()
        if self._close:
            self._file.close()


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
