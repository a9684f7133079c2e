"""The engine on a real local Ray cluster: the same tokens as in one process, and what happens when workers die."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster.engine import EngineError
from deploy import LLM, SamplingParams
from deploy.frontend.outputs import GenerationError, RequestOutput
from tests.processes import WORKER, alive, all_named, descendants, named, wait_gone

pytestmark = pytest.mark.ray

PATIENCE_S = 180.0
TINY = Path(__file__).parents[2] / "examples" / "tiny"
SHARED = list(range(300, 360))
PROMPTS = [[*SHARED, 400 + i, 500 + i] for i in range(6)]
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
LONG = SamplingParams(temperature=0.8, seed=7, max_tokens=400, ignore_eos=True)


def open_llm(*, local: bool, groups: int, size: int, **options: Any) -> LLM:
    return LLM(
        TINY, groups=groups, tensor_parallel_size=size, dtype="float32", block_size=16, kv_memory="32MiB", local=local,
        **options,
    )  # fmt: skip


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def until(what: str, true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@pytest.fixture(scope="module")
def expected() -> dict[str, list[list[int]]]:
    """What one undisturbed process says."""
    with open_llm(local=True, groups=1, size=1) as llm:
        greedy = llm.generate(PROMPTS, GREEDY, progress=False)
        return {"greedy": tokens(greedy), "long": tokens(llm.generate(PROMPTS, LONG, progress=False))}


@pytest.fixture
def llm() -> Iterator[LLM]:
    with open_llm(local=False, groups=2, size=2, check_invariants=True) as engine:
        yield engine
    assert not ray.is_initialized()


def test_two_groups_of_two_ranks_say_the_same_and_outlive_a_worker(llm: LLM, expected: dict[str, list[list[int]]]) -> None:
    first = llm.generate(PROMPTS, GREEDY, progress=False)
    assert tokens(first) == expected["greedy"]
    again = llm.generate(PROMPTS, GREEDY, progress=False)
    assert tokens(again) == expected["greedy"]
    assert all((output.num_cached_tokens or 0) >= 48 for output in again), "the shared prefix of 60 tokens is cached by now"
    stats = llm.stats()
    assert [group.up for group in stats.groups] == [True, True]
    assert all(group.held_blocks == 0 for group in stats.groups)

    victims = all_named(WORKER, 4)
    generations = llm.iterate(PROMPTS, LONG)
    latest: dict[int, RequestOutput] = {}
    killed = False
    for index, output in generations:
        latest[index] = output
        if not killed and len(latest) == len(PROMPTS) and all(len(o.outputs[0].token_ids) > 5 for o in latest.values()):
            os.kill(min(victims), signal.SIGKILL)
            killed = True
    assert killed
    assert tokens([latest[index] for index in range(len(PROMPTS))]) == expected["long"]

    until("the lost group was not replaced", lambda: all(group.up for group in llm.stats().groups))
    assert tokens(llm.generate(PROMPTS, GREEDY, progress=False)) == expected["greedy"]


def test_without_a_group_left_requests_fail_with_the_reason() -> None:
    with open_llm(local=False, groups=1, size=1, max_group_restarts=0, hung_after_s=600.0) as llm:
        processes = descendants(os.getpid())
        (victim,) = all_named(WORKER, 1)
        os.kill(victim, signal.SIGSTOP)  # so that no request ends before it dies
        with ThreadPoolExecutor(1) as threads:
            killed = threads.submit(kill_once_it_has_work, llm, victim)
            last = dict(llm.iterate(PROMPTS, LONG))
        killed.result()
        assert len(last) == len(PROMPTS)
        assert all(output.error and "died" in output.error for output in last.values())
        with pytest.raises((GenerationError, EngineError), match="died"):
            llm.generate(PROMPTS, GREEDY, progress=False)
    assert not wait_gone(processes)


def kill_once_it_has_work(llm: LLM, victim: int) -> None:
    try:
        until("it was given no work", lambda: llm.stats().groups[0].running > 0)
    finally:
        os.kill(victim, signal.SIGKILL)


def test_more_ranks_than_the_cluster_has_is_said_at_once() -> None:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        with pytest.raises(EngineError, match=r"room for 1 group"):
            open_llm(local=False, groups=3, size=2)
    finally:
        ray.shutdown()


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
