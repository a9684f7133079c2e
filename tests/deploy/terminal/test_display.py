"""What a terminal and a pipe show of several requests that grow at once."""

import io

import pytest
from rich.console import Console

from deploy.doors.python.sources import LABEL_CHARACTERS, label
from deploy.frontend.outputs import CompletionOutput, RequestOutput
from deploy.terminal.display import LiveView, PlainView


def grown(text: str, finished: bool = False, error: str | None = None) -> RequestOutput:
    reason = "error" if error else "stop" if finished else None
    choice = CompletionOutput(0, text, [1], finish_reason=reason, new_tokens=1)  # type: ignore[arg-type]
    return RequestOutput("0", "p", [1], 0, [choice], finished, error)


def test_pipe_shows_one_after_the_other(capsys: pytest.CaptureFixture[str]) -> None:
    view = PlainView(["a", "b"])
    view.show(1, grown("second, whole", finished=True))
    assert capsys.readouterr().out == ""
    view.show(0, grown("fir"))
    assert capsys.readouterr().out == "── 1/2: a ──\nfir"
    view.show(0, grown("first", finished=True))
    assert capsys.readouterr().out == "st\n── 2/2: b ──\nsecond, whole\n"


def test_terminal_ends_with_every_text_whole() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, color_system=None, width=80, height=24)
    view = LiveView(["a", "[b]"], console)
    with view.live:
        view.show(0, grown("one\n" * 10))
        view.show(1, grown("[red]two", finished=True))
        view.show(0, grown("one\n" * 11, finished=True, error="it broke"))
    shown = file.getvalue()
    for words in ("1: a", "2: [b]", "[red]two", "failed: it broke", "2/2 requests, 3 tokens"):
        assert words in shown
    assert shown.count("│ one") >= 11


def test_labels() -> None:
    long = "x" * 100 + " end"
    assert label("a\n b") == "a b"
    assert label(long) == "…" + long[-LABEL_CHARACTERS + 1 :]
    assert label({"prompt_token_ids": [1, 2]}) == "[1, 2]"
    assert label({"messages": [{"role": "user", "content": "hi"}]}) == "hi"
    for nonsense in (5, None, True, {"a": 1}):  # a line of a file, which is refused when its turn comes
        assert label({"prompt": nonsense}) == str(nonsense)
        assert label({"messages": nonsense}) == str(nonsense)
