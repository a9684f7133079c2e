"""An engine without a model: each prompt gets a scripted output, one token a step, from a thread of its own."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np

from cluster.config import EngineConfig
from cluster.engine import EngineError, EngineLost, EngineStats, GroupStats, OnDeltas, OnFailure, Progress
from scheduler.placement.intake import choices_of, streams_of
from scheduler.protocol.messages import Deltas, Failure, Finished, FinishReason, Request, TalliedMetric, TokenLogprobs

CACHED_TOKENS = 3

Reply = Callable[[list[int], int], Sequence[int]]
"""(prompt ids, choice) -> output ids."""


@dataclass
class Stream:
    """One stream under way."""

    request: Request
    output: list[int]
    sent: int = 0


@dataclass
class FakeEngine:
    """hold_after: steps after which nothing more comes until `released`. refuse: first token -> message of refusal, and
    failure, retry_after_s: of what kind it is. lose_after: steps after which it is lost, as often as it is started.
    steps_per_delta: steps that one `Deltas` covers."""

    reply: Reply | Sequence[int]
    hold_after: int | None = None
    refuse: Mapping[int, str] = field(default_factory=dict)
    failure: Failure = Failure.FAULT
    retry_after_s: float = 0.0
    lose_after: int | None = None
    steps_per_delta: int = 1
    block_size: int = 16
    starts: int = 0
    config: EngineConfig | None = None
    requests: list[Request] = field(default_factory=list)
    stopped: list[tuple[int, int]] = field(default_factory=list)
    aborted: list[int] = field(default_factory=list)
    tallied: list[TalliedMetric] = field(default_factory=list)
    output_tokens: int = 0
    closed: bool = False
    fail_start: Exception | None = None
    holding: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)

    def start(
        self, config: EngineConfig, on_deltas: OnDeltas, on_failure: OnFailure, progress: Progress
    ) -> "FakeEngine":
        """A `StartEngine`."""
        if self.fail_start is not None:
            raise self.fail_start
        self.config, self._on_deltas, self._on_failure = config, on_deltas, on_failure
        self._streams: dict[int, Stream] = {}
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.starts += 1
        progress("Starting the fake engine")
        self._thread.start()
        return self

    def submit(self, requests: Sequence[Request]) -> None:
        if self.closed:
            raise EngineError("closed")
        refused = []
        with self._lock:
            for request in requests:
                prompt = np.frombuffer(request.tokens, dtype="<i4").tolist()
                self.requests.append(request)
                if prompt[0] in self.refuse:
                    streams = range(request.stream, request.stream + request.params.n)
                    why = (self.refuse[prompt[0]], self.failure, self.retry_after_s)
                    refused += [Finished(s, FinishReason.FAILED, 0, 0, *why) for s in streams]
                    continue
                for stream, choice in zip(streams_of(request), choices_of(request), strict=True):
                    told = 0 if request.resumption is None else len(request.resumption.output) // 4
                    self._streams[stream] = Stream(request, self._script(prompt, choice), told)
        if refused:
            self._on_deltas(Deltas(b"", b"", tuple(refused)))
        self._wake.set()

    def abort(self, streams: Sequence[int]) -> None:
        with self._lock:
            self.aborted += streams
            ended = [self._finish(stream, FinishReason.ABORTED) for stream in streams if stream in self._streams]
        self._on_deltas(Deltas(b"", b"", tuple(ended)))

    def stop(self, stream: int, keep_tokens: int) -> None:
        with self._lock:
            self.stopped.append((stream, keep_tokens))
            if stream not in self._streams:
                return
            self._streams[stream].sent = keep_tokens
            finished = self._finish(stream, FinishReason.STOP)
        self._on_deltas(Deltas(b"", b"", (finished,)))

    def tally(self, metrics: Sequence[TalliedMetric]) -> None:
        if self.closed:
            raise EngineError("closed")
        self.tallied += metrics

    def stats(self) -> EngineStats:
        prompt_tokens = sum(len(request.tokens) // 4 for request in self.requests)
        groups = (GroupStats(0, True, 10, 6, 1, 3, 0),)
        return EngineStats(
            groups=groups,
            requests=len(self.requests),
            prompt_tokens=prompt_tokens,
            cached_tokens=CACHED_TOKENS,
            output_tokens=self.output_tokens,
            preemptions=7,
        )

    def leave(self) -> None:
        """What was under way is nobody's."""
        with self._lock:
            self._streams.clear()

    def reconnect(self, on_deltas: OnDeltas, on_failure: OnFailure) -> None:  # noqa: ARG002
        raise EngineLost("the fake engine has only one stream")

    def close(self) -> None:
        self.closed = True
        self._wake.set()
        self.released.set()

    def _script(self, prompt: list[int], choice: int) -> list[int]:
        return list(self.reply(prompt, choice) if callable(self.reply) else self.reply)

    def _run(self) -> None:
        step = 0
        while not self.closed:
            self._wake.wait()
            self._wake.clear()
            while self._streams and not self.closed:
                if step == self.hold_after:
                    self.holding.set()
                    self.released.wait()
                if step == self.lose_after:
                    self._on_failure("the fake engine burnt down")
                    return
                self._step()
                step += 1
                time.sleep(0.0005)

    def _step(self) -> None:
        with self._lock:
            live = list(self._streams)
            positions = [len(stream.request.tokens) // 4 + stream.sent for stream in self._streams.values()]
            tokens = np.full((self.steps_per_delta, len(live)), -1, dtype="<i4")
            finished: list[Finished] = []
            logprobs: list[tuple[int, bytes]] = []
            for column, number in enumerate(live):
                stream = self._streams[number]
                for row in range(self.steps_per_delta):
                    if (token := self._next(number, stream, finished)) is None:
                        break
                    tokens[row, column] = token
                    if stream.request.params.logprobs is not None:
                        entry = TokenLogprobs(-0.5, (token + 1, token), (-0.25, -0.5))
                        logprobs.append((number, msgspec.msgpack.encode(entry)))
        streams = np.array(live, dtype="<i8").tobytes()
        before = np.array(positions, dtype="<i4").tobytes()
        self._on_deltas(Deltas(streams, tokens.tobytes(), tuple(finished), tuple(logprobs), before))

    def _next(self, number: int, stream: Stream, finished: list[Finished]) -> int | None:
        """The stream's next token; ends it at a stop id, at max_tokens, or when the script is over."""
        if number not in self._streams or stream.sent == len(stream.output):
            return None
        token = stream.output[stream.sent]
        stream.sent += 1
        if token in stream.request.stop_ids:
            finished.append(self._finish(number, FinishReason.STOP))
        elif stream.sent in (len(stream.output), stream.request.params.max_tokens):
            finished.append(self._finish(number, FinishReason.LENGTH))
        return token

    def _finish(self, number: int, reason: FinishReason) -> Finished:
        stream = self._streams.pop(number)
        self.output_tokens += stream.sent
        return Finished(number, reason, CACHED_TOKENS, stream.sent)
