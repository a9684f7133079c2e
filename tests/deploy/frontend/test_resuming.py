"""The scheduler dies in the midst of everything, again and again: what clients get is what they would have got otherwise.

A real scheduler behind its socket, a real model in a group of its own, which dies with it.
"""

import queue
import time
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest

from cluster.engine import EngineError
from deploy.config.load import EMBEDDED_MODEL
from deploy.frontend import frontend
from deploy.frontend.errors import Fault
from deploy.frontend.frontend import FrontEnd
from deploy.frontend.generation.generation import Generation
from deploy.frontend.outputs import OutputDelta, RequestOutput
from deploy.frontend.service.model import ServedModel
from deploy.text.prompts import Prompt, Terms
from scheduler.config.core import QueueBounds
from scheduler.protocol.messages import Pooling
from scheduler.protocol.sampling import Grammar, SamplingParams
from tests.deploy.frontend.mortal_cluster import MOST_TOKENS, PATIENCE_S, ROWS, MortalCluster, until
from tests.end_to_end.same import require_equal

MODEL = ServedModel.read("tiny", EMBEDDED_MODEL, MOST_TOKENS)
TEXT = "def add(a, b):\n    return"
LONG: dict[str, Any] = {"max_tokens": 60, "ignore_eos": True}
KINDS = {
    "greedy": SamplingParams(temperature=0.0, **LONG),
    "without a seed": SamplingParams(temperature=1.2, **LONG),
    "with a seed": SamplingParams(temperature=1.2, seed=9, top_k=40, **LONG),
    "three choices": SamplingParams(temperature=1.0, n=3, **LONG),
    "penalties": SamplingParams(
        temperature=0.7, seed=3, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.4, **LONG
    ),
    "a stop string": SamplingParams(temperature=0.0, stop=("1:i+1:i+1:i+1:i+1:",), max_tokens=60),
    "min_tokens": SamplingParams(temperature=2.0, seed=1, stop_token_ids=tuple(range(0, 999, 2)), min_tokens=30, max_tokens=60),
    "log-probabilities": SamplingParams(temperature=0.9, logprobs=3, prompt_logprobs=2, **LONG),
    "a grammar": SamplingParams(temperature=1.0, seed=5, grammar=Grammar("regex", "[a-f]{40}[0-9]{10}"), max_tokens=60),
    "as many as fit": SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True),
}
"""More choices than the group has rows: some wait."""


def prompts() -> list[Prompt]:
    tokenizer = MODEL.tokenizer
    assert tokenizer is not None
    return [Prompt(tokenizer.encode(f"{name}: {TEXT}"), params) for name, params in KINDS.items()]


def opened(cluster: MortalCluster) -> FrontEnd:
    return FrontEnd(cluster.connect, MODEL.limits, MODEL.tokenizer)


def outputs(cluster: MortalCluster, asked: list[Prompt]) -> list[RequestOutput]:
    """Whole, put together of what was new each time."""
    grown: queue.SimpleQueue[Generation] = queue.SimpleQueue()
    with closing(opened(cluster)) as front_end:
        generations = front_end.submit(asked, grown.put)
        told: dict[Generation, list[OutputDelta]] = {generation: [] for generation in generations}
        while not all(generation.finished for generation in generations) or not grown.empty():
            generation = grown.get(timeout=PATIENCE_S)
            if (delta := generation.take_delta()) is not None:
                told[generation].append(delta)
        whole = [generation.take() for generation in generations]
    for output, deltas in zip(whole, told.values(), strict=True):
        for choice in output.outputs:
            parts = [part for delta in deltas for part in delta.choices if part.index == choice.index]
            assert "".join(part.text for part in parts) == choice.text, "nothing twice, nothing missing"
            assert [token for part in parts for token in part.token_ids] == choice.token_ids
    return whole


@pytest.fixture(scope="module")
def undisturbed() -> list[RequestOutput]:
    with closing(MortalCluster()) as cluster:
        whole = outputs(cluster, prompts())
    ends = {name: output.outputs[0].finish_reason for name, output in zip(KINDS, whole, strict=True)}
    assert {name for name, end in ends.items() if end == "stop"} == {"a stop string", "min_tokens", "a grammar"}
    return whole


@pytest.mark.few(1)
@pytest.mark.parametrize(("deaths", "cuts"), [((1, 40, 90, 200), False), ((13, 7, 300), True)], ids=["killed", "cut"])
def test_a_scheduler_that_dies_is_not_noticed(
    undisturbed: list[RequestOutput], deaths: tuple[int, ...], cuts: bool
) -> None:
    with closing(MortalCluster(deaths, cuts=cuts)) as cluster:
        resumed = outputs(cluster, prompts())
        assert cluster.connections == 1 + len(deaths)
    for name, output, expected in zip(KINDS, resumed, undisturbed, strict=True):
        assert output.error is None, name
        require_equal(output, expected, name)
        assert (output.prompt_logprobs is None) == (expected.prompt_logprobs is None), name


@pytest.mark.slow
def test_a_connection_that_loses_all_that_it_carries_is_left(undisturbed: list[RequestOutput]) -> None:
    """No kernel ever tells of it, neither here nor there."""
    deaths = (40, 200)
    with closing(MortalCluster(deaths, holes=True)) as cluster:
        resumed = outputs(cluster, prompts())
        assert cluster.connections == 1 + len(deaths)
    for name, output, expected in zip(KINDS, resumed, undisturbed, strict=True):
        assert output.error is None, name
        require_equal(output, expected, name)


@pytest.mark.few(1)
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_what_is_made_of_prompts_is_made_again(pooling: Pooling) -> None:
    """It has no tokens from which it could go on: the next scheduler is asked for the whole, and what comes is the same."""
    tokenizer = MODEL.tokenizer
    assert tokenizer is not None
    asked = [Prompt(tokenizer.encode(f"{name}: {TEXT}"), pooling=pooling, answered=True) for name in KINDS]
    with closing(MortalCluster()) as cluster:
        undisturbed = outputs(cluster, asked)
    with closing(MortalCluster()) as cluster, closing(opened(cluster)) as front_end:
        cluster.replace(grouped=False)
        generations = front_end.submit([*asked, prompts()[0]], lambda _: None)
        until("they were not submitted", lambda: len(cluster.life.core.sequences) == len(generations))
        for _ in range(2):
            cluster.replace(grouped=False)
            until("not all were resumed", lambda: cluster.life.core.counters.resumed == len(generations))
        cluster.replace()
        until("not all have ended", lambda: all(generation.finished for generation in generations))
        for generation, expected in zip(generations, undisturbed, strict=False):
            output = generation.take()
            assert (output.error, output.outputs[0].finish_reason, output.outputs[0].token_ids) == (None, "stop", [])
            assert output.pooled is not None
            assert expected.pooled is not None
            assert output.pooled.tolist() == pytest.approx(expected.pooled.tolist(), abs=1e-6)


def test_what_is_counted_counts_on() -> None:
    """Figures of its first start are those of the first scheduler; its tenant pays once; nobody is refused."""
    bounds = QueueBounds(max_queued_requests=1)
    shared = MODEL.tokenizer.encode(TEXT * 6) if MODEL.tokenizer else []
    asked = Prompt(shared, SamplingParams(temperature=0.0, **LONG), terms=Terms(tenant="ann"))
    with closing(MortalCluster(bounds=bounds)) as cluster, closing(opened(cluster)) as front_end:
        grown: queue.SimpleQueue[Generation] = queue.SimpleQueue()
        front_end.submit([replace(asked, params=SamplingParams(max_tokens=1))], grown.put)
        until("the first has not ended", lambda: grown.get(timeout=PATIENCE_S).finished)
        generations = front_end.submit([asked] * ROWS, grown.put)
        until("not all have begun", lambda: all(generation.unread(generation.stream) > 4 for generation in generations))
        cluster.replace(grouped=False)
        until("not all were resumed", lambda: cluster.life.core.counters.resumed == ROWS)
        served = [sequence.tenant.served for sequence in cluster.life.core.sequences.values()]
        assert served == [0.0] * ROWS, "neither the prompt nor what was told is charged again"
        assert cluster.life.core.counters.requests == 0
        assert cluster.life.core.counters.refused == 0
        cluster.replace()
        until("not all have ended", lambda: all(generation.finished for generation in generations))
        for generation in generations:
            output = generation.take()
            assert output.error is None
            assert output.num_cached_tokens == len(shared) - 1


def test_a_deadline_counts_from_the_first_submit() -> None:
    """The scheduler itself ends it, by its own clock: nobody here keeps the time."""
    asked = Prompt([5, 6, 7], SamplingParams(**LONG), terms=Terms(deadline_s=4.0))
    with closing(MortalCluster()) as cluster, closing(opened(cluster)) as front_end:
        cluster.replace(grouped=False)
        [generation] = front_end.submit([asked], lambda _: None)
        until("it was not submitted", lambda: cluster.life.core.sequences)
        begun_s = time.monotonic()
        cluster.replace(grouped=False)
        until("it was not resumed", lambda: cluster.life.core.counters.resumed == 1)
        [sequence] = cluster.life.core.sequences.values()
        assert sequence.deadline_s < begun_s + 4.0
        assert sequence.deadline_s - sequence.arrived_s == pytest.approx(4.0)
        while not generation.finished:
            cluster.life.tick()
            time.sleep(0.01)
        assert generation.take().error == "the request did not end within 4 s: it has not begun"


def test_what_was_aborted_or_stopped_just_before_stays_so() -> None:
    """Neither word has reached the scheduler."""
    with closing(MortalCluster()) as cluster, closing(opened(cluster)) as front_end:
        stops = replace(prompts()[0], params=SamplingParams(temperature=0.0, stop=("a\n``",), **LONG))
        [kept, aborted, stopped] = front_end.submit([prompts()[0], prompts()[1], stops], lambda _: None)
        stream: Any = front_end.engine
        stream.abort = stream.stop = lambda *_: None
        until("they have not begun", lambda: aborted.unread(aborted.stream) and kept.unread(kept.stream) > 2)
        front_end.abort([aborted])
        until("no stop string was found", lambda: stopped._choices[0].stopped)
        assert not stopped.finished
        cluster.replace()
        until("it was not resumed", lambda: kept.finished)
        assert cluster.life.core.counters.resumed == 1
        assert not aborted.finished
        [choice] = stopped.take().outputs
        assert (choice.finish_reason, choice.stop_reason) == ("stop", "a\n``")


def test_a_scheduler_that_does_not_come_is_told_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frontend, "REACH_TIMEOUT_S", 0.5)
    with closing(MortalCluster()) as cluster, closing(opened(cluster)) as front_end:
        [under_way] = front_end.submit([prompts()[0]], lambda _: None)
        until("it has not begun", lambda: under_way.unread(under_way.stream))
        cluster.life.die()
        until("it is not known to be lost", lambda: not front_end.connected)
        [newcomer] = front_end.submit([prompts()[1]], lambda _: None)
        for generation in (under_way, newcomer):
            until("it waits on", lambda: under_way.finished and newcomer.finished)
            output = generation.take()
            assert "no scheduler could be reached within 0.5 s" in str(output.error)
            assert output.fault is Fault.UNAVAILABLE
        monkeypatch.undo()
        cluster.life = cluster._live()
        [later] = front_end.submit([prompts()[0]], lambda _: None)
        until("it has not ended", lambda: later.finished)
        assert later.take().error is None


def test_a_cluster_that_is_gone_for_good_fails_what_is_under_way() -> None:
    with closing(MortalCluster()) as cluster, closing(opened(cluster)) as front_end:
        [generation] = front_end.submit([prompts()[0]], lambda _: None)
        until("it has not begun", lambda: generation.unread(generation.stream))
        cluster.close()
        until("it waits on", lambda: generation.finished)
        assert "the cluster is gone for good" in str(generation.take().error)
        with pytest.raises(EngineError, match="gone for good"):
            front_end.submit([prompts()[0]], lambda _: None)
        cluster.life = cluster._live(grouped=False)


def test_a_scheduler_that_is_shut_down_is_not_waited_for() -> None:
    """It is no death: whoever ended it will have no other."""
    with closing(MortalCluster()) as cluster, closing(opened(cluster)) as front_end:
        [generation] = front_end.submit([prompts()[0]], lambda _: None)
        until("it has not begun", lambda: generation.unread(generation.stream))
        cluster.life.shut_down()
        until("it waits on", lambda: generation.finished)
        assert generation.take().error == "the scheduler was shut down"
