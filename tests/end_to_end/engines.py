"""How the tests open the engine in this process, ask it, and read what it says.

Imports the Python API and the layout of a block, so that a pool can be asked for in blocks.
"""

from pathlib import Path
from typing import Any

from deploy import LLM, SamplingParams
from deploy.doors.python.sources import Source
from deploy.frontend.outputs import RequestOutput
from kvcache.layout import FP8, BlockLayout
from workers.model.config.architectures import read_config

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
LLAMA, MISTRAL, QWEN2, QWEN3 = ARCHITECTURES
LARGE_POOL_TOKENS = 10_240


def kv_memory(path: Path, blocks: int, block: int, dtype: str = "float32", size: int = 1) -> int:
    """Bytes of each rank that hold exactly so many blocks."""
    shape = read_config(path).shard(0, size)
    return blocks * BlockLayout(block, shape.layers, shape.kv_heads, shape.head_dim, dtype).block_bytes


def open_llm(
    path: Path, *, block: int = 16, blocks: int | None = None, dtype: str = "float32", size: int = 1, **options: Any
) -> LLM:
    """An engine in this process that checks the scheduler's state after every event. blocks: of each group's pool."""
    kept = FP8 if options.get("kv_dtype") == "fp8" else dtype
    memory = kv_memory(path, blocks or LARGE_POOL_TOKENS // block, block, kept, size)
    asked: dict[str, Any] = {"local": True, "check_invariants": True, "seed": 0, "threads": 1}
    asked |= {"block_size": block, "kv_memory": memory, "dtype": dtype, "tensor_parallel_size": size}
    return LLM(path, **asked | options)


def run(llm: LLM, prompts: list[list[int]], params: SamplingParams | list[SamplingParams]) -> list[RequestOutput]:
    sources: list[Source] = list(prompts)
    return llm.generate(sources, params, progress=False)


def tokens(outputs: list[RequestOutput]) -> list[list[list[int]]]:
    """[prompt][choice] -> output token ids."""
    return [[choice.token_ids for choice in output.outputs] for output in outputs]


def greedy(max_tokens: int, **fields: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, **fields)
