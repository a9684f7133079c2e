"""Quantised checkpoints of transformers' classes: experts one by one and in stacks, matrices that hold several."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.models.zoo import make
from tests.shared.checkpoints import load_reference
from tests.shared.quantising import FORMATS, MXFP4, Format, is_quantised, is_stack, quantise
from tests.workers.decoding import make_step
from tests.workers.model.transformers.ranks import Ranks
from workers.model.checkpoint.weights import Checkpoint, Piece
from workers.model.quantization import stored
from workers.model.reading import read_model

PROMPT = [(7 * n + 3) % 199 for n in range(40)]
STEP = make_step([(0, 0, PROMPT)])


def is_expert_of_mixtral(name: str) -> bool:
    return name.endswith((".w1.weight", ".w2.weight", ".w3.weight"))


@pytest.mark.parametrize(
    ("kind", "chosen", "sizes", "wanted"),
    [
        ("gpt_oss", MXFP4, (1,), is_stack),
        ("qwen3_moe", FORMATS["fp8-block"], (1, 2), is_quantised),
        ("mixtral", FORMATS["compressed-w4-asym"], (1, 2), is_expert_of_mixtral),
        ("phi3", FORMATS["gptq-order"], (1, 2), is_quantised),
        ("gemma2", FORMATS["awq"], (1, 2), is_quantised),
    ],
)
@torch.inference_mode()
def test_the_same_as_of_the_numbers_that_it_stands_for(
    kind: str, chosen: Format, sizes: tuple[int, ...], wanted: Callable[[str], bool], tmp_path: Path
) -> None:
    plain = make(kind, tmp_path / "plain")
    quantise(plain, tmp_path / "quantised", chosen, wanted)
    expected: Tensor = load_reference(plain)(torch.tensor([PROMPT])).logits[:, -1]
    for size in sizes:
        with Ranks(tmp_path / "quantised", size) as ranks:
            torch.testing.assert_close(ranks.logits(STEP), expected, rtol=0, atol=2e-4 * float(expected.std()))


def test_parts_of_a_stack_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "NUMBERS_AT_ONCE", 300)
    plain = make("gpt_oss", tmp_path / "plain")
    quantise(plain, tmp_path / "quantised", MXFP4, is_stack)
    expected = load_file(plain / "model.safetensors")
    with Checkpoint(tmp_path / "quantised", read_model(tmp_path / "quantised").scheme) as checkpoint:
        assert set(checkpoint.names()) == set(expected)
        for name in filter(is_stack, expected):
            for dim, (start, stop) in ((0, (1, 3)), (1, (5, 41)), (2, (33, 47))):
                part = expected[name].narrow(dim, start, stop - start)
                target = torch.full_like(part, torch.nan)
                checkpoint._fill(Piece(target, name, tuple(expected[name].shape), start, dim))
                assert torch.equal(target, part), (name, dim)
