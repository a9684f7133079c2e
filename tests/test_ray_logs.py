"""What a failed test that starts Ray shows of the cluster's processes."""

import os
from pathlib import Path

import pytest

from tests.conftest import pytest_runtest_makereport
from tests.shared.ray_logs import MOST_LINES, RECENT_S, troubles

WORKER = """\
:job_id:01000000
2026-12-01T01:22:30.100Z INFO cluster.fleet.fleet: group 0 is up role=engine
2026-12-01T01:22:46.566Z ERROR deploy.serving.replicas.engine: the cluster could not be started role=engine
Traceback (most recent call last):
ValueError: no room
2026-12-01T01:22:47.000Z INFO deploy.serving.replicas.engine: trying again role=engine
something that a library prints
"""
REPLICA = """\
WARNING 2026-12-01 01:22:46,100 controller 77 -- Replica failed
INFO 2026-12-01 01:22:48,100 controller 77 -- done
{"time":"2026-12-01T01:22:49.000Z","level":"CRITICAL","logger":"workers.process.life","message":"gone"}
"""
SAID = [
    "[77] WARNING 2026-12-01 01:22:46,100 controller 77 -- Replica failed",
    "[12] 2026-12-01T01:22:46.566Z ERROR deploy.serving.replicas.engine: the cluster could not be started role=engine",
    "[12] Traceback (most recent call last):",
    "[12] ValueError: no room",
    '[77] {"time":"2026-12-01T01:22:49.000Z","level":"CRITICAL","logger":"workers.process.life","message":"gone"}',
]
THEN_S = 1_000_000.0


def write(folder: Path, session: str, name: str, text: str, at_s: float = THEN_S) -> None:
    logs = folder / "ray" / session / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    (logs / name).write_text(text)
    os.utime(logs / name, (at_s, at_s))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ray's, with a session that runs, and one that has ended."""
    write(tmp_path, "session_2026-12-01_02", "worker-ab-01000000-12.err", WORKER)
    write(tmp_path, "session_2026-12-01_02", "worker-cd-01000000-77.err", REPLICA)
    write(tmp_path, "session_2026-12-01_02", "raylet.err", "2026-12-01T01:22:49.000Z ERROR raylet: not an actor's\n")
    write(tmp_path, "session_2026-12-01_01", "worker-ef-01000000-9.err", WORKER, THEN_S - RECENT_S - 1.0)
    return tmp_path


def test_all_processes_that_run_in_the_order_of_time(folder: Path) -> None:
    assert troubles(folder, THEN_S) == SAID
    assert troubles(folder, THEN_S + RECENT_S + 1.0) == []
    assert len(troubles(folder, THEN_S - 1.0)) == len(SAID) + 3, "both sessions, with one traceback more"


def test_the_last_lines_are_shown(folder: Path) -> None:
    lines = [f"2026-12-01T02:00:00.{number:03}Z WARNING deploy.app: {number}" for number in range(2 * MOST_LINES)]
    write(folder, "session_2026-12-01_02", "worker-ab-01000000-12.err", "\n".join(lines))
    assert troubles(folder, THEN_S) == [f"[12] {line}" for line in lines[-MOST_LINES:]]


@pytest.mark.parametrize(("marks", "fails", "shown"), [(["ray"], True, True), (["ray"], False, False), ([], True, False)])
def test_a_report_shows_them(
    marks: list[str], fails: bool, shown: bool, folder: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Of a test that starts Ray and fails."""
    monkeypatch.setenv("RAY_TMPDIR", str(folder))
    for file in folder.glob("ray/session_2026-12-01_02/logs/*"):
        os.utime(file)
    for mark in marks:
        request.node.add_marker(mark)

    def work() -> None:
        assert not fails

    call = pytest.CallInfo.from_call(work, "call")
    report = pytest.TestReport.from_item_and_call(request.node, call)
    hook = pytest_runtest_makereport(request.node, call)
    next(hook)
    with pytest.raises(StopIteration) as ended:
        hook.send(report)
    assert ended.value.value is report
    assert [text for title, text in report.sections if "Ray" in title] == (["\n".join(SAID)] if shown else [])
