"""The settings under which the engine must say the same: a table that covers every pair of them, and how to open each."""

from dataclasses import dataclass, fields
from itertools import combinations
from pathlib import Path
from typing import Any

from deploy import LLM
from tests.end_to_end.engines import LARGE_POOL_TOKENS, LLAMA, MISTRAL, QWEN2, QWEN3, open_llm

SMALL_POOL_TOKENS = {16: 33 * 16, 256: 4 * 256}
"""By block size: room for one prompt of 300 tokens with its output, and for two of the longer ones until they grow."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to run. budget: tokens in a step. small: a pool in which sequences are preempted. dtype: also how it is judged,
    in float32 by transformers, in float64 by what is said one way or another."""

    architecture: str
    budget: int = 2048
    size: int = 1  # ranks of a group
    groups: int = 1
    block: int = 256
    caching: bool = False
    small: bool = False
    dtype: str = "float64"

    def __str__(self) -> str:
        cache, pool = ("cached" if self.caching else "uncached"), ("small" if self.small else "large")
        name = self.architecture.removesuffix("ForCausalLM")
        return f"{name}-budget{self.budget}-tp{self.size}-groups{self.groups}-block{self.block}-{cache}-{pool}-{self.dtype}"


COVERING = (
    Setting(LLAMA, 33, size=1, groups=1, block=16, caching=False, small=False, dtype="float32"),
    Setting(LLAMA, 13, size=2, groups=1, block=16, caching=True, small=True),
    Setting(LLAMA, 2048, size=1, groups=2, block=256, caching=True, small=True, dtype="float32"),
    Setting(LLAMA, 16, size=2, groups=2, block=256, caching=False, small=False),
    Setting(MISTRAL, 33, size=2, groups=1, block=256, caching=False, small=True),
    Setting(MISTRAL, 13, size=1, groups=1, block=256, caching=True, small=False, dtype="float32"),
    Setting(MISTRAL, 2048, size=2, groups=2, block=16, caching=True, small=False),
    Setting(MISTRAL, 16, size=1, groups=2, block=16, caching=False, small=True, dtype="float32"),
    Setting(QWEN2, 33, size=1, groups=2, block=16, caching=True, small=False),
    Setting(QWEN2, 13, size=2, groups=2, block=16, caching=False, small=True, dtype="float32"),
    Setting(QWEN2, 2048, size=1, groups=1, block=256, caching=False, small=True),
    Setting(QWEN2, 16, size=2, groups=1, block=256, caching=True, small=False, dtype="float32"),
    Setting(QWEN3, 33, size=2, groups=2, block=256, caching=True, small=True, dtype="float32"),
    Setting(QWEN3, 13, size=1, groups=2, block=256, caching=False, small=False),
    Setting(QWEN3, 2048, size=2, groups=1, block=16, caching=False, small=False, dtype="float32"),
    Setting(QWEN3, 16, size=1, groups=1, block=16, caching=True, small=True),
)


def uncovered_pairs() -> set[tuple[tuple[str, object], tuple[str, object]]]:
    """Pairs of values of two different fields that no row of the table has together."""
    names = [field.name for field in fields(Setting)]
    values = {name: {getattr(setting, name) for setting in COVERING} for name in names}
    wanted = {((one, a), (other, b)) for one, other in combinations(names, 2) for a in values[one] for b in values[other]}
    return wanted - {
        ((one, getattr(setting, one)), (other, getattr(setting, other)))
        for setting in COVERING
        for one, other in combinations(names, 2)
    }


def open_setting(path: Path, setting: Setting, **options: Any) -> LLM:
    tokens = SMALL_POOL_TOKENS[setting.block] if setting.small else LARGE_POOL_TOKENS
    return open_llm(
        path, block=setting.block, blocks=tokens // setting.block, dtype=setting.dtype, size=setting.size,
        groups=setting.groups, max_num_batched_tokens=setting.budget, enable_prefix_caching=setting.caching, **options,
    )  # fmt: skip
