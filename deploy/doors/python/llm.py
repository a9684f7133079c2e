"""The Python API: a model on a cluster, and text or tokens out of it.

    with LLM("/models/Qwen3-8B", tensor_parallel_size=2, groups=4) as llm:
        for output in llm.generate(["def add(", "def sub("], SamplingParams(max_tokens=64)):
            print(output.outputs[0].text)

Imports no torch and no ray by itself: the engine comes in with the first LLM, and with `local=True` Ray never does.
"""

import asyncio
import atexit
import contextlib
import logging
import math
import queue
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from types import TracebackType
from typing import Any

from cluster.config import EngineConfig
from cluster.engine import Engine, EngineStats, OnDeltas, OnFailure, Progress, StartEngine
from deploy.config.load import ConfigError, bound_openmp_spin, engine_config
from deploy.config.serve import model_name
from deploy.doors.python.sources import (
    Source,
    all_or_none,
    as_list,
    listed,
    read_lora,
    read_pooled,
    read_source,
    read_terms,
    read_texts,
)
from deploy.frontend.errors import Fault
from deploy.frontend.frontend import FrontEnd
from deploy.frontend.generation.generation import Generation
from deploy.frontend.outputs import (
    CompletionOutput,
    EmbeddingRequestOutput,
    GenerationError,
    RequestOutput,
    ScoringRequestOutput,
)
from deploy.frontend.scoring import NO_HEAD, Scoring, embedding_output, need_embedding, pairs_of
from deploy.text.adapters import Adapters
from deploy.text.chat_template import Message
from deploy.text.files import writable
from deploy.text.prompts import Content, Prompt, PromptError, PromptParser, Terms, read_model_limits, read_model_uses
from deploy.text.tokenizer import Tokenizer
from scheduler.protocol.messages import Pooling
from scheduler.protocol.sampling import SamplingParams
from workers.model.sources.find import find_checkpoint, pinned

logger = logging.getLogger(__name__)

CTRL_C_POLL_S = 0.2
"""A signal that comes just before a wait begins does not end it; so no wait is longer than this."""

Params = SamplingParams | Iterable[SamplingParams] | None
"""One for all prompts, one for each, or the defaults."""

Lora = str | Sequence[str | None] | None
"""The name of the LoRA adapter for all prompts, or one for each; None: the model as it is."""


class LLM:
    """One model, served by `groups` tensor-parallel groups under one scheduler. Usable from any thread, and from
    asyncio.

    model: folder of a Hugging Face checkpoint; left out, the tiny one that comes with Manta. options: the other fields of
    `cluster.config.EngineConfig`, such as tensor_parallel_size, groups, dtype and block_size; kv_memory, of each rank, in bytes
    or as "4GiB"; local, without Ray, in this process (on a GPU the ranks have one of their own). progress: told in words what
    the start is doing.
    Errors: ConfigError or OSError for what was asked (unknown options name the nearest one), EngineError for what went wrong.
    """

    def __init__(self, model: str | Path | None = None, *, progress: Progress = logger.info, **options: Any) -> None:
        self._open(engine_config({"model": model, **options}), progress)

    @classmethod
    def from_config(cls, config: EngineConfig, progress: Progress = logger.info) -> "LLM":
        """The same from a ready configuration."""
        llm = cls.__new__(cls)
        llm._open(config, progress)
        return llm

    def _open(self, config: EngineConfig, progress: Progress) -> None:
        try:
            self._start(config, progress)
        except ValueError as error:  # a checkpoint or a rank that the settings do not fit
            raise ConfigError(str(error)) from error

    def _start(self, config: EngineConfig, progress: Progress) -> None:
        bound_openmp_spin()
        config = pinned(config)
        checkpoint = find_checkpoint(config)
        limits = read_model_limits(checkpoint, config.max_model_len, config.tensor_parallel_size, config)
        tokenizer = Tokenizer.load(checkpoint)
        limits = limits.ending_as(tokenizer)
        self.config = config
        self._parser = PromptParser(limits, tokenizer)
        self._adapters = Adapters(config, model_name(None, config.model))
        self._uses = read_model_uses(checkpoint, config.pooling, config.score_tokens, config)
        start = engine_starter(config)
        engines: list[Engine] = []

        def connect(on_deltas: OnDeltas, on_failure: OnFailure) -> Engine:
            if engines:
                engines[0].reconnect(on_deltas, on_failure)
            else:
                engines.append(start(config, on_deltas, on_failure, progress))
            return engines[0]

        self._frontend = FrontEnd(connect, limits, tokenizer)
        self._engine = engines[0]
        # By atexit itself, not by the finalizer's own: registered after Ray's, hence run before it.
        self._close = weakref.finalize(self, self._frontend.close)
        self._close.atexit = False
        atexit.register(self._close)

    # ---- blocking ----

    def generate(
        self,
        prompts: Source | Iterable[Source],
        sampling_params: Params = None,
        *,
        lora: Lora = None,
        tenant: str = "",
        deadline_s: float | None = None,
        priority: int = 0,
        progress: bool = True,
    ) -> list[RequestOutput]:
        """Completes every prompt; outputs in the order of the prompts. progress: show a bar on a terminal.

        lora: names of LoRA adapters, as the engine's `lora` or `load_lora` have them. tenant: on whose account; where requests
        have to wait, each tenant gets an equal share. deadline_s: seconds from when they are submitted, within which each must
        have ended; one that has not fails with `fault` TIMED_OUT, and keeps what it has produced; one whose turn would come
        later is refused at once, as OVERLOADED. priority: lower goes before all that are higher. The last three hold for
        prompts that name none of their own.
        Errors: PromptError before anything is submitted; GenerationError once all have ended, if any failed.
        """
        parsed = self._parse(as_list(prompts), sampling_params, _terms(tenant, deadline_s, priority), lora)
        return self._complete(all_or_none(parsed), progress)

    def chat(
        self,
        messages: Iterable[Message] | Iterable[Sequence[Message]],
        sampling_params: Params = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        lora: Lora = None,
        tenant: str = "",
        deadline_s: float | None = None,
        priority: int = 0,
        progress: bool = True,
    ) -> list[RequestOutput]:
        """Answers one conversation or several, through the checkpoint's chat template. tools: what the model may call, in
        OpenAI's form, for the template to show; its calls are text of the output. chat_template_kwargs: what else the template
        can be told. Otherwise as `generate`."""
        given = listed(messages, 'messages must be a list of {"role": ..., "content": ...}, or a list of such lists')
        several = bool(given) and all(isinstance(each, list | tuple) for each in given)
        asked = {"tools": tools, "chat_template_kwargs": chat_template_kwargs}
        sources: list[Source] = [{"messages": each, **asked} for each in (given if several else [given])]
        return self.generate(
            sources, sampling_params, lora=lora, tenant=tenant, deadline_s=deadline_s, priority=priority, progress=progress
        )

    def iterate(
        self,
        prompts: Source | Iterable[Source],
        sampling_params: Params = None,
        *,
        lora: Lora = None,
        tenant: str = "",
        deadline_s: float | None = None,
        priority: int = 0,
        each_alone: bool = False,
    ) -> Iterator[tuple[int, RequestOutput]]:
        """Yields (position of the prompt, its output so far) whenever one has grown, until all have ended.

        A failed request ends with `error` and `fault` set. Leaving the loop early aborts what is under way. lora,
        tenant, deadline_s, priority: as in `generate`. each_alone: a prompt that cannot be served fails by itself, with fault
        INVALID, where others can. Errors: PromptError.
        """
        sources = as_list(prompts)
        parsed = self._parse(sources, sampling_params, _terms(tenant, deadline_s, priority), lora)
        refused = {position: each for position, each in enumerate(parsed) if isinstance(each, PromptError)}
        if not each_alone or len(refused) in (0, len(parsed)):
            return self._run(dict(enumerate(all_or_none(parsed))), each_token=True)
        valid = {position: each for position, each in enumerate(parsed) if isinstance(each, Prompt)}
        refusals = [(position, _refusal(sources[position], error)) for position, error in refused.items()]
        return self._run(valid, each_token=True, refusals=refusals)

    def embed(
        self,
        prompts: Source | Iterable[Source],
        *,
        dimensions: int | None = None,
        lora: Lora = None,
        tenant: str = "",
        deadline_s: float | None = None,
        priority: int = 0,
        progress: bool = True,
    ) -> list[EmbeddingRequestOutput]:
        """The embedding of every prompt, in the order of the prompts. dimensions: its first so many numbers alone, as
        Matryoshka embeddings are cut. lora, tenant, deadline_s, priority, progress, errors: as in `generate`; PromptError also
        where the checkpoint is not for embeddings."""
        pooling, call = need_embedding(self._uses, dimensions), _terms(tenant, deadline_s, priority)
        sources = as_list(prompts)
        contents = [read_pooled(source, call) for source in sources]
        loras = [read_lora(source, name) for source, name in zip(sources, _names(lora, len(sources)), strict=True)]
        outputs = self._pool(contents, pooling, progress, loras)
        return [embedding_output(output, self._uses, dimensions) for output in outputs]

    def score(
        self,
        text_1: str | Iterable[str],
        text_2: str | Iterable[str],
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tenant: str = "",
        deadline_s: float | None = None,
        priority: int = 0,
        progress: bool = True,
    ) -> list[ScoringRequestOutput]:
        """How well the texts of each pair go together: by the checkpoint's classifier, 0 to 1, or by the cosine of their
        embeddings. One text on the left goes with each on the right; otherwise there are as many on each side.
        chat_template_kwargs: what the checkpoint's template for pairs can be told. Otherwise as `embed`."""
        if not isinstance(chat_template_kwargs, Mapping | None):
            raise PromptError(f"chat_template_kwargs must be a mapping, not {type(chat_template_kwargs).__name__}")
        pairs = pairs_of(read_texts("text_1", text_1), read_texts("text_2", text_2))
        scoring = Scoring.of(pairs, self._uses, self._parser.tokenizer, chat_template_kwargs)
        call = _terms(tenant, deadline_s, priority)
        return scoring.outputs(self._pool([(content, call) for content in scoring.contents], scoring.pooling, progress))

    # ---- asyncio ----

    async def stream(
        self,
        prompt: Source,
        sampling_params: SamplingParams | None = None,
        *,
        lora: str | None = None,
        tenant: str = "",
        deadline_s: float | None = None,
        priority: int = 0,
    ) -> AsyncIterator[RequestOutput]:
        """Yields the output so far whenever it has grown, whole each time; `.outputs[i].delta` is the text that is new.

        Tokens that came while the caller was busy are merged into one output. Cancelling, or closing the generator,
        aborts the request. lora, tenant, deadline_s, priority: as in `generate`. Errors: PromptError; GenerationError if it
        fails.
        """
        parsed = all_or_none(self._parse([prompt], sampling_params, _terms(tenant, deadline_s, priority), lora))
        loop, grown = asyncio.get_running_loop(), asyncio.Event()
        submitted_s = loop.time()
        generations = self._frontend.submit(parsed, lambda _: loop.call_soon_threadsafe(grown.set))
        timers = [loop.call_at(due_s, self._frontend.expire, late) for due_s, late in _by_deadline(generations, submitted_s)]
        try:
            while True:
                await grown.wait()
                grown.clear()
                output = generations[0].take()
                if output.error:
                    raise GenerationError.of([output])
                yield output
                if output.finished:
                    return
        finally:
            for timer in timers:
                timer.cancel()
            self._frontend.abort(generations)

    # ---- LoRA adapters ----

    def load_lora(self, name: str, folder: str | Path, *, load_inplace: bool = False) -> None:
        """From now on prompts may name it. load_inplace: also where another one has the name; those under way go on with that.
        The ranks read it when the first prompt needs it. Errors: ValueError for a name that is taken, also by the model, and
        for what cannot be served."""
        self._adapters.load(name, folder, in_place=load_inplace)

    def unload_lora(self, name: str) -> None:
        """No prompt may name it any more; those under way go on, and its folder must stay until they have ended. Errors:
        KeyError if there is none."""
        if self._adapters.forget(name) is None:
            raise KeyError(f"there is no LoRA adapter {name!r}")

    # ---- the cluster ----

    def stats(self) -> EngineStats:
        """Blocks and sequences of each group, and counters since the start."""
        return self._engine.stats()

    def shutdown(self) -> None:
        """Ends the cluster that this object started; requests under way fail. A second call does nothing."""
        self._close()
        atexit.unregister(self._close)

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.shutdown()

    # ---- common ----

    def _parse(
        self, sources: Sequence[Source], params: Params, call: Terms, lora: Lora
    ) -> list[Prompt | PromptError]:  # fmt: skip
        """Errors: PromptError for what is wrong with the call as a whole."""
        if not self._uses.generates:
            raise PromptError(NO_HEAD)
        if params is None or isinstance(params, SamplingParams):
            every = [params or SamplingParams()] * len(sources)
        else:
            every = listed(params, "sampling parameters must be SamplingParams(...), or a list of them, one for each prompt")
        if len(every) != len(sources):
            raise PromptError(f"{len(sources)} prompts and {len(every)} sampling parameters: give one for each, or one for all")
        parsed: list[Prompt | PromptError] = []
        for source, each, name in zip(sources, every, _names(lora, len(sources)), strict=True):
            try:
                content, params_of, terms = read_source(source, each, call)
                parsed.append(self._parser_of(read_lora(source, name)).prompt(content, params_of, terms))
            except PromptError as error:
                parsed.append(error)
        return parsed

    def _parser_of(self, lora: str | None) -> PromptParser:
        """Errors: PromptError."""
        if lora is None:
            return self._parser
        if (adapter := self._adapters.get(lora)) is None:
            there = ", ".join(repr(each.name) for each in self._adapters)
            said = f"there is no LoRA adapter {lora!r}{f', but {there}' if there else ''}"
            raise PromptError(f"{said}: name it in lora at the start, or load it")
        return replace(self._parser, adapter=adapter)

    def _pool(
        self, contents: Sequence[tuple[Content, Terms]], pooling: Pooling, progress: bool, loras: Sequence[str | None] = ()
    ) -> list[RequestOutput]:
        """loras: of each, where any is named. Errors: as `generate`."""
        parsed: list[Prompt | PromptError] = []
        for (content, terms), name in zip(contents, loras or [None] * len(contents), strict=True):
            try:
                parsed.append(self._parser_of(name).pooled(content, pooling, terms))
            except PromptError as error:
                parsed.append(error)
        return self._complete(all_or_none(parsed), progress)

    def _complete(self, prompts: list[Prompt], progress: bool) -> list[RequestOutput]:
        from deploy.terminal.display import request_bar

        outputs: dict[int, RequestOutput] = {}
        with request_bar(len(prompts), shown=progress) as advance:
            for position, output in self._run(dict(enumerate(prompts)), each_token=False):
                outputs[position] = output
                advance(output)
        ordered = [outputs[position] for position in range(len(prompts))]
        if any(output.error for output in ordered):
            raise GenerationError.of(ordered)
        return ordered

    def _run(
        self, prompts: Mapping[int, Prompt], each_token: bool, refusals: Iterable[tuple[int, RequestOutput]] = ()
    ) -> Iterator[tuple[int, RequestOutput]]:
        """prompts: by their positions. refusals: of others; they are told first."""
        yield from refusals
        grown: queue.SimpleQueue[Generation] = queue.SimpleQueue()
        submitted_s = time.monotonic()
        generations = self._frontend.submit([*prompts.values()], grown.put, each_token) if prompts else []
        positions = {generation.stream: position for position, generation in zip(prompts, generations, strict=True)}
        due = deque(_by_deadline(generations, submitted_s))
        try:
            left = len(generations)
            while left:
                generation = self._next(grown, due)
                output = generation.take()
                left -= output.finished
                yield positions[generation.stream], output
        finally:  # also when the caller leaves the loop, or Ctrl-C interrupts the wait
            self._frontend.abort(generations)

    def _next(self, grown: "queue.SimpleQueue[Generation]", due: deque[tuple[float, Generation]]) -> Generation:
        """Those whose deadline passes in the meantime have grown too: by their end. The scheduler looks at deadlines when
        something happens, so a door keeps the time itself."""
        while True:
            while due and due[0][0] <= time.monotonic():
                self._frontend.expire(due.popleft()[1])
            wait_s = min(CTRL_C_POLL_S, due[0][0] - time.monotonic()) if due else CTRL_C_POLL_S
            with contextlib.suppress(queue.Empty):
                return grown.get(timeout=max(0.0, wait_s))


def engine_starter(config: EngineConfig) -> StartEngine:
    """The one place where Ray comes in, or does not."""
    if config.local:
        from cluster.local.engine import start_local

        return start_local
    from cluster.launch import start_on_ray

    return start_on_ray


def _names(lora: Lora, count: int) -> list[str | None]:
    """For each of so many prompts. Errors: PromptError."""
    if lora is None or isinstance(lora, str):
        return [lora] * count
    names = listed(lora, "lora must be the name of a LoRA adapter, or a list of one for each prompt")
    if len(names) != count:
        raise PromptError(f"{count} prompts and {len(names)} names of LoRA adapters: give one for each, or one for all")
    return names


def _terms(tenant: str, deadline_s: float | None, priority: int) -> Terms:
    """Of a call. Errors: PromptError."""
    return read_terms({"tenant": tenant, "deadline_s": deadline_s, "priority": priority})


def _by_deadline(generations: Sequence[Generation], submitted_s: float) -> list[tuple[float, Generation]]:
    """(when it must have ended, the generation) of those with a deadline, the earliest first."""
    timed = [(submitted_s + generation.prompt.terms.deadline_s, generation) for generation in generations]
    return sorted((each for each in timed if each[0] < math.inf), key=itemgetter(0))


def _refusal(source: Source, error: PromptError) -> RequestOutput:
    """The output of a prompt that was never submitted."""
    text = source.get("prompt") if isinstance(source, Mapping) else source
    prompt = writable(text) if isinstance(text, str) else None
    failed = CompletionOutput(0, "", [], finish_reason="error")
    return RequestOutput("", prompt, [], None, [failed], finished=True, error=str(error), fault=Fault.INVALID)
