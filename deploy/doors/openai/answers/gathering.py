"""Output deltas put together: whole choices for answers that are not streamed, and the usage for all.

Imports the outputs and the records of responses; no HTTP.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from msgspec import UNSET, UnsetType
from msgspec.structs import asdict

from deploy.doors.dialects.reasoning.reasoning import Thinking
from deploy.doors.openai.answers.logprobs import Entry
from deploy.doors.openai.answers.records import CompletionTokens, PromptTokens, Usage
from deploy.doors.openai.requests.schemas import StreamOptions
from deploy.frontend.outputs import ChoiceDelta, OutputDelta
from deploy.text.prompts import Prompt
from scheduler.protocol.messages import NO_MISSES


class UsageMeter:
    """Counts the tokens of one request as they come. thinking: of its one prompt, if its outputs may be thoughts. reasons: say
    why prompt tokens were not cached."""

    def __init__(self, prompts: Sequence[Prompt], thinking: Thinking | None, *, reasons: bool = False) -> None:
        self._reasons = reasons
        self._misses = NO_MISSES
        self._sorters = [thinking.sorter() for _ in range(prompts[0].params.n)] if thinking is not None else []
        self._prompt_tokens = sum(len(prompt.token_ids) for prompt in prompts)
        self._completion_tokens = self._cached_tokens = 0

    def take(self, delta: OutputDelta) -> None:
        for choice in delta.choices:
            self._completion_tokens += len(choice.token_ids)
            if self._sorters:
                self._sorters[choice.index].push((token, None) for token in choice.token_ids)
                if choice.finish_reason is not None:
                    self._sorters[choice.index].flush()
        if delta.finished:
            self._cached_tokens += delta.cached_tokens or 0
            self._misses += delta.misses

    def usage(self) -> Usage:
        thought = sum(sorter.thought_tokens for sorter in self._sorters)
        return Usage(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
            total_tokens=self._prompt_tokens + self._completion_tokens,
            prompt_tokens_details=self._prompt_details(),
            completion_tokens_details=CompletionTokens(reasoning_tokens=thought) if self._sorters else UNSET,
        )

    def _prompt_details(self) -> PromptTokens:
        missed = {f"{reason}_tokens": tokens for reason, tokens in asdict(self._misses).items()} if self._reasons else {}
        return PromptTokens(cached_tokens=self._cached_tokens, **missed)

    def shown(self, options: StreamOptions) -> Usage | UnsetType | None:
        """What an event of a stream says, but for the last."""
        if options.continuous_usage_stats:
            return self.usage()
        return None if options.include_usage else UNSET


@dataclass(slots=True)
class WholeChoice:
    """One choice, complete. logprobs: an entry for each token; empty if not asked for."""

    pieces: list[str] = field(default_factory=list)
    logprobs: list[Entry] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def mean_logprob(self) -> float:
        """Of the sampled tokens."""
        chosen = [next(iter(entry.values())).logprob for entry in self.logprobs]
        return sum(chosen) / len(chosen) if chosen else float("-inf")

    def take(self, delta: ChoiceDelta) -> None:
        self.pieces.append(delta.text)
        self.logprobs += delta.logprobs or ()
        self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason


class WholePrompt:
    """One prompt's choices, complete. logprobs: an entry for each token of the prompt; empty if not asked for."""

    def __init__(self, choices: int) -> None:
        self.choices = [WholeChoice() for _ in range(choices)]
        self.logprobs: list[Entry | None] = []

    def take(self, delta: OutputDelta) -> None:
        if delta.prompt_logprobs is not None:
            self.logprobs = delta.prompt_logprobs
        for choice in delta.choices:
            self.choices[choice.index].take(choice)
