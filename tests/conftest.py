"""For all tests: one Ray client may talk to another's cluster on this machine, which Ray's tokens would forbid; Ray's files are
in a folder of this run, so that nobody later takes its clusters for living ones; no test depends on how fast this machine is,
or on the shell that starts it, and none takes more cores than it needs; and which tests share a process where xdist runs
several (`make test`). A test that starts Ray and fails shows what its cluster's processes complained of."""

import atexit
import contextlib
import functools
import gc
import os
import shutil
import signal
import ssl
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from deploy.config.load import bound_openmp_spin
from tests.shared.examples import USUAL
from tests.shared.ray_logs import troubles

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # read once, when Ray first connects
os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "300")  # 30 is too little where other processes have the cores
os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")  # what else runs here is no reason to kill a worker
os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")  # 5 is too little on busy cores, and kills the proxy
os.environ.setdefault("RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S", "60")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # small models gain nothing from more, and several tests run at once
bound_openmp_spin()  # before torch is imported: for engines that are not told how many threads to take
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a background job of a shell: what the tests start would ignore it, too
    signal.signal(signal.SIGINT, signal.default_int_handler)
OWN_FOLDER = None if "RAY_TMPDIR" in os.environ else tempfile.mkdtemp(prefix="mt-")  # short: sockets' paths begin with it
if OWN_FOLDER is not None:
    os.environ["RAY_TMPDIR"] = OWN_FOLDER
if (PROCESS := os.environ.get("PYTEST_XDIST_WORKER")) is not None:  # each has a folder of its own in that of the whole run
    os.environ["RAY_TMPDIR"] = os.path.join(os.environ["RAY_TMPDIR"], PROCESS)
    os.makedirs(os.environ["RAY_TMPDIR"], exist_ok=True)
os.environ.setdefault("RAY_prestart_worker_first_driver", "0")  # processes that most tests never use
os.environ.setdefault("RAY_worker_niceness", "0")  # 15 by default: another test that computes would leave them a 30th of a core

if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported: without a GPU kernels are interpreted

for profile, most in (("quick", USUAL // 4), ("thorough", USUAL)):
    settings.register_profile(profile, max_examples=most, deadline=None, suppress_health_check=[HealthCheck.too_slow])

collect_ignore = ["clients"]  # `make clients` runs them, in an environment of their own

ROOT = Path(__file__).parents[1]
END_TO_END = "tests/end_to_end/"
SECOND_LANE = (
    "tests/cluster/fleet/test_adoption.py", "tests/cluster/losses/test_rejoining.py",
    "tests/deploy/ray_serve_llm/test_on_ray.py", "tests/deploy/serving/test_ctrl_c.py",
    "tests/deploy/serving/test_serve_on_ray.py", "tests/examples/test_ray_data.py",
)  # fmt: skip
"""Of the tests that start Ray, about half of what takes long."""
WAITING = (
    "tests/chaos/test_clients.py", "tests/cluster/test_remote.py", "tests/deploy/batch/test_job.py",
    "tests/deploy/doors/http/test_connections.py", "tests/deploy/serving/test_haproxy.py",
    "tests/scheduler/server/test_server.py", "tests/workers/model/sources/test_hub.py",
)  # fmt: skip
"""Those without Ray that wait most of the time, for a minute and a half in all: one process has them, while others compute."""
LAST = (
    "tests/cluster/losses/test_hung.py", "tests/cluster/losses/test_resuming.py",
    "tests/deploy/doors/http/responses/test_responses_ray.py", "tests/cluster/fleet/test_keepers.py",
    "tests/deploy/doors/grpc/test_ray.py",
)  # fmt: skip
"""Those that whoever is free takes, each by itself, when all others are done: a minute each, so that all end together. All are
slow: without them the files that compute come last, which are short."""
NOTES = pytest.StashKey[list[str]]()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported and collected stays: no collection of garbage looks through it, now or while tests run."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        atexit.register(gc.unfreeze)  # after pytest's last look for garbage; extensions would take for leaked what is frozen
        gc.enable()


@pytest.hookimpl(tryfirst=True)  # before what is marked slow is taken away
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What starts Ray comes first: it waits more than it computes. Of what is marked few, most is slow."""
    items.sort(key=lambda item: _place(item.nodeid.partition("::")[0]))
    cases: dict[str, list[pytest.Function]] = {}
    for item in items:
        if isinstance(item, pytest.Function) and {mark.name for mark in item.iter_markers()} & {"few", "gpu"} == {"few"}:
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for each in cases.values():
        _mark_all_but_few(each)


def _mark_all_but_few(cases: list[pytest.Function]) -> None:
    """Of one test's cases those stay that have every value of every parameter once, or as many as its mark says: those first
    that bring most values which none before them has. A GPU is quick, so its cases all stay."""
    mark, seen = cases[0].get_closest_marker("few"), set[tuple[str, str]]()
    most = mark.args[0] if mark is not None and mark.args else len(cases)
    left = {case: {(name, repr(value)) for name, value in case.callspec.params.items()} for case in cases}
    while left and most > 0:
        best = max(left, key=lambda case: len(left[case] - seen))
        if left[best] <= seen:
            break
        seen |= left.pop(best)
        most -= 1
    for case in left:
        case.add_marker(pytest.mark.slow)


def _place(file: str) -> int:
    return 3 + LAST.index(file) if file in LAST else {"ray": 0, "ray, too": 0, END_TO_END: 1}.get(together(file), 2)


@pytest.fixture(scope="session", autouse=True)
def certificates_read_once() -> Iterator[None]:
    """Each client of HTTP would read those of the whole web, for 25 ms; thousands are made, and none leaves this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ssl, "create_default_context", functools.cache(ssl.create_default_context))
        yield


class Named:
    """Says the name of what has failed at once: a run that is ended from outside never comes to its summary."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._config.get_terminal_writer().line(f" {report.nodeid} ({report.when}, {report.duration:.0f} s)", red=True)


def pytest_configure(config: pytest.Config) -> None:
    settings.load_profile("quick" if "not slow" in config.option.markexpr else "thorough")
    if PROCESS is None:
        config.pluginmanager.register(Named(config))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: "pytest.CallInfo[None]"
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Where Ray failed in CI, its processes' logs are gone with the machine."""
    report = yield
    if report.failed and item.get_closest_marker("ray") is not None:
        with contextlib.suppress(OSError):  # files go while they are looked at
            said = troubles(Path(os.environ["RAY_TMPDIR"]), call.start)
            report.sections.append(("Warnings of processes on Ray", "\n".join(said)))
    return report


def pytest_unconfigure() -> None:
    if OWN_FOLDER is not None:
        shutil.rmtree(OWN_FOLDER, ignore_errors=True)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """Two processes have what starts Ray, one after the other: it waits more than it computes, as does what one of them has
    besides. One has all of `end_to_end`, whose references are dear. The rest goes file by file to whoever is free, some files
    that start Ray last."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return together(nodeid.partition("::")[0])

        def remove_node(self, node: Any) -> str | None:
            """A process has died. The test that it was in is done with, or it would take one process after the other."""
            crashed: str | None = super().remove_node(node)
            for scope in self.workqueue.values():
                if crashed in scope:
                    scope[crashed] = True
            return crashed

    return ByFile(config, log)


@functools.cache
def together(file: str) -> str:
    """Files of one name share a process."""
    if file.startswith(END_TO_END):
        return END_TO_END
    if file in WAITING:
        return "ray"
    if file in LAST or "pytest.mark.ray" not in (ROOT / file).read_text():
        return file
    return "ray, too" if file in SECOND_LANE else "ray"


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A process of xdist's has ended: what it wanted to be said in the end."""
    said = getattr(node, "workeroutput", {}).get("notes", [])
    node.config.stash.setdefault(NOTES, []).extend(said)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for line in config.stash.get(NOTES, []):
        terminalreporter.write_line(line)
