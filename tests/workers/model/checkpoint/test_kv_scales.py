"""Scales of keys and values: read from a checkpoint under each of their names, used layer by layer, refused where they are of
another kind, and no obstacle to whoever keeps KV in 16 bits."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.models.zoo import make
from kvcache.layout import KVScales
from tests.shared.checkpoints import make_checkpoint
from tests.workers.process.test_build import CONFIG, RESOLVED
from workers.model.checkpoint.kv_scales import read_scales
from workers.model.config.fields import CheckpointError
from workers.parallel.in_process import Solo
from workers.process.build import build_rank

SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
QUANTIZED = {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": SCHEME}
SCALES = KVScales((0.5, 0.25), (2.0, 0.125))
PROJECTIONS = "self_attn.k_proj.k_scale", "self_attn.v_proj.v_scale"
WHOLE = "self_attn.k_scale", "self_attn.v_scale"


def with_scales(path: Path, names: tuple[str, str], shape: tuple[int, ...] = (), **fields: Any) -> Path:
    """The checkpoint with `SCALES` in it. fields: of config.json."""
    tensors = load_file(path / "model.safetensors")
    for layer, pair in enumerate(zip(SCALES.keys, SCALES.values, strict=True)):
        for name, scale in zip(names, pair, strict=True):
            tensors[f"model.layers.{layer}.{name}"] = torch.full(shape, scale)
    save_file(tensors, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text()) | fields
    (path / "config.json").write_text(json.dumps(config))
    return path


def change(path: Path, name: str, value: torch.Tensor | None) -> None:
    tensors = load_file(path / "model.safetensors")
    tensors.pop(name)
    if value is not None:
        tensors[name] = value
    save_file(tensors, path / "model.safetensors")


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
@pytest.mark.parametrize("names", [PROJECTIONS, WHOLE], ids=["projections", "attention"])
def test_both_names(names: tuple[str, str], shape: tuple[int, ...], tmp_path: Path) -> None:
    assert read_scales(with_scales(make_checkpoint(tmp_path), names, shape), 2) == SCALES


def test_without_scales_they_are_1(tmp_path: Path) -> None:
    assert read_scales(make_checkpoint(tmp_path), 2) is None
    built = build_rank(replace(CONFIG, model=str(tmp_path), kv_dtype="fp8", kv_memory=1 << 20), RESOLVED, Solo())
    assert built.pool.scales(1) == (1.0, 1.0)
    built.rank.executor.close()


@pytest.mark.parametrize("kind", ["native", "transformers"])
@pytest.mark.parametrize("kv_dtype", ["auto", "fp8"])
def test_a_rank_takes_them_or_leaves_them(kind: str, kv_dtype: str, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path) if kind == "native" else make("gemma", tmp_path)
    with_scales(path, PROJECTIONS, quantization_config=QUANTIZED)
    built = build_rank(replace(CONFIG, model=str(path), kv_dtype=kv_dtype, kv_memory=1 << 20), RESOLVED, Solo())
    expected = [(0.5, 2.0), (0.25, 0.125)] if kv_dtype == "fp8" else [None, None]
    assert [built.pool.scales(layer) for layer in range(2)] == expected
    built.rank.executor.close()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("model.layers.1.self_attn.v_proj.v_scale", None, "no v_scale of layer 1"),
        ("model.layers.1.self_attn.k_proj.k_scale", torch.ones(2), "k_scale has shape [2], and one scale a layer"),
        ("model.layers.0.self_attn.k_proj.k_scale", torch.tensor(0.0), "k_scale is 0.0, which is no scale"),
        ("model.layers.0.self_attn.k_proj.k_scale", torch.tensor(torch.nan), "is nan, which is no scale"),
        ("model.layers.0.self_attn.k_proj.k_scale", torch.tensor(5, dtype=torch.uint8), "stored as U8"),
    ],
)
def test_scales_of_another_kind(name: str, value: torch.Tensor | None, said: str, tmp_path: Path) -> None:
    path = with_scales(make_checkpoint(tmp_path), PROJECTIONS)
    change(path, name, value)
    with pytest.raises(CheckpointError, match=re.escape(said)):
        read_scales(path, 2)


@pytest.mark.parametrize(
    "given", [{"type": "int"}, {"num_bits": 4}, {"strategy": "attn_head"}, {"dynamic": True}, {"symmetric": False}], ids=str
)
def test_a_scheme_of_another_kind(given: dict[str, Any], tmp_path: Path) -> None:
    scheme = QUANTIZED | {"kv_cache_scheme": SCHEME | given}
    path = with_scales(make_checkpoint(tmp_path), PROJECTIONS, quantization_config=scheme)
    (name, value), = given.items()  # fmt: skip
    with pytest.raises(CheckpointError, match=f"kv_cache_scheme has {name}={value!r}"):
        read_scales(path, 2)
    built = build_rank(replace(CONFIG, model=str(path), kv_memory=1 << 20), RESOLVED, Solo())  # nobody asks for it
    built.rank.executor.close()


def test_what_is_said_of_weights_beside_it_is_not_passed_over(tmp_path: Path) -> None:
    weights = QUANTIZED | {"config_groups": {"group_0": {"targets": ["Linear"], "weights": SCHEME}}}
    path = with_scales(make_checkpoint(tmp_path), PROJECTIONS, quantization_config=weights)
    with pytest.raises(CheckpointError, match=r"quantization_config\.format=None is not supported"):
        build_rank(replace(CONFIG, model=str(path), kv_dtype="fp8"), RESOLVED, Solo())
