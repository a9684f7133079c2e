"""Prompts whose lengths lie around page borders, many of them with a common beginning, and what to sample for each."""

import random

from deploy import SamplingParams

VOCAB = 199
"""Of `tests.checkpoints`; no multiple of any tensor parallel size."""


def draw(length: int, seed: int) -> list[int]:
    numbers = random.Random(seed)
    return [numbers.randrange(VOCAB) for _ in range(length)]


SHARED = draw(300, seed=1)
WORK = [  # prompt, output tokens
    (SHARED[:250], 48),  # in one page of 256 at first, in two soon after; so are the next five
    ([*SHARED[:32], *draw(219, seed=2)], 48),
    (draw(249, seed=3), 48),
    ([*SHARED[:240], *draw(9, seed=4)], 48),
    (draw(252, seed=5), 40),
    (SHARED[:253], 40),
    (SHARED[:255], 17),
    (SHARED[:256], 18),
    (SHARED[:257], 16),
    (SHARED, 20),
    ([*SHARED[:256], *draw(5, seed=6)], 12),
    (draw(15, seed=7), 18),  # 15 + 18 - 1 slots are exactly two pages of 16, and so with 16 and 17 below
    (draw(16, seed=8), 17),
    (draw(17, seed=9), 33),
    (draw(1, seed=10), 32),
]
PROMPTS = [prompt for prompt, _ in WORK]
OUTPUTS = [count for _, count in WORK]

STOPS = tuple(range(0, VOCAB, 9))
SAMPLING = [
    SamplingParams(temperature=0.0, max_tokens=24),
    SamplingParams(temperature=0.8, seed=11, max_tokens=33),
    SamplingParams(temperature=1.5, seed=12, top_k=7, max_tokens=17),
    SamplingParams(temperature=2.0, seed=13, top_p=0.6, n=2, max_tokens=18),
    SamplingParams(temperature=1.7, seed=14, min_p=0.1, max_tokens=24, logprobs=3),
    SamplingParams(temperature=0.0, repetition_penalty=1.3, presence_penalty=0.5, max_tokens=40),
    SamplingParams(temperature=3.0, seed=15, frequency_penalty=1.0, top_k=50, max_tokens=30, stop_token_ids=STOPS),
    SamplingParams(temperature=2.0, seed=16, logit_bias={5: 4.0, 77: -50.0}, max_tokens=17, logprobs=0),
    SamplingParams(temperature=2.0, seed=17, stop_token_ids=STOPS, min_tokens=20, max_tokens=33),
    SamplingParams(temperature=1.0, seed=18, top_k=20, top_p=0.9, min_p=0.02, presence_penalty=-1.0, max_tokens=20),
    SamplingParams(temperature=4.0, n=2, seed=19, repetition_penalty=0.8, logprobs=5, max_tokens=32),
    SamplingParams(temperature=0.0, stop_token_ids=STOPS, min_tokens=3, max_tokens=25),
]
