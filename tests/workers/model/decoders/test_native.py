"""The decoder says what transformers says, alone and shared out, whole or in chunks."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.shared.checkpoints import LLAMA3_ROPE, generate_reference, load_reference, make_checkpoint
from tests.workers.decoding import Ranks, make_step

YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}
DYNAMIC_ROPE = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "llama-tied-llama3": ("LlamaForCausalLM", {"tied": True, "rope_parameters": LLAMA3_ROPE}),
    "llama-biases": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "llama-linear": ("LlamaForCausalLM", {"rope_parameters": LINEAR_ROPE}),
    "llama-dynamic": ("LlamaForCausalLM", {"rope_parameters": DYNAMIC_ROPE}),
    "mistral": ("MistralForCausalLM", {}),
    "mistral-multi-head": ("MistralForCausalLM", {"num_key_value_heads": 4}),
    "qwen2-tied": ("Qwen2ForCausalLM", {"tied": True}),
    "qwen2-yarn": ("Qwen2ForCausalLM", {"rope_parameters": YARN_ROPE}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 32}),
    "qwen3-tied-biases": ("Qwen3ForCausalLM", {"tied": True, "attention_bias": True}),
}
PROMPT = list(range(3, 60, 3))


@pytest.fixture(params=VARIANTS, scope="module")
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    architecture, fields = VARIANTS[request.param]
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), architecture, **fields)


@pytest.mark.few(5)
@pytest.mark.parametrize("size", [1, 2])
def test_greedy_tokens_equal_transformers(checkpoint: Path, size: int) -> None:
    with Ranks(checkpoint, size) as ranks:
        assert ranks.generate(PROMPT, 40) == generate_reference(checkpoint, PROMPT, 40)


def test_logits_equal_transformers(checkpoint: Path) -> None:
    with torch.inference_mode():
        expected = load_reference(checkpoint)(torch.tensor([PROMPT])).logits[0, -1]
    for size in (1, 2):
        with Ranks(checkpoint, size) as ranks:
            torch.testing.assert_close(ranks.logits(make_step([(0, 0, PROMPT)]))[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.few
@pytest.mark.parametrize("size", [2, 4])
def test_float64_does_not_depend_on_the_ranks(checkpoint: Path, size: int) -> None:
    step = make_step([(0, 0, PROMPT)])
    with Ranks(checkpoint, 1, torch.float64) as alone, Ranks(checkpoint, size, torch.float64) as shared:
        torch.testing.assert_close(shared.logits(step), alone.logits(step), rtol=1e-12, atol=1e-12)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("qwen3"), "Qwen3ForCausalLM")


def test_ragged_batch_equals_one_by_one(qwen3: Path) -> None:
    """Decodes and chunks of several sequences in one step, in float64: batching changes nothing but rounding."""
    prompts = [[7, 8, 9], list(range(20, 37)), list(range(100, 140)), [5] * 9]
    with Ranks(qwen3, 1, torch.float64) as ranks:
        expected = torch.cat([ranks.logits(make_step([(i, 0, p)])) for i, p in enumerate(prompts)])
    with Ranks(qwen3, 2, torch.float64) as ranks:
        ranks.logits(make_step([(0, 0, prompts[0][:-1]), (1, 0, prompts[1][:-1]), (2, 0, prompts[2][:11])]))
        step = make_step(
            [(0, 2, prompts[0][-1:]), (1, 16, prompts[1][-1:]), (2, 11, prompts[2][11:]), (3, 0, prompts[3])]
        )
        torch.testing.assert_close(ranks.logits(step), expected, rtol=1e-11, atol=1e-11)


def test_only_sampled_rows_get_logits(qwen3: Path) -> None:
    step = make_step([(0, 0, PROMPT)])
    with Ranks(qwen3, 2) as ranks:
        nothing = replace(step, sample_at=torch.empty(0, dtype=torch.int64))
        assert [local.shape for local in ranks.local_logits(nothing)] == [(0, 100), (0, 100)]
        several = replace(step, sample_at=torch.tensor([4, 2]))
        with torch.inference_mode():
            expected = load_reference(qwen3)(torch.tensor([PROMPT])).logits[0, [4, 2]]
        torch.testing.assert_close(ranks.logits(several), expected, rtol=1e-4, atol=1e-4)


def test_padding_is_never_sampled(qwen3: Path) -> None:
    with Ranks(qwen3, 4) as ranks:  # 199 tokens on 4 ranks: 50 each, one of them padding
        *full, last = ranks.local_logits(make_step([(0, 0, PROMPT)]))
        assert all(local.isfinite().all() for local in full)
        assert last[:, :49].isfinite().all()
        assert (last[:, 49:] == -torch.inf).all()


def test_kv_heads_are_replicated(qwen3: Path) -> None:
    with Ranks(qwen3, 4) as ranks:
        shapes = [decoder.shape for decoder in ranks.decoders]
        assert [(s.heads, s.kv_heads, s.kv_head_start) for s in shapes] == [(1, 1, 0), (1, 1, 0), (1, 1, 1), (1, 1, 1)]
        assert ranks.generate(PROMPT, 20) == generate_reference(qwen3, PROMPT, 20)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 2])
def test_narrow_dtypes(qwen3: Path, dtype: torch.dtype, size: int) -> None:
    step = make_step([(0, 0, PROMPT)])
    with Ranks(qwen3, 1) as exact, Ranks(qwen3, size, dtype) as narrow:
        logits = narrow.logits(step)
        assert logits.dtype == dtype
        expected = exact.logits(step)
        torch.testing.assert_close(logits.float(), expected, rtol=0, atol=0.15 * float(expected.std()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_gpu_equals_cpu(checkpoint: Path, dtype: torch.dtype, size: int) -> None:
    step = make_step([(0, 0, PROMPT)])
    with Ranks(checkpoint) as exact, Ranks(checkpoint, size, dtype, torch.device("cuda", 0)) as on_gpu:
        logits, expected = on_gpu.logits(step), exact.logits(step)
    assert logits.dtype == dtype
    share = 0.25 if dtype in (torch.bfloat16, torch.float16) else 1e-3
    torch.testing.assert_close(logits.float().cpu(), expected, rtol=0, atol=share * float(expected.std()))
