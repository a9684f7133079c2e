"""Adapters that PEFT has made and saved give PEFT's own output, where it is installed."""

from pathlib import Path
from typing import Any

import pytest
import torch

from deploy.doors.python.sources import Source
from tests.end_to_end.engines import greedy, open_llm
from tests.shared.checkpoints import load_reference, make_checkpoint

peft = pytest.importorskip("peft")

TOKENS = 12
PROMPTS = [list(range(first, first + 20)) for first in range(1, 4)]
KINDS: dict[str, dict[str, Any]] = {
    "every linear layer": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
    "rank-stabilised": {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]},
    "patterns": {
        "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "k_proj", "o_proj", "down_proj"],
        "rank_pattern": {"q_proj": 16, "layers.1.self_attn.k_proj": 3},
        "alpha_pattern": {"down_proj": 4, "^model.layers.0.*o_proj": 3},
    },
    "one layer": {"r": 8, "lora_alpha": 16, "target_modules": r".*layers\.1\..*(gate|up)_proj"},
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("peft") / "base")


def save(kind: str, checkpoint: Path, folder: Path) -> None:
    model = peft.get_peft_model(load_reference(checkpoint), peft.LoraConfig(**KINDS[kind]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        for name, weight in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(weight, 0.0, weight.shape[1] ** -0.5)
    model.save_pretrained(folder)


def answers(checkpoint: Path, folder: Path) -> list[tuple[list[int], float]]:
    """PEFT's own: tokens, and the log-probability of the first."""
    model, told = peft.PeftModel.from_pretrained(load_reference(checkpoint), folder).eval(), []
    model.generation_config.eos_token_id = None
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False, pad_token_id=0
        )
        with torch.inference_mode():
            likeliest = torch.log_softmax(model(input_ids=ids).logits[0, -1].double(), -1).max()
        told.append((out[0, len(prompt) :].tolist(), float(likeliest)))
    return told


@pytest.mark.parametrize("size", [1, 2])
def test_adapters_of_peft_give_peft_s_own_output(size: int, checkpoint: Path, tmp_path: Path) -> None:
    for number, kind in enumerate(KINDS):
        save(kind, checkpoint, tmp_path / str(number))
    named = {kind: str(tmp_path / str(number)) for number, kind in enumerate(KINDS)}
    with open_llm(checkpoint, size=size, lora=named, max_loras=2) as llm:
        sources: list[Source] = [{"prompt_token_ids": prompt, "lora": kind} for kind in KINDS for prompt in PROMPTS]
        outputs = llm.generate(sources, greedy(TOKENS, logprobs=0), progress=False)
    expected = [answer for folder in named.values() for answer in answers(checkpoint, Path(folder))]
    for output, (tokens, likeliest) in zip(outputs, expected, strict=True):
        choice = output.outputs[0]
        assert choice.token_ids == tokens
        assert choice.logprobs is not None
        assert choice.logprobs[0][tokens[0]].logprob == pytest.approx(likeliest, abs=1e-5)
