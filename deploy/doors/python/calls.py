"""What a call of `LLM` is given, read into prompts: one of everything for all, or one for each. Imports prompts' types."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from deploy.doors.python.sources import Source, all_or_none, listed, read_lora, read_source, read_terms
from deploy.frontend.errors import Fault
from deploy.frontend.outputs import CompletionOutput, RequestOutput
from deploy.frontend.scoring import NO_HEAD
from deploy.text.adapters import Adapters
from deploy.text.content import Content, PromptError
from deploy.text.files import writable
from deploy.text.prompts import Prompt, PromptParser, Terms
from scheduler.protocol.messages import Pooling
from scheduler.protocol.sampling import SamplingParams
from workers.model.pooling import Uses

Params = SamplingParams | Iterable[SamplingParams] | None
"""One for all prompts, one for each, or the defaults."""

Lora = str | Sequence[str | None] | None
"""The name of the LoRA adapter for all prompts, or one for each; None: the model as it is."""


@dataclass(frozen=True, slots=True)
class CallReader:
    """For one model. parser: of prompts without an adapter. uses: what the checkpoint is good for."""

    parser: PromptParser
    adapters: Adapters
    uses: Uses

    def prompts(
        self, sources: Sequence[Source], params: Params, call: Terms, lora: Lora
    ) -> Iterator[Prompt | PromptError]:  # fmt: skip
        """Each is read when its turn comes. Errors, at once: PromptError for what is wrong with the call as a whole."""
        if not self.uses.generates:
            raise PromptError(NO_HEAD)
        if params is None or isinstance(params, SamplingParams):
            every = [params or SamplingParams()] * len(sources)
        else:
            every = listed(params, "sampling parameters must be SamplingParams(...), or a list of them, one for each prompt")
        if len(every) != len(sources):
            raise PromptError(f"{len(sources)} prompts and {len(every)} sampling parameters: give one for each, or one for all")
        names = names_of(lora, len(sources))
        return (self._prompt(*each, call) for each in zip(sources, every, names, strict=True))

    def _prompt(self, source: Source, params: SamplingParams, name: str | None, call: Terms) -> Prompt | PromptError:
        try:
            content, params_of, terms = read_source(source, params, call)
            return self._parser_of(read_lora(source, name)).prompt(content, params_of, terms)
        except PromptError as error:
            return error

    def pooled(
        self, contents: Sequence[tuple[Content, Terms]], pooling: Pooling, loras: Sequence[str | None] = ()
    ) -> list[Prompt]:
        """loras: of each, where any is named. Errors: PromptError."""
        parsed: list[Prompt | PromptError] = []
        for (content, terms), name in zip(contents, loras or [None] * len(contents), strict=True):
            try:
                parsed.append(self._parser_of(name).pooled(content, pooling, terms))
            except PromptError as error:
                parsed.append(error)
        return list(all_or_none(parsed, len(parsed)))

    def _parser_of(self, lora: str | None) -> PromptParser:
        """Errors: PromptError."""
        if lora is None:
            return self.parser
        if (adapter := self.adapters.get(lora)) is None:
            there = ", ".join(repr(each.name) for each in self.adapters)
            said = f"there is no LoRA adapter {lora!r}{f', but {there}' if there else ''}"
            raise PromptError(f"{said}: name it in lora at the start, or load it")
        return replace(self.parser, adapter=adapter)


def names_of(lora: Lora, count: int) -> list[str | None]:
    """For each of so many prompts. Errors: PromptError."""
    if lora is None or isinstance(lora, str):
        return [lora] * count
    names = listed(lora, "lora must be the name of a LoRA adapter, or a list of one for each prompt")
    if len(names) != count:
        raise PromptError(f"{count} prompts and {len(names)} names of LoRA adapters: give one for each, or one for all")
    return names


def terms_of(tenant: str, deadline_s: float | None, priority: int) -> Terms:
    """Of a call. Errors: PromptError."""
    return read_terms({"tenant": tenant, "deadline_s": deadline_s, "priority": priority})


def refusal(source: Source, error: PromptError) -> RequestOutput:
    """The output of a prompt that was never submitted."""
    text = source.get("prompt") if isinstance(source, Mapping) else source
    prompt = writable(text) if isinstance(text, str) else None
    failed = CompletionOutput(0, "", [], finish_reason="error")
    return RequestOutput("", prompt, [], None, [failed], finished=True, error=str(error), fault=Fault.INVALID)
