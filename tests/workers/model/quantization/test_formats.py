"""Every format becomes the numbers that it stands for, whole and in any part of it."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.shared.checkpoints import generate_reference, make_checkpoint
from tests.shared.quantising import FORMATS, is_quantised, quantise
from tests.workers.decoding import Ranks
from workers.model.checkpoint import weights
from workers.model.checkpoint.weights import Checkpoint, Piece
from workers.model.config.architectures import read_config
from workers.model.quantization import stored

PROMPT = [5, 6, 7]


def both(tmp_path: Path, name: str) -> tuple[Path, Path]:
    """The plain checkpoint and the quantised one that stands for the same numbers."""
    plain = make_checkpoint(tmp_path / "plain", "Qwen3ForCausalLM", attention_bias=name == "gptq-sym")
    quantise(plain, tmp_path / "quantised", FORMATS[name])
    return plain, tmp_path / "quantised"


@pytest.mark.parametrize("name", FORMATS)
def test_parts_anywhere(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows and of columns, at no border of a block, a group or a word."""
    monkeypatch.setattr(stored, "NUMBERS_AT_ONCE", 300)
    plain, quantised = both(tmp_path, name)
    expected = load_file(plain / "model.safetensors")
    with Checkpoint(quantised, read_config(quantised).scheme) as checkpoint:
        assert set(checkpoint.names()) - set(expected) <= {each for each in checkpoint.names() if each.endswith("_proj.bias")}
        for each in filter(is_quantised, expected):
            whole = expected[each]
            assert checkpoint.shape(each) == whole.shape
            for dim in (0, 1):
                for start, stop in pairwise((0, 3, 21, whole.shape[dim])):
                    part = whole.narrow(dim, start, stop - start)
                    target = torch.full_like(part, torch.nan)
                    checkpoint._fill(Piece(target, each, tuple(whole.shape), start, dim))
                    assert torch.equal(target, part), (each, dim, start, stop)


@pytest.mark.few(8)
@pytest.mark.parametrize("name", FORMATS)
def test_served_by_one_rank_and_by_two(name: str, tmp_path: Path) -> None:
    plain, quantised = both(tmp_path, name)
    with Ranks(plain) as ranks:
        expected = ranks.generate(PROMPT, 12)
    for size in (1, 2):
        with Ranks(quantised, size) as ranks:
            assert ranks.generate(PROMPT, 12) == expected


def test_a_head_may_be_quantised(tmp_path: Path) -> None:
    plain = make_checkpoint(tmp_path / "plain", "LlamaForCausalLM", vocab_size=200)
    quantise(plain, tmp_path / "quantised", FORMATS["gptq-v2"], lambda name: is_quantised(name) or name == "lm_head.weight")
    expected = generate_reference(plain, PROMPT, 12)
    for size in (1, 2):
        with Ranks(tmp_path / "quantised", size) as ranks:
            assert ranks.generate(PROMPT, 12) == expected


def test_the_type_that_most_of_the_rest_is_stored_in(tmp_path: Path) -> None:
    plain = make_checkpoint(tmp_path / "plain", "Qwen3ForCausalLM", dtype=torch.float16)
    quantise(plain, tmp_path / "quantised", FORMATS["fp8-channel"])
    numbers = sum(tensor.numel() for tensor in load_file(plain / "model.safetensors").values())
    with Checkpoint(tmp_path / "quantised", read_config(tmp_path / "quantised").scheme) as checkpoint:
        assert checkpoint.stored() == weights.StoredNumbers(torch.float16, numbers)
