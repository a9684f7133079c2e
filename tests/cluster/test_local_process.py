"""Local groups in a process of their own, as on a GPU: the same outputs, errors and ends as with threads."""

import os
import signal
import socket
from pathlib import Path
from threading import Timer
from unittest.mock import MagicMock

import pytest

import cluster.local.engine
from cluster.config import EngineConfig
from cluster.engine import EngineError
from cluster.local.engine import LocalEngine
from cluster.local.groups import EPOCH
from cluster.local.process import GroupSays, GroupUp, ProcessGroups
from cluster.resolve import resolve
from deploy import LLM, SamplingParams
from deploy.config.load import EMBEDDED_MODEL, ConfigError
from deploy.frontend.outputs import GenerationError
from kvcache.ids import GroupId
from kvcache.layout import PoolSizes
from scheduler.protocol.leaders import Beat
from scheduler.protocol.wire import FrameSocket
from scheduler.state.resident import ProtocolError
from workers.config import ResolvedWorker

PROMPTS = [[1, 2, 3, 4], [5, 6, 7], list(range(40, 140))]
PARAMS = [SamplingParams(max_tokens=12, temperature=0.8, seed=number, ignore_eos=True) for number in range(3)]


@pytest.fixture
def in_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.local.engine, "ThreadGroups", as_on_a_gpu)


def as_on_a_gpu(config: EngineConfig, resolved: ResolvedWorker) -> ProcessGroups:
    return ProcessGroups(config, resolved, config.hung_after_s)


def two_groups() -> LLM:
    return LLM(local=True, groups=2, block_size=16, threads=1, kv_memory="64MiB", seed=1)


def outputs(llm: LLM) -> list[tuple[int, ...]]:
    return [tuple(output.outputs[0].token_ids) for output in llm.generate(PROMPTS, PARAMS, progress=False)]


def child_of(llm: LLM) -> int:
    engine = llm._engine
    assert isinstance(engine, LocalEngine)
    groups = engine._groups
    assert isinstance(groups, ProcessGroups)
    assert groups._child is not None
    return groups._child.pid


def test_the_same_tokens_as_with_threads_and_it_is_gone_when_the_engine_is(monkeypatch: pytest.MonkeyPatch) -> None:
    with two_groups() as llm:
        as_threads = outputs(llm)
    monkeypatch.setattr(cluster.local.engine, "ThreadGroups", as_on_a_gpu)
    with two_groups() as llm:
        child = child_of(llm)
        os.kill(child, 0)
        assert outputs(llm) == as_threads
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


@pytest.mark.usefixtures("in_a_process")
def test_what_the_ranks_cannot_do_is_said_as_they_say_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, '
        '"intermediate_size": 64, "vocab_size": 64, "max_position_embeddings": 64}'
    )
    with pytest.raises(ConfigError, match="safetensors"):
        LLM(str(tmp_path), local=True, threads=1)


@pytest.mark.usefixtures("in_a_process")
def test_a_process_that_is_stopped_is_ended_and_so_is_what_is_under_way() -> None:
    with LLM(local=True, block_size=16, threads=1, kv_memory="64MiB", hung_after_s=2) as llm:
        stream = llm.iterate([[1, 2, 3]], SamplingParams(max_tokens=2000, ignore_eos=True))
        next(iter(stream))
        os.kill(child_of(llm), signal.SIGSTOP)
        *_, (_, last) = stream
        assert last.error is not None
        assert "was ended: group 0 hangs: its leader has said nothing" in last.error
        with pytest.raises((EngineError, GenerationError), match="hangs"):
            llm.generate([[1]], progress=False)


@pytest.mark.parametrize(("beat", "ended"), [(Beat(EPOCH, 6.0, 300.0, 0, 0.0), False), (Beat(EPOCH, 6.0, 5.0, 0, 0.0), True)])
def test_a_step_that_takes_longer_than_such_a_step_takes(beat: Beat, ended: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """However much the process says meanwhile. A first step compiles, and has its time."""
    config = EngineConfig(model=str(EMBEDDED_MODEL), local=True, hung_after_s=4.0)
    groups, child, host = as_on_a_gpu(config, resolve(config, "cpu", 1)), MagicMock(), MagicMock()
    monkeypatch.setattr(groups, "_child", child)
    child.kill.side_effect = groups._closing.set
    groups._handle(host, GroupUp(GroupId(0), PoolSizes(8), PoolSizes(0), ()))
    groups._handle(host, GroupSays(GroupId(0), beat))
    Timer(1.0, groups._closing.set).start()
    groups._watch()
    assert child.kill.called is ended
    assert ("group 0 hangs: a step has not ended after 6.0 s" in groups._reason) is ended


def test_what_cannot_be_taken_in_ends_the_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody else would read what they say: whoever waits for them would wait for ever."""
    config = EngineConfig(model=str(EMBEDDED_MODEL), local=True, groups=2)
    groups, child, host = as_on_a_gpu(config, resolve(config, "cpu", 1)), MagicMock(), MagicMock()
    host.hear.side_effect = ProtocolError("group 1 sent report 3, expected 2: fence it")
    ours, theirs = map(FrameSocket, socket.socketpair())
    for name, value in (("_child", child), ("_host", host), ("_socket", ours)):
        monkeypatch.setattr(groups, name, value)
    groups._started.set()
    theirs.send(GroupSays(GroupId(1), Beat(EPOCH)))
    theirs.close()
    groups._read()
    assert child.kill.called
    assert [call.args[0] for call in host.group_lost.call_args_list] == [0, 1]
    assert "group 1 sent report 3, expected 2" in host.group_lost.call_args.args[1]


@pytest.mark.usefixtures("in_a_process")
def test_a_process_that_dies_ends_what_is_under_way_with_the_reason() -> None:
    with LLM(local=True, block_size=16, threads=1, kv_memory="64MiB") as llm:
        endless = SamplingParams(max_tokens=2000, ignore_eos=True)
        stream = llm.iterate([[1, 2, 3]], endless)
        next(iter(stream))
        os.kill(child_of(llm), signal.SIGKILL)
        *_, (_, last) = stream
        assert last.error is not None
        assert "process of the local groups has ended" in last.error
