"""Lines of batch files: what is a request, what is wrong with the others, and what identifies a result."""

import io
import json

import msgspec
import pytest

from deploy.batch.lines import (
    BadLine,
    BatchResponse,
    Line,
    LineError,
    Result,
    bad_line_id,
    encode,
    key_of,
    parse,
    read_lines,
    result_id,
)
from tests.deploy.batch.jobs import CHAT, COMPLETIONS, entry

MAX_BYTES = 1000


def parse_text(text: str | bytes) -> object:
    return parse(Line(1, text.encode() if isinstance(text, str) else text, 0), MAX_BYTES)


def test_a_request_keeps_its_body_as_it_is() -> None:
    body = '{"prompt": "a",  "max_tokens": 5, "n": 3}'
    request = parse(Line(1, f'{{"custom_id": "x", "method": "POST", "url": "{CHAT}", "body": {body}}}'.encode(), 0), MAX_BYTES)
    assert (request.custom_id, request.url, request.body) == ("x", CHAT, body.encode())
    assert request.id == result_id("x")
    assert request.tokens == len(body) // 4 + 15


@pytest.mark.parametrize(
    ("text", "code", "custom_id"),
    [
        ("oops", "invalid_json_line", None),
        ('{"custom_id": "a", "bo', "invalid_json_line", None),
        (b'{"custom_id": "\xff"}', "invalid_json_line", None),
        ('{"custom_id": "\\ud800", "method": "POST"}', "invalid_json_line", None),
        ('["custom_id"]', "invalid_line", None),
        ('"text"', "invalid_line", None),
        ("{}", "missing_custom_id", None),
        ('{"custom_id": 7}', "missing_custom_id", None),
        ('{"custom_id": ""}', "missing_custom_id", None),
        ('{"custom_id": "a", "method": "GET"}', "invalid_method", "a"),
        ('{"custom_id": "a", "method": "POST", "url": "/v1/embeddings", "body": {}}', "invalid_url", "a"),
        ('{"custom_id": "a", "method": "POST", "url": ["/v1/completions"], "body": {}}', "invalid_url", "a"),
        (f'{{"custom_id": "a", "method": "POST", "url": "{CHAT}"}}', "missing_body", "a"),
        (json.dumps(entry("a", stream=True)), "invalid_stream", "a"),
        (json.dumps(entry("a", user="x" * MAX_BYTES)), "line_too_long", None),
    ],
)
def test_what_is_no_request_says_why(text: str | bytes, code: str, custom_id: str | None) -> None:
    with pytest.raises(BadLine) as caught:
        parse_text(text)
    assert (caught.value.code, caught.value.custom_id) == (code, custom_id)
    assert caught.value.message


@pytest.mark.parametrize("half", [r"\ud800", r"\udfff", r"\ud83dx and more than a pair has", r"\ud83d\ud83d\ude00"])
def test_half_of_a_surrogate_pair_is_told_as_what_it_is(half: str) -> None:
    with pytest.raises(BadLine, match=r"\\ud\w{3} is half of a surrogate pair: write the whole pair"):
        parse_text(f'{{"custom_id": "a", "body": {{"prompt": "{half}"}}}}')


def test_nesting_without_end_is_an_error_like_any_other() -> None:
    deep = b'{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": ' + b"[" * 200_000
    with pytest.raises(BadLine) as caught:
        parse(Line(1, deep + b"]" * 200_000 + b"}}", 0), len(deep) * 2 + 2)
    assert caught.value.code == "invalid_json_line"


@pytest.mark.parametrize("body", ["[]", '{"max_tokens": "many", "n": []}', "7"])
def test_a_body_of_any_kind_is_left_to_who_answers(body: str) -> None:
    line = Line(1, f'{{"custom_id": "a", "method": "POST", "url": "{COMPLETIONS}", "body": {body}}}'.encode(), 0)
    assert parse(line, MAX_BYTES).body == body.encode()


def test_lines_are_read_whatever_their_ends() -> None:
    file = io.BytesIO(b"\xef\xbb\xbf" + b"one\r\n\n  \ntwo\nthree")
    lines = list(read_lines(file, MAX_BYTES))
    assert [(line.number, line.content, line.size_bytes) for line in lines] == [
        (1, b"one", 8),
        (4, b"two", 4),
        (5, b"three", 5),
    ]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b""])
@pytest.mark.parametrize("beyond", [-1, 0, 1, 2, 3, 5_000_000])
def test_of_a_line_that_is_too_long_only_the_beginning_is_held(beyond: int, end: bytes) -> None:
    long = b"x" * (MAX_BYTES + beyond) + end
    first, *others = read_lines(io.BytesIO(long + (b"next\n" if end else b"")), MAX_BYTES)
    assert first.size_bytes == len(long)
    assert len(first.content) <= MAX_BYTES + 2
    assert (len(first.content) > MAX_BYTES) == (beyond > 0)
    assert [line.content for line in others] == ([b"next"] if end else [])
    if others:
        assert others[0].number == 2


def test_ids_tell_apart_what_differs_and_survive_a_round_trip() -> None:
    lines = [Line(1, b"a", 2), Line(2, b"a", 2), Line(1, b"b", 2)]
    ids = [result_id("a"), result_id("b"), *map(bad_line_id, lines)]
    assert len({key_of(each) for each in ids}) == len(ids)
    assert all(len(key_of(each)) == 16 for each in ids)
    for foreign in ("batch_req_", "req_" + "0" * 32, "batch_req_" + "g" * 32, "0" * 42):
        with pytest.raises(ValueError, match=r"is not the id|non-hexadecimal"):
            key_of(foreign)


def test_a_result_is_one_line_even_if_its_body_was_not() -> None:
    response = BatchResponse(200, "r", msgspec.Raw(b'{\r\n  "a": 1\n}'))
    line = encode(Result(result_id("x"), "x", response))
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert json.loads(line) == {
        "id": result_id("x"),
        "custom_id": "x",
        "response": {"status_code": 200, "request_id": "r", "body": {"a": 1}},
        "error": None,
    }
    bad = json.loads(encode(Result("i", None, error=LineError("c", "m", 3))))
    assert bad == {"id": "i", "custom_id": None, "response": None, "error": {"code": "c", "message": "m", "line": 3}}
