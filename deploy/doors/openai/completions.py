"""`/v1/completions`: prompts in, text out, whole or as it comes.

Knows nothing of HTTP: a request's record comes in, a response's record or encoded events go out.
"""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from itertools import chain
from typing import cast

from msgspec import UNSET

from deploy.config.serve import ServeConfig
from deploy.doors.access import Caller
from deploy.doors.openai import reading
from deploy.doors.openai.answers.gathering import UsageMeter, WholeChoice, gather
from deploy.doors.openai.answers.logprobs import CompletionTable, Entry, TokenNames, of_prompt, sampled, vllm_prompt_logprobs
from deploy.doors.openai.answers.responses import Completion, CompletionChoice
from deploy.doors.openai.jobs import Job
from deploy.doors.openai.schemas import CompletionRequest, StreamOptions
from deploy.doors.openai.sse import event
from deploy.doors.openai.tools.grammars import Grammars
from deploy.frontend.errors import RequestError
from deploy.frontend.outputs import ChoiceDelta
from deploy.frontend.service import Service
from deploy.text.prompts import Prompt, PromptError, Terms
from deploy.text.tokenizer import Tokenizer
from scheduler.protocol.sampling import Grammar, SamplingParams

DEFAULT_MAX_TOKENS = 16


class Completions:
    """Completions of one service."""

    def __init__(self, service: Service, config: ServeConfig, grammars: Grammars) -> None:
        self._service = service
        self._config = config
        self._grammars = grammars
        self._tokenizer = service.model.tokenizer

    async def job(self, request: CompletionRequest, caller: Caller) -> Job:
        """Errors: RequestError."""
        reading.check(request, self._service.model, self._config)
        grammar, asked_by = reading.format_asked(request)
        await self._grammars.check(grammar, asked_by, caller.account)
        params = self._params(request, grammar)
        terms = caller.terms(self._config, request.cache_salt or "", request.priority or 0, request.timeout, request.user)
        return Job.of(caller, "cmpl", self._service.model.name, await self._prompts(request, params, terms))

    async def whole(self, request: CompletionRequest, job: Job) -> Completion:
        """Errors: RequestError."""
        prompts, usage = await gather(job.deltas(self._service), job)
        rendering = _Rendering(request, job, self._tokenizer)
        choices = [
            rendering.choice(position, index, choice, prompt.logprobs)
            for position, prompt in enumerate(prompts)
            for index, choice in enumerate(_best(prompt.choices, request))
        ]
        return Completion(id=job.id, created=job.created, model=job.model, choices=choices, usage=usage)

    async def events(self, request: CompletionRequest, job: Job) -> AsyncGenerator[bytes, None]:
        """A piece of bytes for each delta. Errors: RequestError."""
        options = request.stream_options or StreamOptions()
        rendering, meter = _Rendering(request, job, self._tokenizer), UsageMeter(job.prompt_tokens)
        prompt_logprobs: dict[int, list[Entry | None]] = {}

        def chunk(choices: list[CompletionChoice]) -> bytes:
            usage = meter.shown(options, last=not choices)
            return event(Completion(id=job.id, created=job.created, model=job.model, choices=choices, usage=usage))

        async with aclosing(job.deltas(self._service)) as deltas:
            async for position, delta in deltas:
                meter.take(delta)
                if delta.prompt_logprobs is not None:
                    prompt_logprobs[position] = delta.prompt_logprobs
                entries = prompt_logprobs.get(position, ())
                told = (new for new in delta.choices if new.text or new.logprobs or new.finish_reason)
                if data := b"".join(chunk([rendering.choice(position, new.index, new, entries)]) for new in told):
                    yield data
        if options.include_usage:
            yield chunk([])

    def _params(self, request: CompletionRequest, grammar: Grammar | None) -> SamplingParams:
        """An echo shows the prompt's log-probabilities too. best_of needs some to choose by."""
        logprobs, prompt_logprobs = request.logprobs, request.prompt_logprobs
        if request.echo and logprobs is not None:
            prompt_logprobs = max(logprobs, prompt_logprobs or 0)
        if request.best_of is not None:
            self._check_best_of(request.best_of, request)
            logprobs = logprobs or 0
        return reading.sampling(
            request,
            self._service.parser,
            n=request.best_of or request.n or 1,
            max_tokens=DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            grammar=grammar,
        )

    def _check_best_of(self, best_of: int, request: CompletionRequest) -> None:
        reading.at_most("best_of", best_of, self._config.max_choices, "max_choices")
        if request.stream:
            raise RequestError.invalid("best_of chooses among whole outputs: leave stream out", "best_of")
        if best_of < (request.n or 1):
            raise RequestError.invalid(f"best_of={best_of} is below n={request.n}: raise it", "best_of")

    async def _prompts(self, request: CompletionRequest, params: SamplingParams, terms: Terms) -> list[Prompt]:
        """One after the other, so that many of one request hold up nobody else's. Errors: RequestError of the first that has
        one; the rest is not read."""
        contents = _contents(request.prompt)
        reading.at_most("prompt", len(contents), self._config.max_prompts, "max_prompts")
        if request.echo and self._tokenizer is None:
            raise RequestError.invalid("echo needs text, and this checkpoint has no tokenizer: leave it out", "echo")
        try:
            return [await self._service.prompt(content, params, terms) for content in contents]
        except PromptError as error:
            raise RequestError.of_prompt(error, "prompt") from None


def _contents(prompt: str | list[str | int | list[int]]) -> list[str | list[int]]:
    """One prompt or several: a list of integers is one. Errors: RequestError."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise RequestError.invalid("prompt is an empty list: give at least one prompt", "prompt")
    kinds = {type(item) for item in prompt}
    if len(kinds) > 1:
        raise RequestError.invalid("prompt mixes texts and token ids: give lists of one kind", "prompt")
    return [cast(list[int], prompt)] if kinds == {int} else cast(list[str | list[int]], prompt)


def _best(choices: list[WholeChoice], request: CompletionRequest) -> list[WholeChoice]:
    """Of `best_of` choices the `n` likeliest by the token, the likeliest first."""
    if request.best_of is None:
        return choices
    return sorted(choices, key=lambda choice: -choice.mean_logprob)[: request.n or 1]


class _Rendering:
    """Choices as they go out. A choice's first part says what is said once: the echo, and log-probabilities of the prompt."""

    def __init__(self, request: CompletionRequest, job: Job, tokenizer: Tokenizer | None) -> None:
        self._request = request
        self._job = job
        self._tokenizer = tokenizer
        self._names = TokenNames(tokenizer)
        self._tables: dict[int, CompletionTable] = {}

    def choice(
        self, position: int, index: int, part: WholeChoice | ChoiceDelta, prompt_logprobs: Sequence[Entry | None]
    ) -> CompletionChoice:
        """position: of the prompt. index: among its choices."""
        number = position * (self._request.n or 1) + index
        text, rows = part.text, sampled(part.logprobs or ())
        if self._request.echo and self._tokenizer is not None and number not in self._tables:
            prompt = self._job.prompts[position]
            text = (self._tokenizer.decode(prompt.token_ids) if prompt.text is None else prompt.text) + text
            rows = chain(of_prompt(prompt.token_ids, prompt_logprobs, self._tokenizer), rows)
        table = self._tables.setdefault(number, CompletionTable(self._names))
        return CompletionChoice(
            index=number,
            text=text,
            logprobs=table.part(rows) if self._request.logprobs is not None else None,
            finish_reason=part.finish_reason,
            stop_reason=part.stop_reason,
            prompt_logprobs=vllm_prompt_logprobs(prompt_logprobs) if self._request.prompt_logprobs is not None else UNSET,
        )
