"""A coding agent's traffic in small: each turn finds in the cache all of the prompt before it. `benchmarks.serving.agent` does
the same at any size."""

from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks.serving.agent import HEADERS, Blocks, Report, agent_checkpoint, measure
from benchmarks.serving.agent_doors import DOORS, AgentError, Turn
from cluster.config import EngineConfig
from deploy.doors.access import ApiKeys
from deploy.frontend.clusters import LocalCluster
from deploy.frontend.service.service import Service
from scheduler.config.core import CacheConfig
from tests.deploy.doors.http.conftest import KV_MEMORY_BYTES, Host

TURNS, CONTEXT = 5, 2000
BLOCKS = Blocks()


@pytest.fixture(scope="module")
def agents_address(host: Host, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of an endpoint of the checkpoint that the benchmark makes."""
    model = agent_checkpoint("tiny", tmp_path_factory.mktemp("agent"), CONTEXT)
    engine = EngineConfig(model=str(model), local=True, kv_memory=KV_MEMORY_BYTES, threads=1)
    return host.serve(host.service(LocalCluster(engine), model))


@pytest.mark.few(1)
@pytest.mark.parametrize("door", [*DOORS])
def test_each_turn_finds_all_of_the_one_before(agents_address: str, door: str) -> None:
    report = measure(agents_address, door, TURNS, CONTEXT, BLOCKS, agents=2)
    assert report.faults == []
    assert len(report.lines()[0]) == len(HEADERS)
    for turns in report.turns:
        assert 0.8 * CONTEXT < turns[-1].prompt_tokens < 1.2 * CONTEXT
        for before, turn in pairwise(turns):
            assert BLOCKS.kept(before.prompt_tokens) <= turn.read_tokens < turn.prompt_tokens
            assert turn.prompt_tokens - turn.read_tokens < 2 * CONTEXT / TURNS, "no more is computed than the turn has"


def test_a_turn_that_finds_less_is_a_fault() -> None:
    turns = [Turn(prompt_tokens=100), Turn(prompt_tokens=200, read_tokens=99), Turn(prompt_tokens=300, read_tokens=200)]
    assert Report([turns], BLOCKS).faults == ["agent 0, turn 1: 99 tokens were read, and 100 must have been there"]
    assert [BLOCKS.kept(tokens) for tokens in (31, 32, 255, 256, 287, 288)] == [0, 32, 255, 256, 256, 288]


def test_blocks_are_as_the_server_has_them_by_default() -> None:
    assert (BLOCKS.size_tokens, BLOCKS.stride_tokens) == (CacheConfig().block_size, CacheConfig().hash_stride)


def test_a_refusal_ends_the_measurement(host: Host, service: Service) -> None:
    locked = host.serve(service, keys=ApiKeys(["k"]))
    with pytest.raises(AgentError, match="no API key was given"):
        measure(locked, "messages", 1, 100, BLOCKS)


def test_the_checkpoint_has_room_for_the_context(tmp_path: Path) -> None:
    model = agent_checkpoint("tiny", tmp_path, 100_000)
    assert '"max_position_embeddings": 104096' in (model / "config.json").read_text()
