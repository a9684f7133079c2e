"""What config.json says of quantised weights is read, or refused by the name of the field that is not computed."""

from pathlib import Path
from typing import Any

import pytest

from tests.shared.quantising import AWQ, FORMATS, FP8, GPTQ, compressed, of_floats, of_ints
from workers.model.config.fields import CheckpointError, Fields
from workers.model.config.quantization import Scheme, WeightForm, read_scheme

PROJ = "model.layers.0.mlp.down_proj"


def read(config: dict[str, Any], name: str = "quantization_config") -> Scheme:
    scheme = read_scheme(Fields({name: config}, Path("config.json")))
    assert scheme is not None
    return scheme


def test_plain_weights() -> None:
    assert read_scheme(Fields({"quantization_config": {}, "hidden_size": 64}, Path("config.json"))) is None


@pytest.mark.parametrize(
    ("name", "form", "words"),
    [
        ("fp8-tensor", WeightForm("fp8", free=True), "fp8 (FP8)"),
        ("fp8-block", WeightForm("fp8", block=(16, 40)), "fp8 (FP8)"),
        ("compressed-fp8-channel", WeightForm("fp8", block=(1, None)), "compressed-tensors (FP8)"),
        ("compressed-w4-asym", WeightForm("packed", 4, (1, 32), zeros=True), "compressed-tensors (int4)"),
        ("awq", WeightForm("awq", 4, (1, 32), zeros=True), "awq (int4)"),
        ("gptq-v2", WeightForm("gptq", 4, (1, 32), zeros=True), "gptq (int4)"),
        ("gptq-8", WeightForm("gptq", 8, (1, None), zeros=True, shift=1), "gptq (int8)"),
    ],
)
def test_what_it_says(name: str, form: WeightForm, words: str) -> None:
    scheme = read(FORMATS[name].config)
    assert scheme.form(PROJ) == form
    assert str(scheme) == words


def test_the_name_of_older_files() -> None:
    assert read(FORMATS["compressed-w8"].config, "compression_config").method == "compressed-tensors"


def with_weights(weights: dict[str, Any], stored: str = "float-quantized", **fields: Any) -> dict[str, Any]:
    return compressed(stored, weights, **fields)


def with_activations(**activations: Any) -> dict[str, Any]:
    config = compressed("float-quantized", of_floats("channel"))
    config["config_groups"]["group_0"]["input_activations"] = activations
    return config


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quant_method='bitsandbytes'"),
        ({"quant_method": None}, "quant_method=None"),
        ({"quant_method": ["fp8"]}, r"quant_method=\['fp8'\]"),
        (FP8 | {"activation_scheme": "blockwise"}, "activation_scheme='blockwise'"),
        (FP8 | {"fmt": "e5m2"}, "fmt='e5m2'"),
        (FP8 | {"weight_block_size": [128]}, r"weight_block_size=\[128\]"),
        (FP8 | {"modules_to_not_convert": "lm_head"}, "modules_to_not_convert='lm_head'"),
        (AWQ | {"bits": 3}, "bits=3"),
        (AWQ | {"bits": 8}, "bits=8"),
        (AWQ | {"version": "gemv"}, "version='gemv'"),
        (AWQ | {"zero_point": False}, "zero_point=False"),
        (AWQ | {"group_size": 0}, "group_size=0"),
        (GPTQ | {"bits": 2}, "bits=2"),
        (GPTQ | {"bits": True}, "bits=True"),
        (GPTQ | {"bits": 4, "checkpoint_format": "marlin"}, "checkpoint_format='marlin'"),
        (GPTQ | {"bits": 4, "dynamic": {"-:.*down.*": {}}}, "dynamic="),
        (GPTQ | {"bits": 4, "pack_dtype": "int64"}, "pack_dtype='int64'"),
        (GPTQ | {"bits": 4, "is_marlin_format": True}, "is_marlin_format=True"),
        (GPTQ | {"bits": 4, "rotation": "hadamard"}, "rotation='hadamard'"),
        (with_weights(of_floats("tensor_group"), "nvfp4-pack-quantized"), "format='nvfp4-pack-quantized'"),
        (with_weights(of_floats("channel") | {"num_bits": 4}), "config_groups.group_0.weights.num_bits=4"),
        (with_weights(of_floats("token")), "config_groups.group_0.weights.strategy='token'"),
        (with_weights(of_floats("block")), "config_groups.group_0.weights.block_structure=None"),
        (with_weights(of_floats("channel") | {"dynamic": True}), "config_groups.group_0.weights.dynamic=True"),
        (with_weights(of_floats("channel") | {"symmetric": False}), "config_groups.group_0.weights.symmetric=False"),
        (with_weights(of_ints(3, 32, symmetric=True), "pack-quantized"), "config_groups.group_0.weights.num_bits=3"),
        (with_weights(of_floats("channel"), quantization_status="frozen"), "quantization_status='frozen'"),
        (with_weights(of_floats("channel"), sparsity_config={"format": "bitmask"}), "sparsity_config.format='bitmask'"),
        (with_weights(of_floats("channel"), transform_config={"config_groups": {"u": {}}}), "transform_config="),
        (with_weights(of_floats("channel"), config_groups={}), r"config_groups=\{\}"),
        (with_activations(num_bits=4, type="int"), "config_groups.group_0.input_activations.num_bits=4"),
    ],
)
def test_refused(config: dict[str, Any], field: str) -> None:
    with pytest.raises(CheckpointError, match=f"config.json: quantization_config.{field}.* is not supported: choose a"):
        read(config)


def test_fields_that_nobody_looks_at_are_named(caplog: pytest.LogCaptureFixture) -> None:
    read(FP8 | {"rotated_by": "somebody", "activation_scheme": "dynamic"})
    assert [record.getMessage() for record in caplog.records] == ["quantization_config says rotated_by, which is not looked at"]


def test_groups_for_modules_by_name_come_first() -> None:
    config = compressed("mixed-precision", of_floats("channel"))
    config["config_groups"]["group_0"] |= {"format": "float-quantized"}
    config["config_groups"]["group_1"] = {
        "targets": ["re:.*down_proj$"], "weights": of_ints(4, 64, symmetric=True), "format": "pack-quantized",
    }  # fmt: skip
    config["config_groups"]["group_2"] = {
        "targets": ["model.layers.1.mlp.down_proj"], "weights": of_ints(8, 64, symmetric=True), "format": "pack-quantized",
    }  # fmt: skip
    scheme = read(config)
    kinds = [str(scheme.form(f"model.layers.{name}")) for name in ("0.mlp.up_proj", "0.mlp.down_proj", "1.mlp.down_proj")]
    assert kinds == ["FP8", "int4", "int8"]


@pytest.mark.parametrize(
    ("ignored", "spared"),
    [
        (["lm_head"], False), (["down_proj"], True), (["model.layers.0.mlp.down"], False), ([PROJ], True),
        (["model.layers.0"], True), (["re:.*mlp.*"], True), (["model.layers.1"], False), (["mlp"], True),
    ],
)  # fmt: skip
def test_what_is_spared(ignored: list[str], spared: bool) -> None:
    for config in (FP8 | {"modules_to_not_convert": ignored}, with_weights(of_floats("channel"), ignore=ignored)):
        assert read(config).quantises(PROJ) is not spared
