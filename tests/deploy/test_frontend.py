"""The front end's thread against an engine that holds a lock, as the one in `cluster.local` does."""

import threading
from collections.abc import Sequence

import numpy as np

from cluster.engine import Engine, EngineStats, OnDeltas, OnFailure
from deploy.frontend import FrontEnd
from deploy.prompts import ModelLimits, Prompt
from deploy.text import Tokenizer
from scheduler.messages import Deltas, Finished, FinishReason, Request, TalliedMetric
from scheduler.sampling import SamplingParams

DELTAS = 20_000


class BusyEngine:
    """`stop` waits for a lock that the engine holds until it has delivered."""

    page_size = 16

    def __init__(self) -> None:
        self.delivered, self.stopping = threading.Event(), threading.Event()

    def start(self, on_deltas: OnDeltas, on_failure: OnFailure) -> Engine:
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

    def stats(self) -> EngineStats:
        return EngineStats(groups=())

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
    front_end = FrontEnd(engine.start, ModelLimits(vocab_size=400, max_tokens=512, eos_ids=()), tokenizer)
    params = SamplingParams(stop=(tokenizer.decode([token]),), max_tokens=8)
    [generation] = front_end.submit([(Prompt([5]), params)], lambda _: ended.set(), each_token=False)
    delta = Deltas(np.array([0], np.int64).tobytes(), np.array([token], np.int32).tobytes())
    thread = threading.Thread(target=engine.deliver, args=(delta,), daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive(), "the engine waits for the front end"
    assert ended.wait(60)
    assert generation.take().outputs[0].finish_reason == "stop"
    front_end.close()


def test_a_lost_engine_that_is_closed_at_once_is_told_as_lost() -> None:
    engine = BusyEngine()
    front_end = FrontEnd(engine.start, ModelLimits(vocab_size=400, max_tokens=512, eos_ids=()), None)
    wait_for_close = engine.delivered.wait
    [generation] = front_end.submit([(Prompt([5]), SamplingParams(max_tokens=8))], lambda _: wait_for_close(60))
    engine.on_deltas(Deltas(np.array([0], np.int64).tobytes(), np.array([7], np.int32).tobytes()))
    engine.on_failure("the scheduler has gone")
    front_end.close()
    assert generation.take().error == "the scheduler has gone"
