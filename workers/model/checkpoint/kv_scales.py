"""The scales of keys and values that a checkpoint brings for a KV cache in FP8: one number a layer for each.

    model.layers.3.self_attn.k_proj.k_scale   v_proj.v_scale   or   self_attn.k_scale   v_scale

Imports the checkpoint's reader. What `quantization_config` says of weights is none of its business.
"""

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kvcache.layout import KVScales
from workers.model.checkpoint.weights import Checkpoint
from workers.model.config.fields import CheckpointError, Fields, read_json

SCALE = re.compile(r"(?:^|\.)layers\.(\d+)\.self_attn\.(?:k_proj\.(?=k)|v_proj\.(?=v))?([kv])_scale$")
"""A scale's name: its layer, and which half of the layer it is for."""

SERVED: dict[str, tuple[Any, ...]] = {
    "num_bits": (8,), "type": ("float",), "strategy": ("tensor", None), "symmetric": (True, None), "dynamic": (False, None),
}  # fmt: skip
"""What a `kv_cache_scheme` may say; None: nothing."""


def scale_names(names: Iterable[str]) -> set[str]:
    """Those of the checkpoint's tensors that are scales of keys or values: no weights, whether or not KV is kept in FP8."""
    return {name for name in names if SCALE.search(name)}


def read_scales(path: str | Path, layers: int) -> KVScales | None:
    """Of all layers, None where the checkpoint brings none. Equal on all ranks.

    Errors: CheckpointError for scales of another kind than one number a layer, and for layers without.
    """
    _check_scheme(Path(path) / "config.json")
    with Checkpoint(path) as checkpoint:
        found = {_place(name): name for name in sorted(scale_names(checkpoint.names()))}
        if not found:
            return None
        keys, values = (tuple(_scale(checkpoint, found, (layer, half)) for layer in range(layers)) for half in "kv")
    return KVScales(keys, values)


def _place(name: str) -> tuple[int, str]:
    match = SCALE.search(name)
    assert match is not None, name
    return int(match[1]), match[2]


def _scale(checkpoint: Checkpoint, found: dict[tuple[int, str], str], place: tuple[int, str]) -> float:
    if place not in found:
        layer, half = place
        raise CheckpointError(
            f"the checkpoint brings scales of keys and values, but no {half}_scale of layer {layer}: it is damaged; download "
            "it again, or leave kv_dtype out"
        )
    name = found[place]
    numbers = checkpoint.whole(name)
    if numbers.numel() != 1:
        raise CheckpointError(
            f"{name} has shape {list(numbers.shape)}, and one scale a layer is computed: choose a checkpoint with scales per "
            "tensor, or leave kv_dtype out"
        )
    scale = float(numbers)
    if not (math.isfinite(scale) and scale > 0):
        raise CheckpointError(f"{name} is {scale}, which is no scale: download the checkpoint again, or leave kv_dtype out")
    return scale


def _check_scheme(file: Path) -> None:
    """Errors: CheckpointError for a `kv_cache_scheme` that is not 8-bit floats, one static scale a tensor."""
    fields = Fields(read_json(file), file)
    for holder in ("quantization_config", "compression_config"):
        scheme = fields.nested(holder).nested("kv_cache_scheme")
        for name, legal in SERVED.items() if scheme.size else ():
            if (given := scheme.get(name)) not in legal:
                raise fields.error(
                    f"kv_cache_scheme has {name}={given!r}, and {legal[0]!r} alone is computed: leave kv_dtype out"
                )
