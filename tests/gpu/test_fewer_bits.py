"""Weights that a GPU keeps in FP8 or four bits, in whole steps and graphs: in float32 its tokens are those of plain ones.

Nothing is rounded in float32 but what was stored, so the same numbers are multiplied on both.
"""

from pathlib import Path

import pytest
import torch

from deploy import LLM
from tests.end_to_end.engines import LLAMA, QWEN3, greedy, open_llm, run, tokens
from tests.end_to_end.prompts import OUTPUTS, PROMPTS
from tests.end_to_end.reference import Ledger, Reference
from tests.gpu.works import DEVICE, GPU
from tests.shared.checkpoints import make_checkpoint
from tests.shared.quantising import AWQ, FORMATS, FP8, GPTQ, Format, awq, fp8, gptq, quantise
from workers.model.quantization.forms import keeps_fewer_bits

pytestmark = GPU

WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
KEPT = {
    "fp8-channel": FORMATS["fp8-channel"],
    "fp8-block": Format(FP8 | {"weight_block_size": [128, 128]}, fp8((128, 128), "weight_scale_inv")),
    "awq": Format(AWQ | {"group_size": 128}, awq(128)),
    "gptq": Format(GPTQ | {"bits": 4, "group_size": 32}, gptq(4, 32, symmetric=False, shift=1)),
    "compressed-w4": FORMATS["compressed-w4-asym"],
}
LENGTHS = [2 * count for count in OUTPUTS]


def outputs(llm: LLM) -> list[list[list[int]]]:
    return tokens(run(llm, PROMPTS, [greedy(count) for count in LENGTHS]))


@pytest.fixture(autouse=True)
def _has_fp8() -> None:
    if not keeps_fewer_bits(torch.device(DEVICE)):
        pytest.skip("a GPU without FP8 has plain weights")


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_tokens_are_those_of_the_numbers_that_they_stand_for(name: str, cuda_graphs: bool, tmp_path: Path) -> None:
    plain = make_checkpoint(tmp_path / "plain", LLAMA, attention_bias=True, mlp_bias=True, **WIDE)  # type: ignore[arg-type]
    quantise(plain, tmp_path / "quantised", KEPT[name])
    reference, ledger = Reference(plain), Ledger()
    with open_llm(tmp_path / "quantised", device=DEVICE, cuda_graphs=cuda_graphs, max_num_batched_tokens=512) as llm:
        for prompt, [output] in zip(PROMPTS, outputs(llm), strict=True):
            reference.require_same(prompt, output, ledger, name)
    ledger.require_rare()


def test_fp8_that_is_made_while_loading(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, QWEN3, **WIDE)  # type: ignore[arg-type]
    found = []
    for device in ("cpu", DEVICE):
        with open_llm(path, device=device, quantization="fp8") as llm:
            found.append(outputs(llm))
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["fp8-channel", "fp8-block", "awq"])
def test_in_bfloat16_prompts_are_as_likely(name: str, tmp_path: Path) -> None:
    """Where activations are rounded to FP8 too."""
    plain = make_checkpoint(tmp_path / "plain", QWEN3, sharp=False, **WIDE)  # type: ignore[arg-type]
    quantise(plain, tmp_path / "quantised", KEPT[name])
    measured = [greedy(1, prompt_logprobs=0) for _ in PROMPTS]
    likelihoods = []
    for device, dtype in (("cpu", "float32"), (DEVICE, "bfloat16")):
        with open_llm(tmp_path / "quantised", device=device, dtype=dtype) as llm:
            found = run(llm, PROMPTS, measured)
        entries = [entry for output in found for entry in (output.prompt_logprobs or [])[1:]]
        likelihoods.append(torch.tensor([next(iter(entry.values())).logprob for entry in entries if entry is not None]))
    assert float((likelihoods[0] - likelihoods[1]).abs().mean()) < 0.02
