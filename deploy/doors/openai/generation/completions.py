"""`/v1/completions`: prompts in, text out. Knows nothing of HTTP."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

from msgspec import UNSET, UnsetType

from deploy.doors.access import Caller
from deploy.doors.openai.answers.gathering import WholeChoice, WholePrompt
from deploy.doors.openai.answers.logprobs import CompletionTable, Entry, of_prompt, sampled, vllm_prompt_logprobs
from deploy.doors.openai.answers.records import Completion, CompletionChoice, Usage
from deploy.doors.openai.generation.endpoint import Asked, Endpoint, Telling
from deploy.doors.openai.requests import reading
from deploy.doors.openai.requests.schemas import CompletionRequest
from deploy.doors.warnings import Warnings
from deploy.frontend.errors import RequestError
from deploy.frontend.outputs import ChoiceDelta, OutputDelta

DEFAULT_MAX_TOKENS = 16


@dataclass(eq=False)
class _CompletionTelling(Telling[CompletionRequest]):
    """A choice's first part says what is said once: the echo, and log-probabilities of the prompt."""

    _tables: dict[int, CompletionTable] = field(default_factory=dict)
    _prompt_logprobs: dict[int, list[Entry | None]] = field(default_factory=dict)

    def wanted(self, delta: OutputDelta) -> OutputDelta:
        """Whoever asks for no output gets none of the one token that the end of a prompt yields in any case."""
        bare = self.request.max_tokens == 0
        return replace(delta, choices=list(map(_without_output, delta.choices))) if bare else delta

    def whole(self, outputs: Sequence[WholePrompt], usage: Usage) -> Completion:
        choices = [
            self._choice(position, index, choice, output.logprobs)
            for position, output in enumerate(outputs)
            for index, choice in enumerate(_best(output.choices, self.request))
        ]
        return self.chunk(choices, usage)

    def parts(self, position: int, delta: OutputDelta) -> Iterator[CompletionChoice]:
        if delta.prompt_logprobs is not None:
            self._prompt_logprobs[position] = delta.prompt_logprobs
        for new in delta.choices:
            if new.text or new.logprobs or new.finish_reason:
                yield self._choice(position, new.index, new, self._prompt_logprobs.get(position, ()))

    def chunk(self, choices: list[CompletionChoice], usage: Usage | UnsetType | None) -> Completion:
        return Completion(**self.heading, choices=choices, usage=usage)

    def _choice(
        self, position: int, index: int, part: WholeChoice | ChoiceDelta, prompt_logprobs: Sequence[Entry | None]
    ) -> CompletionChoice:
        """position: of the prompt. index: among its choices."""
        number = position * (self.request.n or 1) + index
        text, rows = part.text, sampled(part.logprobs or ())
        if self.request.echo and self.tokenizer is not None and number not in self._tables:
            prompt = self.prompts[position]
            text = (self.tokenizer.decode(prompt.token_ids) if prompt.text is None else prompt.text) + text
            rows = chain(of_prompt(prompt.token_ids, prompt_logprobs, self.tokenizer), rows)
        table = self._tables.setdefault(number, CompletionTable(self.names))
        return CompletionChoice(
            index=number,
            text=text,
            logprobs=table.part(rows) if self.request.logprobs is not None else None,
            finish_reason=part.finish_reason,
            stop_reason=part.stop_reason,
            prompt_logprobs=vllm_prompt_logprobs(prompt_logprobs) if self.request.prompt_logprobs is not None else UNSET,
        )


class Completions(Endpoint[CompletionRequest]):
    """Completions of one service."""

    id_prefix, prompt_field, answer = "cmpl", "prompt", _CompletionTelling

    def _read(self, request: CompletionRequest, caller: Caller, warnings: Warnings) -> Asked:
        """An echo shows the prompt's log-probabilities too. best_of needs some to choose by."""
        reading.check(request, self._service.model, self._config)
        grammar, field = reading.format_asked(request, warnings)
        logprobs, prompt_logprobs = request.logprobs, request.prompt_logprobs
        if request.max_tokens == 0 and not request.echo:
            raise RequestError.invalid("max_tokens: 0 goes with echo=true: set it, or ask for a token", "max_tokens")
        if request.echo and logprobs is not None:
            prompt_logprobs = max(logprobs, prompt_logprobs or 0)
        if request.best_of is not None:
            self._check_best_of(request.best_of, request)
            logprobs = logprobs or 0
        params = reading.sampling(
            request,
            grammar=grammar,
            n=request.best_of or request.n or 1,
            max_tokens=DEFAULT_MAX_TOKENS if request.max_tokens is None else max(1, request.max_tokens),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )
        terms = reading.terms(request, caller, self._config)
        contents = reading.contents(request.prompt, "prompt")
        reading.at_most("prompt", len(contents), self._config.max_prompts, "max_prompts")
        if request.echo and self._service.model.tokenizer is None:
            raise RequestError.invalid("echo needs text, and this checkpoint has no tokenizer: leave it out", "echo")
        return Asked(contents, params, terms, None, field)

    def _check_best_of(self, best_of: int, request: CompletionRequest) -> None:
        reading.at_most("best_of", best_of, self._config.max_choices, "max_choices")
        if request.stream:
            raise RequestError.invalid("best_of chooses among whole outputs: leave stream out", "best_of")
        if best_of < (request.n or 1):
            raise RequestError.invalid(f"best_of={best_of} is below n={request.n}: raise it", "best_of")


def _without_output(new: ChoiceDelta) -> ChoiceDelta:
    ended = new.finish_reason and "length"
    return replace(new, text="", token_ids=[], logprobs=new.logprobs and [], finish_reason=ended, stop_reason=None)


def _best(choices: list[WholeChoice], request: CompletionRequest) -> list[WholeChoice]:
    """Of `best_of` choices the `n` likeliest by the token, the likeliest first."""
    if request.best_of is None:
        return choices
    return sorted(choices, key=lambda choice: -choice.mean_logprob)[: request.n or 1]
