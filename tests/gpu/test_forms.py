"""Windows, chunks, soft caps, sinks and scales on a GPU: the tokens of transformers, by its classes and by our own layers."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.models.compare import WORK, block_bytes
from benchmarks.models.compare import Setting as Size
from benchmarks.models.zoo import make
from deploy import LLM, SamplingParams
from tests.end_to_end.reference import Ledger, Reference
from tests.gpu.works import DEVICE, GPU

pytestmark = GPU

KINDS: dict[str, dict[str, Any]] = {
    "gemma2": {"head_dim": 64},
    "gemma3_text": {"head_dim": 256},
    "gemma4_text": {"head_dim": 32, "global_head_dim": 64},
    "llama4_text": {"head_dim": 64},
    "phi3": {"head_dim": 96},
    "mistral": {"head_dim": 128},
    "qwen3": {"use_sliding_window": True, "sliding_window": 40, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt_oss": {"head_dim": 64},
}
"""By model type: what departs from the zoo's own sizes. The last three are served by our own layers."""

BLOCKS = {16: 30, 256: 5}
"""Some sequences are preempted; one block is for padding."""


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("kind", KINDS)
def test_same_tokens(kind: str, block: int, graphs: bool, tmp_path: Path) -> None:
    """Twice, so that the second time prefixes are hit; chunks of 48 tokens end within windows."""
    path = make(kind, tmp_path / kind, **KINDS[kind])
    reference, ledger = Reference(path), Ledger()
    params = [SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True) for _, count in WORK]
    with LLM(
        path, local=True, device=DEVICE, check_invariants=True, seed=0, dtype="float32", block_size=block, max_model_len=320,
        kv_memory=BLOCKS[block] * block_bytes(path, Size(1, block)), max_num_batched_tokens=48, cuda_graphs=graphs,
    ) as llm:  # fmt: skip
        for turn in range(2):
            outputs = llm.generate([prompt for prompt, _ in WORK], params, progress=False)
            for (prompt, count), output in zip(WORK, outputs, strict=True):
                assert len(output.outputs[0].token_ids) == count
                reference.require_same(prompt, output.outputs[0].token_ids, ledger, f"{kind}, turn {turn}")
        assert llm.stats().cached_tokens > 0
    ledger.require_rare()
