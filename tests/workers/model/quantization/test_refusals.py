"""Quantised numbers without what gives them their meaning, or with what contradicts it, are refused by name."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.models.zoo import make
from tests.shared.checkpoints import make_checkpoint
from tests.shared.quantising import FORMATS, MXFP4, is_stack, quantise
from tests.workers.decoding import Ranks
from workers.model.checkpoint.weights import Checkpoint
from workers.model.config.fields import CheckpointError
from workers.model.reading import read_model

MODULE = "model.layers.1.mlp.up_proj"
Tensors = dict[str, Tensor]


def quantised(tmp_path: Path, name: str, change: Callable[[Tensors], object]) -> Path:
    plain = make_checkpoint(tmp_path / "plain", "LlamaForCausalLM")
    quantise(plain, tmp_path / "quantised", FORMATS[name])
    return changed(tmp_path / "quantised", change)


def changed(path: Path, change: Callable[[Tensors], object]) -> Path:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def cut(part: str) -> Callable[[Tensors], None]:
    """Without the last of its numbers."""

    def change(tensors: Tensors) -> None:
        whole = tensors[f"{MODULE}.{part}"]
        tensors[f"{MODULE}.{part}"] = whole[:-1].clone()

    return change


def as_type(part: str, dtype: torch.dtype) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[f"{MODULE}.{part}"] = tensors[f"{MODULE}.{part}"].to(dtype)

    return change


def widen(tensors: Tensors) -> None:
    """As if nothing was quantised, but for the scale."""
    tensors[f"{MODULE}.weight"] = tensors[f"{MODULE}.weight"].float()


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("fp8-tensor", lambda t: t.pop(f"{MODULE}.weight_scale"), rf"{MODULE}\.weight in .* is stored as F8_E4M3: config.json"),
        ("fp8-block", lambda t: t.pop(f"{MODULE}.weight_scale_inv"), rf"{MODULE}\.weight in .* is stored as F8_E4M3"),
        ("fp8-channel", cut("weight_scale"), rf"{MODULE}\.weight_scale has shape \[95, 1\], .* asks for \[1, 1\] of a weight"),
        ("fp8-block", cut("weight_scale_inv"), rf"{MODULE}\.weight_scale_inv has shape \[5, 2\], .* asks for \[6, 2\]"),
        ("fp8-channel", widen, f"does not read: {MODULE}.weight_scale"),
        ("compressed-int8", lambda t: t.pop(f"{MODULE}.weight_scale"), rf"{MODULE}\.weight in .* is stored as I8"),
        ("compressed-w4-asym", lambda t: t.pop(f"{MODULE}.weight_zero_point"), rf"{MODULE}\.weight_zero_point is missing"),
        ("compressed-w4-sym", lambda t: t.pop(f"{MODULE}.weight_scale"), rf"{MODULE}\.weight_scale is missing"),
        ("compressed-w4-sym", cut("weight_packed"), rf"{MODULE}\.weight_packed has shape \[95, 8\], .* asks for \[96, 8\]"),
        ("awq", cut("scales"), rf"{MODULE}\.scales has shape \[1, 96\], .* asks for \[2, 96\]"),
        ("awq", lambda t: t.pop(f"{MODULE}.qzeros"), rf"{MODULE}\.qzeros is missing"),
        ("gptq-asym", cut("g_idx"), rf"{MODULE}\.g_idx has shape \[63\], .* asks for \[64\]"),
        ("gptq-asym", lambda t: t[f"{MODULE}.bias"].fill_(0.5), f"does not read: {MODULE}.bias"),
        ("fp8-channel", as_type("weight_scale", torch.uint8), rf"{MODULE}\.weight_scale is stored as U8, and not as F32"),
        ("awq", as_type("qweight", torch.int64), rf"{MODULE}\.qweight is stored as I64, and not as I32"),
        ("gptq-asym", lambda t: t.update({f"{MODULE}.weight": torch.ones(96, 64)}), f"{MODULE}.weight is there twice"),
    ],
)
def test_parts(name: str, change: Callable[[Tensors], object], said: str, tmp_path: Path) -> None:
    path = quantised(tmp_path, name, change)
    with pytest.raises(CheckpointError, match=said):
        Ranks(path)


@pytest.mark.parametrize("name", ["fp8-block", "awq", "gptq-sym", "compressed-w4-sym", "compressed-int8"])
def test_without_a_word_in_config_json(name: str, tmp_path: Path) -> None:
    path = quantised(tmp_path, name, lambda _: None)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key != "quantization_config"}))
    with pytest.raises(CheckpointError, match=r"config\.json does not say how|does not read|is missing"):
        Ranks(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(next(name for name in t if name.endswith("_scales"))), "_scales is missing, without which"),
        (lambda t: t.update({name: t[name][:, :-1].clone() for name in t if name.endswith("_scales")}), "no blocks of 32"),
    ],
)
def test_stacks(change: Callable[[Tensors], object], said: str, tmp_path: Path) -> None:
    plain = make("gpt_oss", tmp_path / "plain")
    quantise(plain, tmp_path / "quantised", MXFP4, is_stack)
    path = changed(tmp_path / "quantised", change)
    with pytest.raises(CheckpointError, match=said):
        Checkpoint(path, read_model(path).scheme)
