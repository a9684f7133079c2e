"""Weights that are kept in fewer bits stand for the same numbers as plain ones; FP8 is made while loading."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.shared.checkpoints import make_checkpoint
from tests.shared.quantising import (
    AWQ,
    FORMATS,
    FP8,
    GPTQ,
    Format,
    awq,
    compressed,
    fp8,
    gptq,
    of_floats,
    of_ints,
    packed,
    quantise,
)
from tests.workers.decoding import SEQUENCES, make_step
from tests.workers.model.gpu.test_fused import Fused
from workers.config import ReadingConfig
from workers.kernels.products import tilings
from workers.kernels.products.tilings import Tiling
from workers.kernels.reduced import rounded_rows
from workers.model.config.architectures import ModelConfig
from workers.model.config.fields import CheckpointError
from workers.model.config.quantization import WeightForm
from workers.model.decoders import native
from workers.model.decoders.native import Decoder, load_model
from workers.model.layers.linear import Linear
from workers.model.layers.mlp import SwiGLU
from workers.model.quantization.forms import PLAIN, LinearForm, kept_as
from workers.model.reading import read_model
from workers.model.sources.progress import Progress
from workers.parallel.silent import Silent
from workers.process.footprint import footprint

CPU = torch.device("cpu")
WIDE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "head_dim": 32, "vocab_size": 61}
KEPT = {
    "fp8-tensor": (FORMATS["fp8-tensor"], 8),
    "fp8-channel": (FORMATS["fp8-channel"], 8),
    "fp8-block": (Format(FP8 | {"weight_block_size": [48, 128]}, fp8((48, 128), "weight_scale_inv")), 8),
    "compressed-fp8-block": (
        Format(compressed("float-quantized", of_floats("block", block_structure=[32, 64])), fp8((32, 64))), 8,
    ),
    "awq": (Format(AWQ | {"group_size": 64}, awq(64)), 4),
    "gptq": (Format(GPTQ | {"bits": 4, "group_size": 128}, gptq(4, 128, symmetric=False, shift=1)), 4),
    "compressed-w4": (
        Format(compressed("pack-quantized", of_ints(4, 32, symmetric=True)), packed(4, 32, symmetric=True)), 4,
    ),
}  # fmt: skip


def loaded(path: Path, rank: int = 0, size: int = 1, quantization: str = "auto", progress: Progress | None = None) -> Decoder:
    config = read_model(path, ReadingConfig(model_implementation="native", quantization=quantization))
    assert isinstance(config, ModelConfig)
    return load_model(path, config, Silent(size, rank), torch.float32, CPU, None, progress)


def linears(model: Decoder) -> list[Linear]:
    """Of the first layer: QKV, O, gate and up, down."""
    layer = model.layers[0]
    assert isinstance(layer.mlp, SwiGLU)
    return [layer.qkv, layer.o, layer.mlp.gate_up, layer.mlp.down]


def numbers(model: Decoder) -> list[Tensor]:
    """Of every linear layer, whatever it is kept as."""
    found = [linear.operand for linear in linears(model)]
    return [each if isinstance(each, Tensor) else each.numbers(torch.float32) for each in found]


@pytest.fixture(autouse=True)
def _unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.model.layers.linear.can_pack", lambda *_: False)


@pytest.fixture
def keeping(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Whether the device is as one that has kernels for fewer bits."""
    return lambda keeps: monkeypatch.setattr(native, "keeps_fewer_bits", lambda _: keeps)


@pytest.mark.parametrize("name", KEPT)
def test_the_same_numbers(
    name: str, tmp_path: Path, keeping: Callable[[bool], None], caplog: pytest.LogCaptureFixture
) -> None:
    chosen, bits = KEPT[name]
    plain = make_checkpoint(tmp_path / "plain", "Qwen3ForCausalLM", **WIDE)
    path = tmp_path / "quantised"
    quantise(plain, path, chosen)
    caplog.set_level("INFO", "workers.model.decoders.native")
    for rank, size in ((0, 1), (1, 2)):
        keeping(True)
        kept = loaded(path, rank, size)
        kinds = [linear.reduced and linear.reduced.bits for linear in linears(kept)]
        divided = size == 1 or name not in ("gptq", "fp8-block")  # else a rank has half of a group's columns in the third
        assert kinds == [bits, bits if divided else None, bits, bits]
        keeping(False)
        for ours, expected in zip(numbers(kept), numbers(loaded(path, rank, size)), strict=True):
            assert torch.equal(ours, expected)
    method, kind = chosen.config["quant_method"], "FP8" if bits == 8 else "int4"
    assert [record.getMessage() for record in caplog.records] == [
        f"quantised weights: {method} ({kind}), {kind} kept as {how}" for how in ("they are", "plain numbers")
    ]


def test_a_layer_that_is_stored_plain_stays_plain(tmp_path: Path, keeping: Callable[[bool], None]) -> None:
    plain = make_checkpoint(tmp_path / "plain", "Qwen3ForCausalLM", **WIDE)
    some = ("q_proj.weight", "down_proj.weight")
    quantise(plain, tmp_path / "quantised", FORMATS["fp8-channel"], lambda name: name.endswith(some))
    keeping(True)
    whole = [linear.reduced is None for linear in linears(loaded(tmp_path / "quantised"))]
    assert whole == [True, True, True, False]


def test_fp8_is_made_while_loading(tmp_path: Path, keeping: Callable[[bool], None]) -> None:
    path = make_checkpoint(tmp_path / "plain", "Qwen3ForCausalLM", **WIDE)
    stored = load_file(path / "model.safetensors")
    expected = torch.cat([stored[f"model.layers.0.mlp.{name}_proj.weight"] for name in ("gate", "up")])
    values, scales = rounded_rows(expected)
    keeping(False)
    rounded = linears(loaded(path, quantization="fp8"))[2].weight
    assert rounded is not None
    assert torch.equal(rounded, values.float() * scales)
    assert 0.01 < float((rounded - expected).norm() / expected.norm()) < 0.03
    keeping(True)
    kept = loaded(path, quantization="fp8")
    reduced = linears(kept)[2].reduced
    assert reduced is not None
    assert reduced.values.dtype == torch.float8_e4m3fn
    assert torch.equal(reduced.numbers(torch.float32), rounded)
    assert torch.equal(kept.outer.embedding.weight, stored["model.embed_tokens.weight"])


@pytest.mark.parametrize(("quantization", "name"), [("fp8", "awq"), ("awq", "fp8-channel"), ("gptq", None)])
def test_what_the_weights_are_not(quantization: str, name: str | None, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "plain", "Qwen3ForCausalLM", **WIDE)
    if name is not None:
        quantise(path, tmp_path / "quantised", FORMATS[name])
        path = tmp_path / "quantised"
    with pytest.raises(CheckpointError, match=f"quantization='{quantization}' was asked for, but the weights are .* at auto"):
        read_model(path, ReadingConfig(quantization=quantization))


def test_transformers_classes_have_no_fp8_made(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "plain", "Qwen3ForCausalLM", **WIDE)
    with pytest.raises(CheckpointError, match="transformers' own class, for which no FP8 is made"):
        read_model(path, ReadingConfig(model_implementation="transformers", quantization="fp8"))


@pytest.mark.parametrize(
    ("stored", "columns", "form"),
    [
        (WeightForm("fp8", free=True), 4096, LinearForm(8)),
        (WeightForm("fp8", block=(128, 128)), 4096, LinearForm(8, 128)),
        (WeightForm("fp8", block=(128, 128)), 4160, PLAIN),
        (WeightForm("fp8", block=(128, 256)), 4096, PLAIN),
        (WeightForm("awq", 4, (1, 128), zeros=True), 4096, LinearForm(4, 128, torch.float16)),
        (WeightForm("gptq", 4, (1, 128), zeros=True, mixed=True), 4096, PLAIN),
        (WeightForm("gptq", 8, (1, 128), zeros=True), 4096, PLAIN),
        (WeightForm("packed", 4, (1, None)), 4096, PLAIN),
        (WeightForm("int8", block=(1, None)), 4096, PLAIN),
        (WeightForm("mxfp4", 4, (1, 32)), 2880, LinearForm(4, 32, torch.float8_e8m0fnu)),
        (WeightForm("mxfp4", 4, (1, 32)), 720, PLAIN),
    ],
)
def test_what_is_kept(stored: WeightForm, columns: int, form: LinearForm) -> None:
    assert kept_as(stored, columns) == form


@pytest.mark.parametrize("name", ["fp8-block", "awq"])
def test_a_plan_knows_the_bytes(name: str, tmp_path: Path, keeping: Callable[[bool], None]) -> None:
    plain = make_checkpoint(tmp_path / "plain", "Qwen3ForCausalLM", **WIDE)
    quantise(plain, tmp_path / "quantised", KEPT[name][0])
    for keeps in (False, True):
        keeping(keeps)
        read: list[int] = []
        config = read_model(tmp_path / "quantised")

        def progress(_: int, total: int, to: list[int] = read) -> None:
            to.append(total)

        loaded(tmp_path / "quantised", progress=progress)
        assert footprint(config, 1, torch.float32, 16, keeps=keeps).weight_bytes == read[-1]


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["fp8-block", "awq"])
def test_fused_steps_read_what_is_kept(
    name: str, tmp_path: Path, keeping: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few tokens by the kernels, which widen weights as they stream; and many, whose products are the linear layer's."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("on a GPU activations are rounded too: tests/gpu/test_fewer_bits.py")
    plain = make_checkpoint(tmp_path / "plain", "LlamaForCausalLM", attention_bias=True, mlp_bias=True, **WIDE)
    quantise(plain, tmp_path / "quantised", KEPT[name][0])
    keeping(True)
    kept = Fused(tmp_path / "quantised", torch.float32)
    keeping(False)
    expected = Fused(tmp_path / "quantised", torch.float32)
    chosen: list[int] = []

    def choose(n: int, k: int, tokens: int, dtype: torch.dtype, swiglu: bool, bits: int) -> Tiling | None:
        chosen.append(bits)
        return tilings.choose(n, k, tokens, dtype, swiglu, bits)

    monkeypatch.setattr("workers.model.gpu.fused.choose", choose)
    kept.fused._few_tokens = SEQUENCES
    for chunks in [[(0, 0, [9]), (1, 0, [3])], [(0, 1, [20, 21, 22])]]:
        step = make_step(chunks)
        decodes = len(chunks) == step.tokens.shape[0]
        ours, theirs = (each.logits(step, all_tokens=decodes) for each in (kept, expected))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * float(theirs.std()))
    bits = KEPT[name][1]
    assert chosen == [bits, bits, bits, bits, 16]  # of the decodes: the layer's four, and the head
