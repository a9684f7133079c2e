"""Adapters that PEFT has made and saved give PEFT's own output, where it is installed: of linear layers, of experts in stacks
and one by one, and of routers."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.models.zoo import make
from deploy.doors.python.sources import Source
from tests.end_to_end.engines import greedy, open_llm
from tests.shared.adapters import OF_EXPERTS, make_adapter
from tests.shared.checkpoints import load_reference, make_checkpoint

peft = pytest.importorskip("peft")

TOKENS = 12
PROMPTS = [list(range(first, first + 20)) for first in range(1, 4)]
LINEAR: dict[str, dict[str, Any]] = {
    "every linear layer": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
    "rank-stabilised": {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]},
    "patterns": {
        "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "k_proj", "o_proj", "down_proj"],
        "rank_pattern": {"q_proj": 16, "layers.1.self_attn.k_proj": 3},
        "alpha_pattern": {"down_proj": 4, "^model.layers.0.*o_proj": 3},
    },
    "one layer": {"r": 8, "lora_alpha": 16, "target_modules": r".*layers\.1\..*(gate|up)_proj"},
}  # fmt: skip
EXPERTS: dict[str, dict[str, Any]] = {
    "all-linear": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
    "stacks": {
        "r": 4, "lora_alpha": 8, "target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        "rank_pattern": {"experts.down_proj": 3}, "alpha_pattern": {"layers.1.mlp.experts.gate_up_proj": 3},
    },
    "rank-stabilised": {
        "r": 3, "lora_alpha": 3, "use_rslora": True, "target_modules": ["q_proj"],
        "target_parameters": ["experts.gate_up_proj"],
    },
    "one layer": {
        "r": 4, "lora_alpha": 8, "target_modules": ["v_proj"], "target_parameters": ["layers.1.mlp.experts.down_proj"],
    },
    "router": {"r": 4, "lora_alpha": 8, "target_modules": [], "target_parameters": ["gate.weight", "router.weight"]},
}  # fmt: skip
FAMILIES = "qwen3_moe", "qwen2_moe", "mixtral", "gpt_oss"
CONVERTED = "qwen3_moe", "mixtral"
"""Of which PEFT takes adapters of single experts as well."""


def save(how: dict[str, Any], checkpoint: Path, folder: Path) -> Path:
    model = peft.get_peft_model(load_reference(checkpoint), peft.LoraConfig(**how))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        for name, weight in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(weight, 0.0, weight.shape[1] ** -0.5)
    model.save_pretrained(folder)
    return folder


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


def require_same(checkpoint: Path, folders: Iterable[Path], size: int, **options: Any) -> None:
    """Of all of them in one batch, with two places."""
    named = {folder.name: str(folder) for folder in folders}
    with open_llm(checkpoint, size=size, lora=named, max_loras=2, lora_experts=True, **options) as llm:
        sources: list[Source] = [{"prompt_token_ids": prompt, "lora": name} for name in named for prompt in PROMPTS]
        outputs = llm.generate(sources, greedy(TOKENS, logprobs=0), progress=False)
    expected = [answer for folder in named.values() for answer in answers(checkpoint, Path(folder))]
    for output, (tokens, likeliest) in zip(outputs, expected, strict=True):
        choice = output.outputs[0]
        assert choice.token_ids == tokens
        assert choice.logprobs is not None
        assert choice.logprobs[0][tokens[0]].logprob == pytest.approx(likeliest, abs=1e-5)


@pytest.mark.parametrize("size", [1, 2])
def test_adapters_of_peft_give_peft_s_own_output(size: int, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "base")
    require_same(checkpoint, [save(how, checkpoint, tmp_path / kind) for kind, how in LINEAR.items()], size)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_of_experts_give_peft_s_own_output(family: str, tmp_path: Path) -> None:
    checkpoint = make(family, tmp_path / "base")
    folders = [save(how, checkpoint, tmp_path / kind) for kind, how in EXPERTS.items()]
    if family in CONVERTED:
        folders.append(make_adapter(tmp_path / "one by one", checkpoint, targets=OF_EXPERTS, lora_dropout=0.0))
    for size, options in ((1, {}), (2, {}), (2, {"enable_expert_parallel": True})):
        require_same(checkpoint, folders, size, **options)
