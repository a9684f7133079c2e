"""What the tests of the GPU path run: its marks, a checkpoint with a tokenizer, prompts, and a mixture of settings."""

from pathlib import Path
from typing import Any

import pytest
import torch

from scheduler.protocol.sampling import Grammar, SamplingParams
from tests.end_to_end.prompts import draw
from tests.shared.checkpoints import make_checkpoint
from tests.shared.tokenizers import EOS, byte_level, save
from tests.workers.stepping import Stepped, Work

DEVICE = "cuda"
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

VOCAB = 419  # odd, and more than the tokenizer has
SHAPE: dict[str, Any] = {"hidden_size": 128, "head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
REGEX = Grammar("regex", r"[a-f]{3,9}(, [g-m]{1,6}){1,3}!")
STOPS = tuple(range(0, VOCAB, 17))

HOW: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 1.5, "top_p": 0.8},
    {"temperature": 1.2, "top_k": 7},
    {"temperature": 2.0, "min_p": 0.05},
    {"temperature": 1.3, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
    {"temperature": 0.0, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2},
    {"temperature": 2.0, "presence_penalty": -1.0, "top_p": 0.7},
    {"temperature": 1.0, "logit_bias": {5: 4.0, 77: -50.0}},
    {"temperature": 3.0, "stop_token_ids": STOPS, "min_tokens": 1000, "max_tokens": 1000},
]
"""No end but the length: a stop id that may not come yet bars itself."""


def checkpoint(path: Path, architecture: str = "Qwen3ForCausalLM", **fields: Any) -> Path:
    """Sharp weights, with a tokenizer for grammars."""
    make_checkpoint(path, architecture, vocab_size=VOCAB, eos_token_id=EOS, **SHAPE | fields)
    return save(byte_level(), path)


def mixture(count: int, tokens: int, first: int = 0) -> list[Work]:
    """So many prompts of 1 to 60 tokens with all of `HOW` by turns, each `tokens` long in the end."""
    works = []
    for number in range(first, first + count):
        how = {"ignore_eos": True} | HOW[number % len(HOW)] | {"max_tokens": tokens}
        if "min_tokens" in how:
            how["min_tokens"] = tokens
        prompt = [token % VOCAB for token in draw(1 + number * 7 % 60, seed=number)]
        works.append(Work(prompt, SamplingParams(**how), seed=100 + number))
    return works


def constrained(tokens: int, seed: int = 5, **how: Any) -> Work:
    """A prompt that is continued as `REGEX` says."""
    return Work(draw(9, seed=seed), SamplingParams(max_tokens=tokens, grammar=REGEX, **how), seed)


def loop(path: Path, **options: Any) -> Stepped:
    return Stepped(path, device=DEVICE, **options)
