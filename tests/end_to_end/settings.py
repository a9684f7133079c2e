"""The settings under which the engine must say the same: a table that covers every pair of them, and how to open each.

Imports the Python API and the layout of a block, so that a pool can be asked for in blocks.
"""

from dataclasses import dataclass, fields
from itertools import combinations
from pathlib import Path
from typing import Any

from deploy import LLM, SamplingParams
from deploy.frontend.outputs import RequestOutput
from deploy.text.sources import Source
from kvcache.layout import BlockLayout
from workers.model.architectures import read_config

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
LARGE_POOL_TOKENS = 10_240
SMALL_POOL_TOKENS = {16: 35 * 16, 256: 4 * 256}
"""By block size: room for one prompt of 300 tokens with its output, and not for two of the longer ones as they grow."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to run. budget: tokens in a step. small: a pool in which sequences are preempted."""

    architecture: str
    budget: int = 2048
    size: int = 1  # ranks of a group
    groups: int = 1
    block: int = 256
    caching: bool = False
    small: bool = False

    def __str__(self) -> str:
        cache, pool = ("cached" if self.caching else "uncached"), ("small" if self.small else "large")
        name = self.architecture.removesuffix("ForCausalLM")
        return f"{name}-budget{self.budget}-tp{self.size}-groups{self.groups}-block{self.block}-{cache}-{pool}"


LLAMA, MISTRAL, QWEN2, QWEN3 = ARCHITECTURES
COVERING = (
    Setting(LLAMA, 33, size=1, groups=1, block=16, caching=False, small=False),
    Setting(LLAMA, 7, size=2, groups=1, block=16, caching=True, small=True),
    Setting(LLAMA, 2048, size=1, groups=2, block=256, caching=True, small=True),
    Setting(LLAMA, 16, size=2, groups=2, block=256, caching=False, small=False),
    Setting(MISTRAL, 33, size=2, groups=1, block=256, caching=False, small=True),
    Setting(MISTRAL, 7, size=1, groups=1, block=256, caching=True, small=False),
    Setting(MISTRAL, 2048, size=2, groups=2, block=16, caching=True, small=False),
    Setting(MISTRAL, 16, size=1, groups=2, block=16, caching=False, small=True),
    Setting(QWEN2, 33, size=1, groups=2, block=16, caching=True, small=False),
    Setting(QWEN2, 7, size=2, groups=2, block=16, caching=False, small=True),
    Setting(QWEN2, 2048, size=1, groups=1, block=256, caching=False, small=True),
    Setting(QWEN2, 16, size=2, groups=1, block=256, caching=True, small=False),
    Setting(QWEN3, 33, size=2, groups=2, block=256, caching=True, small=True),
    Setting(QWEN3, 7, size=1, groups=2, block=256, caching=False, small=False),
    Setting(QWEN3, 2048, size=2, groups=1, block=16, caching=False, small=False),
    Setting(QWEN3, 16, size=1, groups=1, block=16, caching=True, small=True),
)


def uncovered_pairs() -> set[tuple[tuple[str, object], tuple[str, object]]]:
    """Pairs of values of two different fields that no row of the table has together."""
    names = [field.name for field in fields(Setting)]
    values = {name: {getattr(setting, name) for setting in COVERING} for name in names}
    wanted = {
        ((one, a), (other, b)) for one, other in combinations(names, 2) for a in values[one] for b in values[other]
    }
    return wanted - {
        ((one, getattr(setting, one)), (other, getattr(setting, other)))
        for setting in COVERING
        for one, other in combinations(names, 2)
    }


def kv_memory(path: Path, blocks: int, block: int, dtype: str = "float32", size: int = 1) -> int:
    """Bytes of each rank that hold exactly so many blocks."""
    shape = read_config(path).shard(0, size)
    return blocks * BlockLayout(block, shape.layers, shape.kv_heads, shape.head_dim, dtype).block_bytes


def open_llm(
    path: Path, *, block: int = 16, blocks: int | None = None, dtype: str = "float32", size: int = 1, **options: Any
) -> LLM:
    """An engine in this process that checks the scheduler's state after every event. blocks: of each group's pool."""
    memory = kv_memory(path, blocks or LARGE_POOL_TOKENS // block, block, dtype, size)
    asked: dict[str, Any] = {"local": True, "check_invariants": True, "seed": 0, "threads": 1}
    asked |= {"block_size": block, "kv_memory": memory, "dtype": dtype, "tensor_parallel_size": size}
    return LLM(path, **asked | options)


def open_setting(path: Path, setting: Setting, dtype: str, **options: Any) -> LLM:
    tokens = SMALL_POOL_TOKENS[setting.block] if setting.small else LARGE_POOL_TOKENS
    return open_llm(
        path, block=setting.block, blocks=tokens // setting.block, dtype=dtype, size=setting.size, groups=setting.groups,
        max_num_batched_tokens=setting.budget, enable_prefix_caching=setting.caching, **options,
    )  # fmt: skip


def run(llm: LLM, prompts: list[list[int]], params: SamplingParams | list[SamplingParams]) -> list[RequestOutput]:
    sources: list[Source] = list(prompts)
    return llm.generate(sources, params, progress=False)


def tokens(outputs: list[RequestOutput]) -> list[list[list[int]]]:
    """[prompt][choice] -> output token ids."""
    return [[choice.token_ids for choice in output.outputs] for output in outputs]


def greedy(max_tokens: int, **fields: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, **fields)
