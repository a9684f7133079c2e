"""One checkpoint in the engine and in transformers, greedy, in float32: the same tokens or not, under which settings.

Imports the Python API, torch and transformers.
"""

import random
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.models.zoo import VOCAB
from deploy import LLM, SamplingParams
from deploy.doors.python.sources import Source
from kvcache.layout import BlockLayout
from workers.config import ReadingConfig
from workers.model.reading import read_model


def draw(length: int, seed: int) -> list[int]:
    numbers = random.Random(seed)
    return [numbers.randrange(VOCAB) for _ in range(length)]


SHARED = draw(260, seed=1)
WORK = [  # prompt, output tokens: beyond windows and chunks, around the borders of blocks, some with a common beginning
    (SHARED[:250], 20),
    ([*SHARED[:240], *draw(12, seed=2)], 20),
    (SHARED[:255], 18),
    ([*SHARED[:32], *draw(30, seed=3)], 20),
    (draw(61, seed=4), 20),
    (draw(16, seed=5), 17),
    (draw(1, seed=6), 12),
]
SMALL_POOL_BLOCKS = {16: 21, 256: 3}
"""By block size: room for the longest with its output, and for others beside it until they grow."""

ROOMY_TOKENS = 4096
MOST_TURNS = 4


@dataclass(frozen=True, slots=True)
class Setting:
    """size: ranks. small: a pool in which sequences are preempted. budget: tokens in a step, so prompts go in chunks.
    expert_parallel: ranks share out whole experts."""

    size: int = 1
    block: int = 16
    small: bool = False
    budget: int = 48
    expert_parallel: bool = False

    def __str__(self) -> str:
        by_expert = "-by-expert" if self.expert_parallel else ""
        return f"tp{self.size}-block{self.block}-{'small' if self.small else 'large'}{by_expert}"


SETTINGS = (Setting(1, 16), Setting(1, 256, small=True, budget=512), Setting(2, 16, small=True), Setting(2, 256))


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one setting. wrong: outputs that are not transformers', in words."""

    compared: int
    wrong: tuple[str, ...]
    hits: int
    preemptions: int


class Reference:
    """One checkpoint in transformers. Each answer is judged once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._greedy: dict[tuple[int, ...], list[int]] = {}

    @cached_property
    def _model(self) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(
            self._path, dtype=torch.float32, attn_implementation="eager", experts_implementation=None
        ).eval()

    @torch.inference_mode()
    def greedy(self, prompt: list[int], output: list[int]) -> list[int]:
        """What it chooses in the place of each token of the output, after those before it: the output itself if and only if
        that is what its `generate` says, which would take a step for each token."""
        ids = (*prompt, *output[:-1])
        if ids not in self._greedy:
            logits = self._model(torch.tensor([ids])).logits[0, len(prompt) - 1 :]
            self._greedy[ids] = logits.argmax(-1).tolist()
        return self._greedy[ids]


def block_bytes(path: Path, setting: Setting, implementation: str = "auto") -> int:
    """Of a rank's pool."""
    shape = read_model(path, ReadingConfig(model_implementation=implementation)).shard(0, setting.size)
    return BlockLayout(setting.block, shape.layers, shape.kv_heads, shape.head_dim, "float32").block_bytes


def compare(path: Path, reference: Reference, setting: Setting, implementation: str = "auto") -> Outcome:
    """Turn by turn until prefixes were hit, and sequences preempted where the pool is small. Errors: ConfigError."""
    blocks = SMALL_POOL_BLOCKS[setting.block] if setting.small else ROOMY_TOKENS // setting.block
    wrong: list[str] = []
    compared = 0
    sources: list[Source] = [prompt for prompt, _ in WORK]
    params = [SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True) for _, count in WORK]
    with LLM(
        path, local=True, check_invariants=True, seed=0, threads=1, dtype="float32", tensor_parallel_size=setting.size,
        block_size=setting.block, kv_memory=blocks * block_bytes(path, setting, implementation), max_model_len=320,
        max_num_batched_tokens=setting.budget, model_implementation=implementation,
        enable_expert_parallel=setting.expert_parallel,
    ) as llm:  # fmt: skip
        for _ in range(MOST_TURNS):
            for number, output in enumerate(llm.generate(sources, params, progress=False)):
                (prompt, count), found = WORK[number], list(output.outputs[0].token_ids)
                expected = reference.greedy(prompt, found)
                compared += 1
                if len(found) != count or found != expected:
                    wrong.append(f"{setting}, prompt {number}: {found} instead of {expected}")
            stats = llm.stats()
            if stats.cached_tokens and (stats.preemptions or not setting.small):
                break
    return Outcome(compared, tuple(wrong), stats.cached_tokens, stats.preemptions)
