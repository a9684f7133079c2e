"""What is said while requests under way are waited for at the end."""

import threading

import pytest

from deploy.serving import ending
from deploy.serving.ending import let_end
from scheduler.server.stats import ClusterStatus, EngineStats

PATIENCE_S = 60.0


def of(waiting: int) -> ClusterStatus:
    return ClusterStatus(phase="ready", engine=EngineStats(groups=(), waiting=waiting))


def test_a_cluster_that_does_not_answer_is_waited_for_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "LATE_S", 0.01)
    said, heard, answer = list[str](), threading.Event(), threading.Event()

    def say(line: str) -> None:
        said.append(line)
        heard.set()

    def status() -> ClusterStatus:
        assert answer.wait(PATIENCE_S)
        return of(0)

    waiting = threading.Thread(target=let_end, args=(status, say))
    waiting.start()
    assert heard.wait(PATIENCE_S), "nothing is said while nobody answers"
    answer.set()
    waiting.join(PATIENCE_S)
    [line] = said
    assert line.startswith("ending; waiting for requests under way")


def test_what_is_under_way_is_said_once_also_where_nothing_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "LATE_S", PATIENCE_S)
    said: list[str] = []
    let_end(lambda: of(0), said.append)
    assert said == ["ending; no request is under way"]
    said.clear()
    left = iter((3, 2, 1, 0))
    let_end(lambda: of(next(left)), said.append)
    [line] = said
    assert "waiting for 3 sequence(s) under way" in line
