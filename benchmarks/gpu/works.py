"""The works of the GPU benchmark: token ids drawn from a seed, the same at each run and for each engine.

May import the standard library only.
"""

import random
from dataclasses import dataclass

Prompts = list[list[int]]

VOCABULARY = 10_000  # ids that prompts are drawn from, as nano-vLLM's benchmark does


@dataclass(frozen=True, slots=True)
class Work:
    """Prompts submitted at once; prompt i gets exactly `lengths[i]` tokens, end-of-text ignored. temperature 0 is greedy."""

    prompts: Prompts
    lengths: list[int]
    temperature: float = 0.0

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt) for prompt in self.prompts)

    @property
    def output_tokens(self) -> int:
        return sum(self.lengths)


def batch_1(seed: int) -> Work:
    """One prompt of 128 tokens, 256 out, greedy."""
    return Work(_draw(random.Random(seed), [128]), [256])


def batch_32(seed: int) -> Work:
    """32 prompts of 64 to 256 tokens, 256 out, greedy."""
    chance = random.Random(seed)
    return Work(_draw(chance, [chance.randint(64, 256) for _ in range(32)]), [256] * 32)


def many(seed: int) -> Work:
    """nano-vLLM's own benchmark: 256 prompts of 100 to 1,024 tokens, 100 to 1,024 out, temperature 0.6.

    133,966 tokens come out with seed 0.
    """
    chance = random.Random(seed)
    prompts = [_draw(chance, [chance.randint(100, 1024)])[0] for _ in range(256)]
    return Work(prompts, [chance.randint(100, 1024) for _ in range(256)], temperature=0.6)


def prefill(seed: int) -> Work:
    """16 prompts of 4,096 tokens, one token out."""
    return Work(_draw(random.Random(seed), [4096] * 16), [1] * 16)


def shared(seed: int, own: int) -> Work:
    """64 prompts of 2,048 shared tokens and 64 of their own, 64 out, greedy. own: draws the latter; seed: the former."""
    [common] = _draw(random.Random(seed), [2048])
    return Work([common + tail for tail in _draw(random.Random(own), [64] * 64)], [64] * 64)


def beside(seed: int) -> tuple[Work, Work]:
    """32 prompts of 128 tokens, 512 out, greedy, and 24 prompts of 4,096 tokens, one token out, that come meanwhile."""
    chance = random.Random(seed)
    return Work(_draw(chance, [128] * 32), [512] * 32), Work(_draw(chance, [4096] * 24), [1] * 24)


def _draw(chance: random.Random, lengths: list[int]) -> Prompts:
    return [[chance.randint(0, VOCABULARY) for _ in range(length)] for length in lengths]
