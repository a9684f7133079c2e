"""The prompts that the engine benchmarks give to every engine: token ids drawn from a seed, no tokenizer.

May import the standard library only; never imports an engine. Time is measured elsewhere.
"""

import random
from dataclasses import dataclass

Prompts = list[list[int]]

THROUGHPUT_PROMPTS, THROUGHPUT_OUTPUT_TOKENS = 32, 64
PROMPT_TOKENS = (64, 256)
LATENCY_PROMPT_TOKENS, LATENCY_OUTPUT_TOKENS = 16, 64
PREFILL_TOKENS = 1024
SHARED_PROMPTS, SHARED_TOKENS, OWN_TOKENS, SHARED_OUTPUT_TOKENS = 32, 768, 64, 32


@dataclass(frozen=True, slots=True)
class Batch:
    """Prompts submitted at once; each gets exactly `max_tokens` tokens (greedy, end-of-text ignored)."""

    prompts: Prompts
    max_tokens: int

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt) for prompt in self.prompts)

    @property
    def output_tokens(self) -> int:
        return len(self.prompts) * self.max_tokens


class PromptSource:
    """Draws prompts that differ from draw to draw and repeat from seed to seed.

    Invariant: two draws share no prefix longer than chance allows, so no prefix cache is warm by accident.
    """

    def __init__(self, vocabulary: int, seed: int) -> None:
        self._vocabulary = vocabulary
        self._random = random.Random(seed)

    def throughput(self) -> Batch:
        """Many prompts of mixed length: output tokens per second of a full batch."""
        lengths = [self._random.randint(*PROMPT_TOKENS) for _ in range(THROUGHPUT_PROMPTS)]
        return Batch([self._tokens(length) for length in lengths], THROUGHPUT_OUTPUT_TOKENS)

    def latency(self) -> tuple[Batch, Batch]:
        """One short prompt for one token, another for 64 more: the difference in time is decoding alone."""
        first, longer = (self._tokens(LATENCY_PROMPT_TOKENS) for _ in range(2))
        return Batch([first], 1), Batch([longer], 1 + LATENCY_OUTPUT_TOKENS)

    def prefill(self) -> Batch:
        """One long prompt for one output token."""
        return Batch([self._tokens(PREFILL_TOKENS)], 1)

    def shared_prefix(self) -> tuple[Batch, Batch]:
        """A batch over a new shared prefix, then a batch over the same prefix with other own parts."""
        shared = self._tokens(SHARED_TOKENS)
        return self._over(shared), self._over(shared)

    def warm_up(self) -> list[Batch]:
        """Short batches in the shapes of the four workloads."""
        throughput, prefill, shared = self.throughput(), self.prefill(), self.shared_prefix()
        return [
            Batch(throughput.prompts, 8),
            Batch(self.latency()[1].prompts, 8),
            prefill,
            *(Batch(batch.prompts[:4], 2) for batch in shared),
        ]

    def _over(self, shared: list[int]) -> Batch:
        return Batch([shared + self._tokens(OWN_TOKENS) for _ in range(SHARED_PROMPTS)], SHARED_OUTPUT_TOKENS)

    def _tokens(self, length: int) -> list[int]:
        return self._random.choices(range(self._vocabulary), k=length)
