"""The Python API: a model on a cluster, and text or tokens out of it.

    with LLM("/models/Qwen3-8B", tensor_parallel_size=2, groups=4) as llm:
        for output in llm.generate(["def add(", "def sub("], SamplingParams(max_tokens=64)):
            print(output.outputs[0].text)

Imports no torch and no ray by itself: the engine comes in with the first LLM, and with `local=True` Ray never does.
"""

import atexit
import logging
import weakref
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from types import TracebackType
from typing import Any

from cluster.config import EngineConfig
from cluster.engine import Engine, EngineStats, OnDeltas, OnFailure, Progress, StartEngine
from deploy.config.load import ConfigError, bound_openmp_spin, engine_config
from deploy.config.serve import model_name
from deploy.doors.python.calls import CallReader, Lora, Params, names_of, refusal, terms_of
from deploy.doors.python.sources import (
    Source,
    all_or_none,
    as_list,
    listed,
    read_lora,
    read_pooled,
    read_texts,
)
from deploy.doors.python.waiting import iterated, streamed
from deploy.frontend.frontend import FrontEnd
from deploy.frontend.outputs import (
    EmbeddingRequestOutput,
    GenerationError,
    RequestOutput,
    ScoringRequestOutput,
)
from deploy.frontend.scoring import Scoring, embedding_output, need_embedding, pairs_of
from deploy.text.adapters import Adapters
from deploy.text.chat_template import Message
from deploy.text.content import PromptError
from deploy.text.prompts import Prompt, PromptParser, read_model_limits, read_model_uses
from deploy.text.tokenizer import Tokenizer
from scheduler.protocol.sampling import SamplingParams
from workers.model.sources.find import find_checkpoint, pinned

logger = logging.getLogger(__name__)


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
        self._adapters = Adapters(config, model_name(None, config.model))
        self._uses = read_model_uses(checkpoint, config.pooling, config.score_tokens, config)
        self._calls = CallReader(PromptParser(limits, tokenizer), self._adapters, self._uses)
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
        Prompts are read while the first ones are computed. Errors: PromptError for the first that is not valid, when none of
        the call goes on; GenerationError once all have ended, if any failed.
        """
        sources = as_list(prompts)
        parsed = self._calls.prompts(sources, sampling_params, terms_of(tenant, deadline_s, priority), lora)
        return self._complete(all_or_none(parsed, len(sources)), len(sources), progress)

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
        parsed = list(self._calls.prompts(sources, sampling_params, terms_of(tenant, deadline_s, priority), lora))
        refused = {position: each for position, each in enumerate(parsed) if isinstance(each, PromptError)}
        if not each_alone or len(refused) in (0, len(parsed)):
            return iterated(self._frontend, list(all_or_none(parsed, len(parsed))), range(len(parsed)), each_token=True)
        valid = {position: each for position, each in enumerate(parsed) if isinstance(each, Prompt)}
        refusals = [(position, refusal(sources[position], error)) for position, error in refused.items()]
        return iterated(self._frontend, [*valid.values()], [*valid], each_token=True, refusals=refusals)

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
        pooling, call = need_embedding(self._uses, dimensions), terms_of(tenant, deadline_s, priority)
        sources = as_list(prompts)
        contents = [read_pooled(source, call) for source in sources]
        loras = [read_lora(source, name) for source, name in zip(sources, names_of(lora, len(sources)), strict=True)]
        outputs = self._complete(self._calls.pooled(contents, pooling, loras), len(contents), progress)
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
        scoring = Scoring.of(pairs, self._uses, self._calls.parser.tokenizer, chat_template_kwargs)
        call = terms_of(tenant, deadline_s, priority)
        contents = [(content, call) for content in scoring.contents]
        return scoring.outputs(self._complete(self._calls.pooled(contents, scoring.pooling), len(contents), progress))

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
        parsed = self._calls.prompts([prompt], sampling_params, terms_of(tenant, deadline_s, priority), lora)
        async with aclosing(streamed(self._frontend, all_or_none(parsed, 1))) as outputs:
            async for output in outputs:
                yield output

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

    def _complete(self, prompts: Iterable[Prompt], count: int, progress: bool) -> list[RequestOutput]:
        from deploy.terminal.display import request_bar

        outputs: dict[int, RequestOutput] = {}
        with request_bar(count, shown=progress) as advance:
            for position, output in iterated(self._frontend, prompts, range(count), each_token=False):
                outputs[position] = output
                advance(output)
        ordered = [outputs[position] for position in range(count)]
        if any(output.error for output in ordered):
            raise GenerationError.of(ordered)
        return ordered

def engine_starter(config: EngineConfig) -> StartEngine:
    """The one place where Ray comes in, or does not."""
    if config.local:
        from cluster.local.engine import start_local

        return start_local
    from cluster.launch import start_on_ray

    return start_on_ray
