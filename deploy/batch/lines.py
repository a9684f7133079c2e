"""The lines of OpenAI's batch files: requests in, results out.

    {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {...}}
    {"id": "batch_req_...", "custom_id": "a", "response": {"status_code": 200, "request_id": ..., "body": {...}}, "error": null}

A result's id is made from what it answers, so an output file says by itself what is done. Imports msgspec.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import msgspec

from deploy.text.files import json_fault

URLS = ("/v1/chat/completions", "/v1/completions")
ID_PREFIX = "batch_req_"
RESULT_HEAD = f'{{"id":"{ID_PREFIX}'.encode()
"""How every line of an output begins."""

BYTES_PER_TOKEN = 4
USUAL_OUTPUT_TOKENS = 256
"""What a request without a limit is counted as."""

SKIP_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Line:
    """A line as it was read. number: from 1. content: without the line's end; only its beginning if it is too long.
    size_bytes: in the file, the line's end included."""

    number: int
    content: bytes
    size_bytes: int


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """A valid line. id: of its result. body: JSON. tokens: of prompt and output, at most and about."""

    id: str
    custom_id: str
    url: str
    body: bytes
    tokens: int


class BadLine(Exception):
    """A line that is no request. custom_id: None where it has none."""

    def __init__(self, code: str, message: str, custom_id: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.custom_id = custom_id


class BatchResponse(msgspec.Struct, frozen=True):
    """What the endpoint said, or would have said. body: JSON."""

    status_code: int
    request_id: str
    body: msgspec.Raw


class LineError(msgspec.Struct, frozen=True):
    """Why a line was not a request. line: its number, from 1."""

    code: str
    message: str
    line: int


class Result(msgspec.Struct, frozen=True):
    """A line of the output: exactly one of response and error is there."""

    id: str
    custom_id: str | None
    response: BatchResponse | None = None
    error: LineError | None = None


class _Known(msgspec.Struct):
    """Whatever JSON object a line holds: what is in it is checked one by one, to be refused by name."""

    custom_id: Any = None
    method: Any = None
    url: Any = None
    body: msgspec.Raw = msgspec.Raw()


class _Size(msgspec.Struct):
    """What of a body says how much there is to do; whether it is right shows where it is answered."""

    max_tokens: Any = None
    max_completion_tokens: Any = None
    n: Any = None
    stream: Any = None


def read_lines(file: BinaryIO, max_bytes: int) -> Iterator[Line]:
    """Every line that is not blank. Of a line that is too long, no more than its beginning is ever held."""
    number = 0
    while raw := file.readline(max_bytes + 2):
        number += 1
        size = len(raw)
        while not raw.endswith(b"\n") and size >= max_bytes + 2 and (rest := file.readline(SKIP_BYTES)):
            size += len(rest)
            if rest.endswith(b"\n"):
                break
        content = raw.removesuffix(b"\n").removesuffix(b"\r")
        if number == 1:
            content = content.removeprefix(b"\xef\xbb\xbf")
        if content.strip():
            yield Line(number, content, size)


def parse(line: Line, max_bytes: int) -> BatchRequest:
    """Errors: BadLine."""
    if len(line.content) > max_bytes:
        raise BadLine("line_too_long", f"the line has more than {max_bytes} bytes: shorten it, or raise max_request_bytes")
    try:
        known = msgspec.json.decode(line.content, type=_Known)
    except msgspec.ValidationError:
        raise BadLine("invalid_line", 'the line is not a JSON object: write {"custom_id": ..., "method": ...}') from None
    except RecursionError:
        raise BadLine("invalid_json_line", "the line is nested too deeply: flatten it") from None
    except ValueError as error:  # msgspec.DecodeError, UnicodeDecodeError
        raise BadLine("invalid_json_line", f"the line is not valid JSON: {json_fault(line.content, error)}") from None
    custom_id = known.custom_id
    if not isinstance(custom_id, str) or not custom_id:
        raise BadLine("missing_custom_id", "custom_id is missing: give every line a text of its own")
    if known.method != "POST":
        raise BadLine("invalid_method", f"method is {_short(known.method)}: write POST", custom_id)
    if known.url not in URLS:
        raise BadLine("invalid_url", f"url is {_short(known.url)}: write one of {', '.join(URLS)}", custom_id)
    if not bytes(known.body):
        raise BadLine("missing_body", "body is missing: write the request there", custom_id)
    body = bytes(known.body)
    size = _size(body)
    if size.stream:
        raise BadLine("invalid_stream", "a batch has nobody to stream to: leave stream out of the body", custom_id)
    return BatchRequest(result_id(custom_id), custom_id, known.url, body, _tokens(body, size))


def result_id(custom_id: str) -> str:
    """The id of a request's result: 128 bits of a hash that nobody can make collide."""
    return ID_PREFIX + hashlib.blake2b(custom_id.encode(), digest_size=16, person=b"custom_id").hexdigest()


def bad_line_id(line: Line) -> str:
    """The id of the error of a line without a custom_id of its own: the same line in the same place."""
    place = line.number.to_bytes(8, "little")
    return ID_PREFIX + hashlib.blake2b(line.content, digest_size=16, person=b"line", salt=place).hexdigest()


def key_of(identity: str) -> bytes:
    """An id in 16 bytes. Errors: ValueError for one that is not ours."""
    digits = identity.removeprefix(ID_PREFIX)
    if len(identity) != len(ID_PREFIX) + 32 or len(digits) != 32:
        raise ValueError(f"{identity!r} is not the id of a result")
    return bytes.fromhex(digits)


def encode(result: Result) -> bytes:
    """The line, with its end. JSON written here has no line breaks; bodies of other servers may."""
    return msgspec.json.encode(result).replace(b"\n", b" ").replace(b"\r", b" ") + b"\n"


def _size(body: bytes) -> _Size:
    try:
        return msgspec.json.decode(body, type=_Size)
    except (ValueError, RecursionError):
        return _Size()


def _tokens(body: bytes, size: _Size) -> int:
    limits = (size.max_completion_tokens, size.max_tokens, USUAL_OUTPUT_TOKENS)
    output = next(limit for limit in limits if isinstance(limit, int) and limit >= 0)
    choices = size.n if isinstance(size.n, int) and size.n > 0 else 1
    return len(body) // BYTES_PER_TOKEN + output * choices


def _short(value: object) -> str:
    return repr(value)[:80]
