"""Prompts whose lengths lie around block borders, many of them with a common beginning, and what to sample for each."""

import random
from typing import Any

from deploy import SamplingParams

VOCAB = 199
"""Of `tests.shared.checkpoints`; no multiple of any tensor parallel size."""


def draw(length: int, seed: int) -> list[int]:
    numbers = random.Random(seed)
    return [numbers.randrange(VOCAB) for _ in range(length)]


SHARED = draw(300, seed=1)
WORK = [  # prompt, output tokens
    (SHARED[:250], 24),  # in one block of 256 at first, in two soon after; so are the next five
    ([*SHARED[:32], *draw(219, seed=2)], 24),
    (draw(249, seed=3), 24),
    ([*SHARED[:240], *draw(9, seed=4)], 24),
    (draw(252, seed=5), 20),
    (SHARED[:253], 20),
    (SHARED[:255], 17),
    (SHARED[:256], 18),
    (SHARED[:257], 16),
    (SHARED, 20),
    ([*SHARED[:256], *draw(5, seed=6)], 12),
    (draw(15, seed=7), 18),  # 15 + 18 - 1 slots are exactly two blocks of 16, and so with 16 and 17 below
    (draw(16, seed=8), 17),
    (draw(17, seed=9), 16),
    (draw(1, seed=10), 20),
]
PROMPTS = [prompt for prompt, _ in WORK]
OUTPUTS = [count for _, count in WORK]

STOPS = tuple(range(0, VOCAB, 9))
HOW: list[dict[str, Any]] = [  # one for each prompt
    {"temperature": 0.0},
    {"temperature": 0.8, "seed": 11, "stop_token_ids": STOPS, "min_tokens": 22},  # a victim where pools are small
    {"temperature": 1.5, "seed": 12, "top_k": 7, "stop_token_ids": STOPS, "min_tokens": 22},
    {"temperature": 0.0, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2},
    {"temperature": 1.7, "seed": 13, "min_p": 0.1, "logprobs": 3},
    {"temperature": 2.0, "seed": 14, "logit_bias": {5: 4.0, 77: -50.0}, "logprobs": 0},
    {"temperature": 2.0, "seed": 15, "top_p": 0.6, "n": 2},
    {"temperature": 3.0, "seed": 16, "frequency_penalty": 1.0, "top_k": 50, "stop_token_ids": STOPS},
    {"temperature": 0.0, "stop_token_ids": STOPS, "min_tokens": 3},
    {"temperature": 2.0, "seed": 17, "stop_token_ids": STOPS, "min_tokens": 15},
    {"temperature": 1.0, "seed": 18, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "presence_penalty": -1.0},
    {"temperature": 4.0, "seed": 19, "n": 2, "repetition_penalty": 0.8, "logprobs": 5},
    {"temperature": 1.0, "seed": 20, "n": 3, "stop_token_ids": STOPS},
    {"temperature": 1.0, "seed": 20, "logit_bias": dict.fromkeys(range(20), 3.0)},
    {"temperature": 0.0, "logprobs": 20, "logit_bias": {3: -100.0}},
]


def sampling(times: int = 1) -> list[SamplingParams]:
    """times: of `OUTPUTS`. Blocks are granted further ahead where a report covers several steps, or one step is launched before
    the last is read: it takes longer until a pool is too small."""
    return [
        SamplingParams(max_tokens=times * count, **how | {"min_tokens": times * how.get("min_tokens", 0)})
        for count, how in zip(OUTPUTS, HOW, strict=True)
    ]


SAMPLING = sampling()
