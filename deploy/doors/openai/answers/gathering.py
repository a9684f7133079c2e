"""Output deltas put together: whole choices for answers that are not streamed, and the usage for all.

Imports the outputs and the records of responses; no HTTP.
"""

from contextlib import aclosing
from dataclasses import dataclass, field

from msgspec import UNSET, UnsetType

from deploy.doors.openai.answers.logprobs import Entry
from deploy.doors.openai.answers.responses import CachedTokens, Usage
from deploy.doors.openai.jobs import Deltas, Job
from deploy.doors.openai.schemas import StreamOptions
from deploy.frontend.outputs import ChoiceDelta, OutputDelta


class UsageMeter:
    """Counts the tokens of one request as they come."""

    def __init__(self, prompt_tokens: int) -> None:
        self._prompt_tokens = prompt_tokens
        self._completion_tokens = self._cached_tokens = 0

    def take(self, delta: OutputDelta) -> None:
        for choice in delta.choices:
            self._completion_tokens += len(choice.token_ids)
        if delta.finished:
            self._cached_tokens += delta.cached_tokens or 0

    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
            total_tokens=self._prompt_tokens + self._completion_tokens,
            prompt_tokens_details=CachedTokens(cached_tokens=self._cached_tokens),
        )

    def shown(self, options: StreamOptions, last: bool) -> Usage | UnsetType | None:
        """What an event of a stream says. last: after everything else."""
        if last or options.continuous_usage_stats:
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


@dataclass(slots=True)
class WholePrompt:
    """One prompt's choices, complete. logprobs: an entry for each token of the prompt; empty if not asked for."""

    choices: list[WholeChoice]
    logprobs: list[Entry | None] = field(default_factory=list)


async def gather(deltas: Deltas, job: Job) -> tuple[list[WholePrompt], Usage]:
    """Waits for every choice of every prompt. Errors: RequestError."""
    prompts = [WholePrompt([WholeChoice() for _ in range(prompt.params.n)]) for prompt in job.prompts]
    meter = UsageMeter(job.prompt_tokens)
    async with aclosing(deltas):
        async for position, delta in deltas:
            meter.take(delta)
            if delta.prompt_logprobs is not None:
                prompts[position].logprobs = delta.prompt_logprobs
            for choice in delta.choices:
                prompts[position].choices[choice.index].take(choice)
    return prompts, meter.usage()
