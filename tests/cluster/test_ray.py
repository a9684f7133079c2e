"""Ends of an engine on a real local Ray cluster: no group for a while, no room, Ctrl-C. `test_two_groups.py` has the rest."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cluster.engine import EngineError
from cluster.fleet import restarts
from deploy import LLM, SamplingParams
from deploy.frontend.outputs import RequestOutput
from tests.shared import waiting
from tests.shared.processes import SCHEDULER, WORKER, alive, all_named, descendants, named, wait_gone
from tests.shared.ray_heads import own_ray

pytestmark = pytest.mark.ray

PATIENCE_S = 180.0
TINY = Path(__file__).parents[2] / "examples" / "tiny"
SHARED = list(range(300, 360))
PROMPTS = [[*SHARED, 400 + i, 500 + i] for i in range(6)]
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
LONG = SamplingParams(temperature=0.8, seed=7, max_tokens=200, ignore_eos=True)


def open_llm(*, local: bool, groups: int, size: int, **options: Any) -> LLM:
    return LLM(
        TINY, groups=groups, tensor_parallel_size=size, dtype="float32", block_size=16, kv_memory="32MiB", local=local,
        **options,
    )  # fmt: skip


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


until = partial(waiting.until, patience_s=PATIENCE_S, every_s=0.05)


@pytest.mark.slow
def test_requests_wait_for_the_only_group_though_it_has_no_restart_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those under way go on, exact, once it is tried again; so do newcomers, and those whom another scheduler gets."""
    monkeypatch.setattr(restarts, "SPENT_PAUSE_S", 5.0)
    others = descendants(os.getpid())
    with open_llm(local=False, groups=1, size=1, max_group_restarts=0, hung_after_s=600.0) as llm:
        expected = tokens(llm.generate(PROMPTS, LONG, progress=False))
        processes = descendants(os.getpid()).keys() - others.keys()
        (victim,) = all_named(WORKER, 1)
        os.kill(victim, signal.SIGSTOP)  # so that no request ends before it dies
        with ThreadPoolExecutor(2) as threads:
            killed = threads.submit(kill_once_it_has_work, llm, victim)
            under_way = threads.submit(llm.generate, PROMPTS, LONG, progress=False)
            killed.result()
            until("it is not spent", lambda: not llm.stats().groups[0].up)
            time.sleep(1.0)
            os.kill(all_named(SCHEDULER, 1)[0], signal.SIGKILL)
            assert tokens(llm.generate(PROMPTS, GREEDY, progress=False)), "nobody was up"
            assert tokens(under_way.result()) == expected
    assert not wait_gone(processes)


def kill_once_it_has_work(llm: LLM, victim: int) -> None:
    try:
        until("it was given no work", lambda: llm.stats().groups[0].running > 0)
    finally:
        os.kill(victim, signal.SIGKILL)


@pytest.mark.slow
def test_more_ranks_than_the_cluster_has_is_said_at_once() -> None:
    with own_ray(2), pytest.raises(EngineError, match=r"room for 1 group"):
        open_llm(local=False, groups=3, size=2)


@pytest.mark.slow
def test_ctrl_c_ends_everything() -> None:
    command = [sys.executable, "-m", "manta", "generate", "--groups", "2", "--tensor-parallel-size", "1"]
    command += ["--kv-memory", "32MiB", "--max-tokens", "1500", "--ignore-eos", "--stream", "def f(x):"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    try:
        assert process.stdout is not None
        while not named(WORKER, process.pid):
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            time.sleep(0.2)
        assert process.stdout.read(1), "no text was streamed"
        below = descendants(process.pid)
        os.killpg(process.pid, signal.SIGINT)  # what a terminal does
        _, errors = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert b"Traceback" not in errors
    assert not wait_gone(below), {pid: below[pid] for pid in alive(below)}
