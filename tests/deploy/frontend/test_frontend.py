"""The front end's thread: against an engine that holds a lock, as the one in `cluster.local.engine` does, and when something
raises."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import ClassVar, cast
from unittest.mock import ANY

import numpy as np
import pytest

from cluster.engine import EngineError, EngineLost, OnDeltas, OnFailure, RequestStream
from deploy.frontend.errors import Fault
from deploy.frontend.frontend import FrontEnd
from deploy.frontend.generation.generation import Generation
from deploy.frontend.generation.submission import MOST_LOSSES
from deploy.frontend.outputs import RequestOutput
from deploy.text.content import PromptError
from deploy.text.prompts import ModelLimits, Prompt, Terms
from deploy.text.tokenizer import Tokenizer
from kvcache.hashing import hash_blocks
from scheduler.protocol.messages import (
    Deltas,
    Failure,
    Finished,
    FinishReason,
    Misses,
    Request,
    Resumption,
    Started,
    TalliedMetric,
)
from scheduler.protocol.sampling import SamplingParams

DELTAS = 20_000
PROMPT = [5]
LIMITS = ModelLimits(vocab_size=400, max_tokens=512, eos_ids=())


def deltas(tokens: Mapping[int, int], positions: Mapping[int, int], ends: tuple[Finished, ...] = ()) -> Deltas:
    """One token for each of the streams. positions: tokens that each had before."""
    return Deltas(
        np.array([*tokens], np.int64).tobytes(), np.array([*tokens.values()], np.int32).tobytes(), ends,
        positions=np.array([positions[stream] for stream in tokens], np.int32).tobytes(),
    )  # fmt: skip


class BusyEngine:
    """`stop` waits for a lock that the engine holds until it has delivered."""

    block_size = 16

    def __init__(self) -> None:
        self.delivered, self.stopping = threading.Event(), threading.Event()
        self.started = False

    def start(self, on_deltas: OnDeltas, on_failure: OnFailure) -> RequestStream:
        if self.started:
            raise EngineLost("there is no other")
        self.started = True
        self.on_deltas, self.on_failure = on_deltas, on_failure
        return self

    def submit(self, requests: Sequence[Request]) -> None:
        assert len(requests) == 1

    def abort(self, streams: Sequence[int]) -> None:
        raise AssertionError(f"nobody aborted {streams}")

    def stop(self, stream: int, keep_tokens: int) -> None:
        assert (stream, keep_tokens) == (0, 1)
        self.stopping.set()
        assert self.delivered.wait(60), "the engine could not deliver while the front end waited for it"

    def tally(self, metrics: Sequence[TalliedMetric]) -> None:
        raise AssertionError(f"nobody tallied {metrics}")

    def leave(self) -> None: ...

    def close(self) -> None:
        self.delivered.set()

    def deliver(self, delta: Deltas) -> None:
        self.on_deltas(delta)
        assert self.stopping.wait(60)
        for _ in range(DELTAS):
            self.on_deltas(delta)
        self.on_deltas(Deltas(b"", b"", (Finished(0, FinishReason.STOP, 0, 1),)))
        self.delivered.set()


def test_the_engine_never_waits_for_a_front_end_that_waits_for_the_engine(tokenizer: Tokenizer) -> None:
    [token] = tokenizer.encode("hello")[:1]
    engine, ended = BusyEngine(), threading.Event()
    front_end = FrontEnd(engine.start, LIMITS, tokenizer)
    params = SamplingParams(stop=(tokenizer.decode([token]),), max_tokens=8)
    [generation] = front_end.submit([Prompt(PROMPT, params)], lambda _: ended.set(), each_token=False)
    delta = deltas({0: token}, {0: 1})
    thread = threading.Thread(target=engine.deliver, args=(delta,), daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive(), "the engine waits for the front end"
    assert ended.wait(60)
    assert generation.take().outputs[0].finish_reason == "stop"
    front_end.close()


def test_a_lost_engine_that_is_closed_at_once_is_told_as_lost() -> None:
    engine = BusyEngine()
    front_end = FrontEnd(engine.start, LIMITS, None)
    wait_for_close = engine.delivered.wait
    [generation] = front_end.submit([Prompt(PROMPT, SamplingParams(max_tokens=8))], lambda _: wait_for_close(60))
    engine.on_deltas(deltas({0: 7}, {0: 1}))
    engine.on_failure("the scheduler has gone")
    front_end.close()
    assert str(generation.take().error).startswith("the scheduler has gone: ")


# ---- when something raises ----

BROKEN = 13
"""The token that the tokenizer below cannot decode."""


class BrokenTokenizer:
    """Raises over one token."""

    special: ClassVar[dict[int, str]] = {}

    def first_shown(self, tokens: Sequence[int]) -> int | None:
        return 0 if tokens else None

    def decode(self, token_ids: Sequence[int]) -> str:
        if BROKEN in token_ids:
            raise ValueError("no such token")
        return "".join(chr(ord("a") + token) for token in token_ids)


class Listening:
    """An engine that notes what it is told. streams: connected so far, of so many that there will be."""

    block_size = 16

    def __init__(self, most_streams: int = 1) -> None:
        self.requests: list[Request] = []
        self.aborted: list[int] = []
        self.left = 0
        self.closed = False
        self.streams, self.most_streams = 0, most_streams
        self.opening = threading.Event()
        self.opening.set()

    def start(self, on_deltas: OnDeltas, on_failure: OnFailure) -> "Listening":
        assert self.opening.wait(60)
        if self.streams == self.most_streams:
            raise EngineLost("there is no other")
        self.streams += 1
        self.on_deltas, self.on_failure = on_deltas, on_failure
        return self

    def submit(self, requests: Sequence[Request]) -> None:
        self.requests += requests

    def leave(self) -> None:
        self.left += 1

    def abort(self, streams: Sequence[int]) -> None:
        self.aborted += streams

    def stop(self, stream: int, keep_tokens: int) -> None:
        raise AssertionError(f"no stop string was found in {stream}, {keep_tokens}")

    def tally(self, metrics: Sequence[TalliedMetric]) -> None:
        raise AssertionError(f"nobody tallied {metrics}")

    def close(self) -> None:
        self.closed = True


class Host:
    """A front end on such an engine, and requests that wait for their end."""

    def __init__(self, most_streams: int = 1) -> None:
        self.engine = Listening(most_streams)
        tokenizer = cast(Tokenizer, BrokenTokenizer())
        self.front_end = FrontEnd(self.engine.start, LIMITS, tokenizer)
        self.output_tokens: Counter[int] = Counter()

    def submit(self, n: int = 1, each_token: bool = True) -> Generation:
        return self.front_end.submit([Prompt(PROMPT, SamplingParams(n=n, max_tokens=8))], lambda _: None, each_token)[0]

    def commit(self, tokens: dict[int, int], *ended: int) -> Deltas:
        """One token for each of the streams; the ends of others."""
        positions = {stream: len(PROMPT) + self.output_tokens[stream] for stream in tokens}
        self.output_tokens.update(tokens.keys())
        ends = tuple(Finished(stream, FinishReason.LENGTH, 0, self.output_tokens[stream]) for stream in ended)
        return deltas(tokens, positions, ends)

    def deliver(self, tokens: dict[int, int], *ended: int) -> None:
        self.engine.on_deltas(self.commit(tokens, *ended))


@pytest.fixture
def host() -> Iterator[Host]:
    host = Host()
    yield host
    host.front_end.close()


@pytest.fixture
def lasting() -> Iterator[Host]:
    """One that finds another engine each time."""
    host = Host(most_streams=100)
    yield host
    host.front_end.close()


def lose(host: Host) -> None:
    """Until another is there."""
    streams = host.engine.streams
    host.engine.on_failure("the scheduler has gone")
    until(lambda: host.engine.streams > streams and host.front_end.connected)


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.001)


def outcome(generation: Generation) -> RequestOutput:
    """Once it has ended."""
    until(lambda: generation.finished)
    return generation.take()


def test_a_request_whose_text_cannot_be_told_ends_alone(host: Host) -> None:
    good, bad = host.submit(), host.submit(n=2)
    host.deliver({0: 1, 1: BROKEN, 2: 3})
    host.deliver({0: 2}, 0)
    failed, ended = outcome(bad), outcome(good)
    assert (ended.error, ended.outputs[0].text) == (None, "bc")
    assert (failed.error, failed.fault) == ("the output cannot be told: no such token", Fault.INTERNAL)
    assert [choice.finish_reason for choice in failed.outputs] == ["error", "error"]
    assert host.engine.aborted == [1, 2], "nobody waits for either choice"
    assert host.front_end.connected


def test_also_where_its_text_is_decoded_at_the_end(host: Host) -> None:
    good, bad = host.submit(each_token=False), host.submit(n=2, each_token=False)
    host.deliver({0: 1, 1: BROKEN, 2: 3})
    host.deliver({}, 0, 1)
    failed = outcome(bad)
    assert (failed.error, failed.outputs[0].token_ids) == ("the output cannot be told: no such token", [BROKEN])
    assert outcome(good).outputs[0].text == "b"
    assert host.engine.aborted == [2], "the first had ended"


def test_a_request_that_cannot_be_told_can_still_fail_for_another_reason(host: Host) -> None:
    bad = host.submit(each_token=False)
    host.deliver({0: BROKEN})
    host.engine.on_deltas(Deltas(b"", b"", (Finished(0, FinishReason.FAILED, 0, 1, "its group has died", Failure.FAULT),)))
    assert outcome(bad).error == "its group has died"


def test_deltas_that_make_no_sense_lose_the_engine_if_there_is_no_other(host: Host) -> None:
    waits = host.submit()
    host.engine.on_deltas(Deltas(np.array([0, 1, 2], np.int64).tobytes(), np.array([7], np.int32).tobytes()))
    error = outcome(waits).error
    assert error is not None
    assert error.startswith("the front end failed")
    assert host.engine.left == 1
    with pytest.raises(EngineError, match="the front end failed"):
        host.submit()


def test_who_closes_it_is_not_told_that_it_is_lost(host: Host) -> None:
    waits = host.submit()
    host.front_end.close()
    assert outcome(waits).error == "the engine was shut down"
    assert host.engine.closed
    assert host.engine.streams == 1


def test_a_stream_that_has_missed_a_token_fails_and_the_others_go_on(host: Host) -> None:
    """Whatever took the message: what comes after it must not be told as if nothing were missing."""
    good, bad = host.submit(), host.submit(n=2)
    host.deliver({0: 1, 1: 2, 2: 3})
    host.commit({1: 4})  # never delivered
    host.deliver({0: 2, 1: 5, 2: 3}, 0)
    failed, ended = outcome(bad), outcome(good)
    assert (ended.error, ended.outputs[0].text) == (None, "bc")
    assert failed.error is not None
    assert "2 tokens of it were committed and 1 have arrived" in failed.error
    assert failed.fault == Fault.INTERNAL
    assert failed.outputs[0].text == "c", "nothing of what came after the gap"
    assert host.engine.aborted == [1, 2]
    assert host.front_end.connected


def test_also_if_it_was_the_last_one(host: Host) -> None:
    good, bad = host.submit(), host.submit(each_token=False)
    host.deliver({0: 1, 1: 2})
    host.commit({1: 4})
    host.deliver({}, 0, 1)
    failed = outcome(bad)
    assert failed.outputs[0].finish_reason == "error"
    assert failed.error is not None
    assert "2 tokens of it were committed and 1 have arrived" in failed.error
    assert outcome(good).outputs[0].text == "b"


def test_and_if_something_comes_twice(host: Host) -> None:
    bad = host.submit()
    again = host.commit({0: 1})
    host.engine.on_deltas(again)
    host.engine.on_deltas(again)
    assert outcome(bad).outputs[0].finish_reason == "error"


# ---- when the engine is lost, and another comes ----


def test_deltas_that_make_no_sense_are_asked_for_again(lasting: Host) -> None:
    waits = lasting.submit(n=2)
    lasting.deliver({0: 1, 1: 2})
    lasting.engine.on_deltas(Deltas(np.array([0, 1, 2], np.int64).tobytes(), np.array([7], np.int32).tobytes()))
    until(lambda: len(lasting.engine.requests) == 3)
    first, *again = lasting.engine.requests
    assert first.resumption is None
    assert [(each.stream, each.resumption) for each in again] == [
        (choice, Resumption(choice, np.array([token], np.int32).tobytes(), ANY, 1)) for choice, token in ((0, 1), (1, 2))
    ]
    until(lambda: lasting.front_end.connected)
    lasting.deliver({0: 3, 1: 4}, 0, 1)
    assert [choice.text for choice in outcome(waits).outputs] == ["bd", "ce"]


def test_what_was_said_of_a_start_is_said_to_the_next_scheduler(lasting: Host) -> None:
    lasting.submit(n=2)
    began = Started(1, seed=77, cached_tokens=16, queued_s=2.5, misses=Misses(cold=5))
    lasting.engine.on_deltas(Deltas(b"", b"", started=(began,)))
    lose(lasting)
    _, one, other = lasting.engine.requests
    assert [one.params.seed, other.params.seed] == [77, 77], "of both choices, though only one has begun"
    assert one.resumption == Resumption(0, b"", ANY, 1)
    assert other.resumption == Resumption(1, b"", ANY, 1, 16, 2.5, began.misses)


def test_choices_that_had_not_begun_have_one_seed(lasting: Host) -> None:
    """Each is asked for by itself, and who goes on by the id of an event, or with a third scheduler, knows of one for all."""
    generation = lasting.submit(n=2)
    lose(lasting)
    _, one, other = lasting.engine.requests
    assert one.params.seed is not None
    assert one.params.seed == other.params.seed == generation.submission.seed


def test_who_goes_meanwhile_is_not_asked_for(lasting: Host) -> None:
    stays, goes, ends = lasting.submit(), lasting.submit(), lasting.submit()
    lasting.deliver({0: 1, 1: 1, 2: 1}, 2)
    assert outcome(ends).error is None
    lasting.engine.opening.clear()
    lasting.engine.on_failure("the scheduler has gone")
    until(lambda: not lasting.front_end.connected)
    lasting.front_end.abort([goes])
    lasting.engine.opening.set()
    until(lambda: lasting.front_end.connected)
    assert [request.stream for request in lasting.engine.requests] == [0, 1, 2, 0]
    assert not lasting.engine.aborted, "nobody knows of it any more"
    lasting.front_end.abort([stays])
    assert lasting.engine.aborted == [0]


def test_who_comes_meanwhile_comes_for_the_first_time(lasting: Host) -> None:
    lasting.engine.opening.clear()
    lasting.engine.on_failure("the scheduler has gone")
    until(lambda: not lasting.front_end.connected)
    prompt = Prompt(PROMPT, SamplingParams(n=2), terms=Terms(deadline_s=50.0))
    lasting.front_end.submit([prompt], lambda _: None)
    lasting.engine.opening.set()
    until(lambda: lasting.front_end.connected)
    [request] = lasting.engine.requests
    assert request.resumption is None, "queues have bounds for it"
    assert request.deadline_s is not None
    assert 0.0 < request.deadline_s < 50.0, "the time in which there was none counts"


def test_a_request_that_takes_scheduler_after_scheduler_ends(lasting: Host) -> None:
    patient, deadly = lasting.submit(), lasting.submit()
    for _ in range(MOST_LOSSES - 1):
        lose(lasting)
        lasting.deliver({0: 1})
    assert not deadly.finished
    lose(lasting)
    failed = outcome(deadly)
    assert str(failed.error).startswith(f"the scheduler has gone, {MOST_LOSSES} times in a row without a token")
    assert failed.fault is Fault.INTERNAL
    lasting.deliver({0: 1}, 0)
    assert outcome(patient).outputs[0].text == "bbbbb"


def test_a_block_of_another_size_is_hashed_anew(lasting: Host) -> None:
    prompt = Prompt(list(range(40)), SamplingParams(max_tokens=8))
    lasting.front_end.submit([prompt], lambda _: None)
    lasting.engine.block_size = 8
    lose(lasting)
    first, again = lasting.engine.requests
    tokens = np.arange(40, dtype=np.int32)
    assert np.frombuffer(first.hashes, np.uint64).tolist() == hash_blocks(tokens, 16, "")
    assert np.frombuffer(again.hashes, np.uint64).tolist() == hash_blocks(tokens, 8, "")


def test_a_front_end_that_fails_tells_its_callers(lasting: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it is: nobody waits for a thread that has ended."""
    waits = lasting.submit()
    monkeypatch.setattr(Generation, "requests", lambda *_: 1 / 0)
    lasting.engine.on_failure("the scheduler has gone")
    assert outcome(waits).error == "the front end failed: division by zero"


# ---- many prompts of one call ----


class InLots(Listening):
    """Notes what it is told at once. refuses: a prompt's first token that cannot be sent."""

    def __init__(self, refuses: int = -1) -> None:
        super().__init__()
        self.lots: list[list[int]] = []
        self.refuses = refuses

    def submit(self, requests: Sequence[Request]) -> None:
        if any(np.frombuffer(request.tokens, "<i4")[0] == self.refuses for request in requests):
            raise ValueError("it cannot be sent")
        self.lots.append([request.stream for request in requests])
        super().submit(requests)


def test_many_prompts_begin_before_the_last_one_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.frontend.frontend.LOT_TOKENS", 10)
    engine = InLots()
    front_end = FrontEnd(engine.start, LIMITS, None)
    params = SamplingParams(max_tokens=8)
    prompts = [Prompt([token] * length, params) for token, length in enumerate((4, 4, 4, 12, 3, 1), start=1)]
    generations = front_end.submit(prompts, lambda _: None)
    assert engine.lots == [[0, 1, 2], [3], [4, 5]]
    assert [generation.stream for generation in generations] == list(range(6))
    assert [request.tokens for request in engine.requests] == [np.array(each.token_ids, "<i4").tobytes() for each in prompts]
    front_end.close()


def test_of_a_call_that_cannot_be_sent_as_a_whole_nothing_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.frontend.frontend.LOT_TOKENS", 1)
    engine = InLots(refuses=3)
    front_end = FrontEnd(engine.start, LIMITS, None)
    with pytest.raises(ValueError, match="it cannot be sent"):
        front_end.submit([Prompt([token], SamplingParams(max_tokens=8)) for token in (1, 2, 3, 4)], lambda _: None)
    assert engine.lots == [[0], [1]]
    assert {0, 1} <= set(engine.aborted)
    [generation] = front_end.submit([Prompt([5], SamplingParams(max_tokens=8))], lambda _: None)
    assert generation.stream == 3, "a stream's number is nobody else's"
    front_end.close()


def test_prompts_are_read_when_those_before_them_have_been_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """And when one cannot be read, what was told is taken back."""
    monkeypatch.setattr("deploy.frontend.frontend.LOT_TOKENS", 2)
    engine = InLots()
    front_end = FrontEnd(engine.start, LIMITS, None)
    told: list[int] = []

    def prompts() -> Iterator[Prompt]:
        for token in range(1, 6):
            told.append(len(engine.lots))
            yield Prompt([token], SamplingParams(max_tokens=8))
        raise PromptError("no prompt")

    with pytest.raises(PromptError, match="no prompt"):
        front_end.submit(prompts(), lambda _: None)
    assert told == [0, 0, 1, 1, 2]
    assert engine.lots == [[0, 1], [2, 3]]
    assert set(engine.aborted) == {0, 1, 2, 3}
    front_end.close()
