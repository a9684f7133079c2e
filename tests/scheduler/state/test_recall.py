"""A client that has lost its stream comes back: what it has is not computed again, and what follows is what would have come."""

from typing import Any

import numpy as np
import pytest
from msgspec import structs

from scheduler.protocol.messages import FinishReason, Had
from scheduler.state.recall import KEPT_S
from tests.scheduler.cluster import Cluster, Stream, filled

PROMPT = filled(0, 1)


def begun(cluster: Cluster, tokens: int = 6, **options: Any) -> list[Stream]:
    """Streams of a client that may come back, each with so many tokens."""
    streams = cluster.submit(PROMPT, **{"max_tokens": 20, "kept": True} | options)
    while any(len(stream.tokens) < tokens for stream in streams):
        cluster.step()
    return streams


def lengths(streams: list[Stream]) -> list[int]:
    return [len(stream.tokens) for stream in streams]


@pytest.mark.parametrize("how", ["runs", "aborted", "its front end has gone", "preempted", "ended"])
def test_it_goes_on_behind_what_the_client_has(how: str) -> None:
    """Wherever the sequence before it is by then, and whichever front end is asked."""
    cluster = Cluster((16, 16))
    (stream,) = begun(cluster)
    if how == "aborted":
        cluster.abort(stream)
    elif how == "its front end has gone":
        cluster.front_end_down(0)
    elif how == "preempted":
        for group in (0, 1):
            cluster.lose(group, returning=True)
    elif how == "ended":
        cluster.run()
    heard, computed = len(stream.tokens) - 1, cluster.core.counters.output_tokens
    (again,) = cluster.come_back([stream], [heard], front_end=1)
    for group in (0, 1) if how == "preempted" else ():
        cluster.bring_up(group)
    cluster.step(times=1 if how == "ended" else 3)
    assert again.tokens[:heard] == stream.tokens[:heard]
    if how != "runs":
        assert cluster.core.counters.output_tokens - computed <= 3 * (2 if how == "preempted" else 1)
    cluster.run()
    assert again.tokens == again.expected
    assert cluster.reason(again) is FinishReason.LENGTH


def test_it_starts_with_what_it_has_and_is_counted_once() -> None:
    """Its first start is the one that there was: hits, misses and what its tenant has paid stay as they were."""
    cluster = Cluster((16,))
    cluster.submit(PROMPT, max_tokens=1)
    cluster.run()
    (stream,) = begun(cluster, tenant="a")
    assert stream.started is not None
    before = structs.replace(cluster.core.counters)
    served = cluster.sequence(stream).tenant.served
    (again,) = cluster.come_back([stream], lengths([stream]))
    assert again.started is None, "it is said with the first tokens"
    cluster.abort(stream)
    cluster.step()
    assert again.started == structs.replace(
        stream.started, stream=again.number, queued_s=0.0, output=np.array(stream.tokens, np.int32).tobytes()
    )
    now = cluster.core.counters
    counted = ("requests", "prompt_tokens", "started_tokens", "cached_tokens")
    assert [getattr(now, name) for name in counted] == [getattr(before, name) for name in counted]
    assert now.resumed == before.resumed + 1
    assert cluster.sequence(again).tenant.served - served <= 2.0 * 2, "a token, or two"


@pytest.mark.parametrize("ends", [True, False])
def test_others_who_ask_for_the_same_take_nobodys_place(*, ends: bool) -> None:
    """Another client's is younger, and has not come as far as what the first one has."""
    cluster = Cluster((24, 24))
    (stream,) = begun(cluster, seed=5)
    (other,) = cluster.submit(PROMPT, front_end=1, max_tokens=20, kept=True, seed=5)
    if ends:
        cluster.abort(stream)
    computed = cluster.core.counters.output_tokens
    (again,) = cluster.come_back([stream], lengths([stream]), front_end=1)
    cluster.step(times=2)
    assert again.tokens[: len(stream.tokens)] == stream.tokens[: len(again.tokens)], "without waiting"
    assert len(again.tokens) >= 6
    assert len(other.tokens) < 6
    assert cluster.core.counters.output_tokens - computed <= 3 * 4
    cluster.run()
    assert again.tokens == again.expected


def test_choices_go_on_each_from_its_own_place() -> None:
    cluster = Cluster((24,))
    streams = begun(cluster, n=3, max_tokens=10)
    cluster.abort(streams[1])
    again = cluster.come_back(streams, [2, 5, 0], front_end=1)
    computed = cluster.core.counters.requests
    cluster.run()
    assert [stream.tokens for stream in again] == [stream.expected for stream in again]
    assert [stream.started is not None and len(stream.started.output) // 4 for stream in again] == [2, 5, 0]
    assert cluster.core.counters.requests == computed


def test_what_was_told_to_its_end_ends_at_once() -> None:
    cluster = Cluster((16,))
    (stream,) = begun(cluster)
    cluster.run()
    computed = cluster.core.counters.output_tokens
    (again,) = cluster.come_back([stream], lengths([stream]))
    assert (again.tokens, cluster.reason(again)) == (again.expected, FinishReason.LENGTH)
    assert cluster.core.counters.output_tokens == computed


@pytest.mark.parametrize(
    "other", ["prompt", "salt", "parameters", "stop ids", "check", "too much", "late", "scheduler", "not asked"]
)
def test_who_is_not_known_is_computed_again(other: str) -> None:
    """And says the same, where it is the same request."""
    cluster = Cluster((16,))
    (stream,) = begun(cluster, kept=other != "not asked")
    heard = lengths([stream])
    cluster.abort(stream)
    request = stream.request
    if other == "prompt":
        stream.prompt = [*PROMPT[:-1], 0]
        request = structs.replace(request, tokens=np.array(stream.prompt, np.int32).tobytes())
    elif other == "salt":
        request = structs.replace(request, salt="tenant")
    elif other == "parameters":
        request = structs.replace(request, params=structs.replace(request.params, temperature=0.5))
    elif other == "stop ids":
        request = structs.replace(request, stop_ids=(7,))
    elif other == "late":
        cluster.wait(KEPT_S + 1.0)
        (last,) = cluster.submit([1], max_tokens=1, kept=True)
        cluster.run()
        assert last.finished is not None
    elif other == "scheduler":
        cluster.lose_scheduler([0])
    stream.request = request
    had = {"check": Had(heard[0], 7), "too much": Had(heard[0] + 30, 7)}.get(other)
    assert stream.started is not None
    if had is not None:
        params = structs.replace(request.params, seed=stream.started.seed)
        (again,) = cluster._submit(0, structs.replace(request, params=params, had=(had,)), stream.prompt, stream.expected)
    else:
        if other == "prompt":
            stream.expected = cluster.submit(stream.prompt, max_tokens=20)[0].expected
        (again,) = cluster.come_back([stream], heard)
    assert again.tokens == []
    cluster.run()
    assert again.started is not None
    assert (again.started.output, again.tokens) == (b"", again.expected)


def test_few_tokens_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest go first; nothing is kept of who is not expected back."""
    monkeypatch.setattr("scheduler.state.recall.MOST_TOKENS", 200)
    cluster = Cluster((16,))
    recall = cluster.core._state.recall
    for _ in range(20):
        (stream,) = begun(cluster, 2)
        cluster.abort(stream)
    assert recall._tokens <= 200
    assert len(recall._known) == len(recall._ended) > 1
    assert cluster.come_back([stream], lengths([stream]))[0].started is None
    cluster.run()
    before = len(recall._known)
    cluster.submit(PROMPT)
    cluster.run()
    assert len(recall._known) == before
