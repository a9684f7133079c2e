"""Groups by load on a Ray cluster that autoscales: work brings a node and a group, idleness takes both away, and a group that
goes takes no request with it."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import ray

from cluster.config import EngineConfig
from cluster.fleet.autoscale import Autoscaler
from cluster.fleet.fleet import Fleet
from cluster.launch import plan
from cluster.remote import SchedulerStream
from deploy import LLM, SamplingParams
from deploy.frontend.frontend import FrontEnd
from deploy.frontend.generation.generation import Generation
from deploy.text.prompts import Prompt, read_model_limits
from scheduler.server.stats import EngineStats
from tests.shared import waiting
from tests.shared.processes import WORKER, all_named, stopped_in_the_midst
from tests.shared.ray_heads import autoscaling_ray, own_ray

pytestmark = [pytest.mark.ray, pytest.mark.slow]

TINY = Path(__file__).parents[3] / "examples" / "tiny"
PATIENCE_S = 180.0
TOKENS, MANY_TOKENS = 200, 240
LONG = SamplingParams(temperature=0.8, seed=3, max_tokens=TOKENS, ignore_eos=True)
OPTIONS: dict[str, Any] = {
    "max_num_seqs": 2, "kv_memory": 32 << 20, "dtype": "float32", "block_size": 16, "hung_after_s": 10 * PATIENCE_S,
}  # fmt: skip


until = partial(waiting.until, patience_s=PATIENCE_S, every_s=0.05)


# ---- a cluster that autoscales ----


def alive_nodes() -> int:
    return sum(node["Alive"] for node in ray.nodes())


class NoHelp(Exception):
    """The second group has not come. On a busy machine a node that Ray's autoscaler starts may time out."""


def test_load_brings_a_node_and_a_group_and_idleness_takes_them_away(tmp_path: Path) -> None:
    try:
        load_brings_and_idleness_takes(tmp_path / "first")
    except NoHelp:  # once more, with another Ray cluster; what Manta does with its nodes is the same
        load_brings_and_idleness_takes(tmp_path / "second")


def load_brings_and_idleness_takes(folder: Path) -> None:
    """The head has no room for groups: each has a node of its own, so that whichever goes leaves one empty."""
    folder.mkdir()
    with autoscaling_ray(folder, head_cpus=0, worker_cpus=1, max_workers=2) as address:
        try:
            with LLM(
                TINY, ray_address=address, groups=1, max_groups=2, threads=1, scale_wait_s=0.5, scale_idle_s=2.0,
                scale_cooldown_s=1.0, check_invariants=True, **OPTIONS,
            ) as llm:  # fmt: skip
                assert alive_nodes() == 2
                answer_until_second_group_works(llm)
                assert alive_nodes() == 3, "it is on a node that was not there before"
                until("the idle group did not go", lambda: len(llm.stats().groups) == 1)
                until("its node did not go", lambda: alive_nodes() == 2)
                assert_whole(llm, [[300, 301, 302]])
        finally:
            ray.shutdown()


def answer_until_second_group_works(llm: LLM) -> None:
    """Keeps a queue until the second group has taken some of it."""
    round_ = 0
    deadline = time.monotonic() + PATIENCE_S
    while not any(group.starts for group in llm.stats().groups if group.group == 1):
        if time.monotonic() > deadline:
            raise NoHelp
        assert_whole(llm, [[300 + round_, 400 + i] for i in range(16)])
        round_ += 1


def assert_whole(llm: LLM, prompts: list[list[int]]) -> None:
    """Every request is answered, to its last token."""
    outputs = llm.generate(prompts, LONG, progress=False)
    assert [(output.error, len(output.outputs[0].token_ids)) for output in outputs] == [(None, TOKENS)] * len(prompts)


# ---- a fleet of two groups ----


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    config = EngineConfig(model=str(TINY), groups=2, check_invariants=True, device="cpu", **OPTIONS)
    with own_ray(8), closing(Fleet(config, plan(config))) as opened:
        opened.start(lambda _: None)
        yield opened


@pytest.fixture
def frontend(fleet: Fleet) -> Iterator[FrontEnd]:
    address = fleet.current().address
    limits = read_model_limits(TINY, None)
    opened = FrontEnd(lambda *told: SchedulerStream(address.host, address.port, address.token, *told), limits, None)
    yield opened
    opened.close()


def both_are_up(fleet: Fleet) -> bool:
    return [group.up and not group.draining for group in engine(fleet).groups] == [True, True]


def test_a_dry_run_says_what_it_would_do_and_why(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    config = fleet.config
    fleet.config = replace(config, max_groups=2, scale_idle_s=1.0, scale_cooldown_s=0.0, scale_dry_run=True)
    fleet.resize(1)
    autoscaler = Autoscaler.of(fleet)
    assert autoscaler is not None
    try:
        until("nothing was decided twice", lambda: caplog.text.count("autoscaler: drain (dry run): group 1 has been idle") > 1)
    finally:
        autoscaler.close()
        fleet.resize(2)
        fleet.config = config
    assert "(scale_idle_s=1); 0 cached blocks are lost, 2 groups become 1" in caplog.text
    assert fleet.target == 2
    assert both_are_up(fleet)


@pytest.mark.parametrize("moves", [False, True], ids=["they finish where they are", "they move when time is over"])
def test_a_group_is_removed_while_its_requests_run(fleet: Fleet, frontend: FrontEnd, moves: bool) -> None:
    expected = ended(submit(frontend))
    fleet.config = replace(fleet.config, drain_timeout_s=0.0 if moves else PATIENCE_S)
    before = engine(fleet).preemptions
    both_busy = stopped_in_the_midst(all_named(WORKER, 2), lambda: begin(frontend), lambda _: running(fleet) == [2, 2])
    with ThreadPoolExecutor(1) as threads, both_busy as generations:
        removing = threads.submit(fleet.remove_group, 1)
        if moves:
            until("they do not move", lambda: engine(fleet).preemptions == before + 2)
        else:
            until("it does not drain", lambda: [group.draining for group in engine(fleet).groups] == [False, True])

    assert removing.result()
    assert [group.group for group in engine(fleet).groups] == [0]
    all_named(WORKER, 1)
    assert ended(generations) == expected
    assert engine(fleet).preemptions == before + 2 * moves

    assert fleet.add_group() == 1
    until("no group came in its place", lambda: both_are_up(fleet))


def engine(fleet: Fleet) -> EngineStats:
    stats = fleet.status().engine
    assert stats is not None
    return stats


def running(fleet: Fleet) -> list[int]:
    return [group.running for group in engine(fleet).groups]


def begin(frontend: FrontEnd) -> list[Generation]:
    """Each has a token."""
    generations = submit(frontend)
    until("not all were started", lambda: all(tokens(generation) for generation in generations))
    return generations


def submit(frontend: FrontEnd) -> list[Generation]:
    """As many as the two groups run at once."""
    params = msgspec.structs.replace(LONG, max_tokens=MANY_TOKENS)
    return frontend.submit([Prompt([500 + i, 7], params) for i in range(4)], lambda _: None)


def tokens(generation: Generation) -> list[int]:
    output = generation.take()
    assert output.error is None
    return list(output.outputs[0].token_ids)


def ended(generations: list[Generation]) -> list[list[int]]:
    until("not all have ended", lambda: all(generation.finished for generation in generations))
    answers = [tokens(generation) for generation in generations]
    assert {len(answer) for answer in answers} == {MANY_TOKENS}
    return answers
