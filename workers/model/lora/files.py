"""A LoRA adapter as PEFT saves it, read and held against the model before a number of it is used.

    adapter_config.json          what was trained, and how it scales
    adapter_model.safetensors    base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight [rank, in], lora_B [out, rank]

What it asks for and is not served is refused by name: read as if it were not there, it would give another model. Imports no
torch: front ends read adapters too.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from scheduler.protocol.messages import Adapter
from workers.model.config.architectures import ModelConfig
from workers.model.config.fields import CheckpointError, Fields, read_json
from workers.model.reading import ADAPTER_CONFIG, DecoderConfig

CONFIG, TENSORS = ADAPTER_CONFIG, "adapter_model.safetensors"

PROJECTIONS = {
    "q_proj": "self_attn", "k_proj": "self_attn", "v_proj": "self_attn", "o_proj": "self_attn",
    "gate_proj": "mlp", "up_proj": "mlp", "down_proj": "mlp",
}  # fmt: skip
"""The linear layers that may be adapted, and the part of a decoder's layer that they are in."""

_TENSOR = re.compile(r"base_model\.model\.((?:model\.)?layers\.(\d+)\.(\w+)\.(\w+))\.lora_([AB])\.weight")
_DTYPES = {"F64", "F32", "F16", "BF16"}
_CHUNK_BYTES, _MOST_HEADER_BYTES = 1 << 22, 100 << 20
_NAMED = 5

_ANY = {
    "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "lora_dropout", "task_type", "peft_type", "r",
    "lora_alpha", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
    "use_rslora", "init_lora_weights", "bias", "peft_version", "megatron_core", "loftq_config", "eva_config",
    "qalora_group_size", "ensure_weight_tying",
}  # fmt: skip
"""Fields that are read here, or that say nothing of what a trained adapter computes. All others must be as if left out."""

_REFUSED = {
    "use_dora": "DoRA scales the columns of the sum of both weights",
    "modules_to_save": "whole layers were trained beside the adapter: merge it into a checkpoint of its own",
    "trainable_token_indices": "rows of the embedding were trained: merge it into a checkpoint of its own",
    "fan_in_fan_out": "its weights are transposed",
    "lora_bias": "its B has a bias",
    "layer_replication": "it has layers that the model has not",
    "target_parameters": "it adapts parameters that are no linear layers",
    "alora_invocation_tokens": "it acts on a part of the prompt alone",
}
"""Why, of fields that are known."""

_PLAIN_INITS = (None, True, False, "gaussian", "eva", "orthogonal")
"""Ways to begin the training that left the model's own weights as they were."""


@dataclass(frozen=True, slots=True)
class AdaptedLinear:
    """One linear layer: scaling * B @ A is added to its weight. rank: rows of A. a, b: names of the tensors."""

    layer: int
    projection: str
    rank: int
    scaling: float
    a: str
    b: str


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """What a folder holds. rank: the largest of its linears'."""

    adapter: Adapter
    linears: tuple[AdaptedLinear, ...]

    @property
    def rank(self) -> int:
        return max(linear.rank for linear in self.linears)

    @property
    def tensors(self) -> Path:
        return Path(self.adapter.folder) / TENSORS


def read_adapter(name: str, folder: str | Path, model: DecoderConfig, max_rank: int) -> AdapterFiles:
    """max_rank: that ranks have room for. Errors: CheckpointError for what is not there, is not served, or does not fit the
    model."""
    if not isinstance(model, ModelConfig):
        raise CheckpointError("LoRA adapters need Manta's own layers, and the model's are transformers': serve it without them")
    path = Path(folder).absolute()
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder: give that of a LoRA adapter in PEFT's format")
    if not (path / CONFIG).exists():
        found = "the folder of a checkpoint" if (path / "config.json").exists() else "no LoRA adapter in PEFT's format"
        raise CheckpointError(f"{path} has no {CONFIG}: it is {found}; give that of an adapter")
    said = Fields(read_json(path / CONFIG), path / CONFIG)
    _refuse(said)
    shapes = _shapes(path / TENSORS)
    linears = tuple(_linears(said, shapes, path / TENSORS))
    for linear in linears:
        _fit(linear, shapes, model, path / TENSORS)
        if linear.rank > max_rank:
            raise CheckpointError(f"{path} has rank {linear.rank}, and there is room for {max_rank}: raise max_lora_rank")
    return AdapterFiles(Adapter(name, _digest(path), str(path)), linears)


def shape_of(projection: str, model: ModelConfig) -> tuple[int, int]:
    """[out, in] of the whole weight."""
    heads, kv_heads = model.heads * model.head_dim, model.kv_heads * model.head_dim
    match projection:
        case "q_proj":
            return heads, model.hidden
        case "k_proj" | "v_proj":
            return kv_heads, model.hidden
        case "o_proj":
            return model.hidden, heads
        case "down_proj":
            return model.hidden, model.intermediate
        case _:
            return model.intermediate, model.hidden


def _refuse(said: Fields) -> None:
    """Errors: CheckpointError for what is not served, by name."""
    if (kind := said.get("peft_type")) != "LORA":
        raise said.error(f"peft_type={kind!r} is no LoRA adapter, and others are not served")
    for name in said.names():
        if name not in _ANY and said.get(name):
            raise said.error(f"{name}={said.get(name)!r} is not served: {_REFUSED.get(name, 'it is not known here')}")
    if (bias := said.get("bias", "none")) != "none":
        raise said.error(f"bias={bias!r} is not served: biases of the model were trained")
    init = said.get("init_lora_weights")
    if init not in _PLAIN_INITS:
        raise said.error(f"init_lora_weights={init!r} is not served: it changed the model's own weights; let PEFT convert it")


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Of all tensors, by name. Errors: CheckpointError."""
    try:
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            if not 0 < size <= _MOST_HEADER_BYTES:
                raise ValueError("it has no header")
            header = json.loads(opened.read(size))
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        shapes = {name: tuple(map(int, entry["shape"])) for name, entry in tensors.items()}
        dtypes = {str(entry["dtype"]) for entry in tensors.values()}
        end = 8 + size + max((int(entry["data_offsets"][1]) for entry in tensors.values()), default=0)
        whole = file.stat().st_size >= end
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing: save the adapter as safetensors, which PEFT does by itself") from None
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}): repair or download the file again") from error
    if not whole:
        raise CheckpointError(f"{file} is truncated: download it again")
    if strange := dtypes - _DTYPES:
        raise CheckpointError(f"{file} holds numbers of type {sorted(strange)[0]}: {', '.join(sorted(_DTYPES))} are served")
    return shapes


def _linears(said: Fields, shapes: Mapping[str, tuple[int, ...]], file: Path) -> Iterable[AdaptedLinear]:
    """Errors: CheckpointError for a tensor that nothing would read, or one half of a pair."""
    pairs: dict[tuple[str, int, str], dict[str, str]] = {}
    strange = []
    for name in sorted(shapes):
        match = _TENSOR.fullmatch(name)
        if match is None or PROJECTIONS.get(match[4]) != match[3]:
            strange.append(name)
        else:
            pairs.setdefault((match[1], int(match[2]), match[4]), {})[match[5]] = name
    if strange:
        named = ", ".join(strange[:_NAMED]) + (", ..." if len(strange) > _NAMED else "")
        raise CheckpointError(f"{file} adapts what is not served ({named}): {', '.join(PROJECTIONS)} of a decoder's layers are")
    if not pairs:
        raise CheckpointError(f"{file} holds no tensor: it is no adapter")
    for (module, layer, projection), names in pairs.items():
        if not _is_meant(said, module, layer):
            raise CheckpointError(
                f"{file} adapts {module}, which {CONFIG} leaves out: the two are not of one adapter; save or download it again"
            )
        if len(names) != 2:
            raise CheckpointError(f"{file} has of {module} only {', '.join(names.values())}: the other half is missing")
        rank = _patterned(said, "rank_pattern", module, said.integer("r"))
        alpha = _patterned(said, "alpha_pattern", module, said.number("lora_alpha", 8))
        scaling = alpha / (math.sqrt(rank) if said.get("use_rslora") else rank)
        yield AdaptedLinear(layer, projection, int(rank), scaling, names["A"], names["B"])


def _is_meant(said: Fields, module: str, layer: int) -> bool:
    """By the fields that say which modules are adapted, as PEFT reads them. Errors: CheckpointError."""
    layers = said.get("layers_to_transform")
    if layers is not None and layer not in (layers if isinstance(layers, list) else [layers]):
        return False
    targets, spared = said.get("target_modules"), said.get("exclude_modules")
    if spared and _names(said, "exclude_modules", spared, module):
        return False
    return not targets or targets == "all-linear" or _names(said, "target_modules", targets, module)


def _names(said: Fields, field: str, given: Any, module: str) -> bool:
    """given: ends of names, or one regular expression of the whole name."""
    if isinstance(given, list):
        return any(module == name or module.endswith(f".{name}") for name in given)
    try:
        return re.fullmatch(str(given), module) is not None
    except re.error as error:
        raise said.error(f"{field}: {given!r} is no regular expression ({error})") from error


def _patterned(said: Fields, name: str, module: str, usual: float) -> Any:
    """What the module has of a pattern, as PEFT finds it: the first key that its name ends with, as a regular expression."""
    patterns = said.nested(name)
    for key in patterns.names():
        try:
            found = re.match(rf"(.*\.)?({key})$", module)
        except re.error as error:
            raise said.error(f"{name}: {key!r} is no regular expression ({error})") from error
        if found:
            return patterns.integer(key) if isinstance(usual, int) else patterns.number(key, 0.0)
    return usual


def _fit(linear: AdaptedLinear, shapes: Mapping[str, tuple[int, ...]], model: ModelConfig, file: Path) -> None:
    """Errors: CheckpointError."""
    if linear.layer >= model.layers:
        raise CheckpointError(f"{file} adapts layer {linear.layer}, and the model has {model.layers}: it belongs to another")
    experts = model.mixture is not None and model.mixture.sparse[linear.layer]
    if experts and PROJECTIONS[linear.projection] == "mlp":
        raise CheckpointError(f"{file} adapts {linear.projection} of layer {linear.layer}, which has experts: not served")
    out, width = shape_of(linear.projection, model)
    for name, shape in ((linear.a, (linear.rank, width)), (linear.b, (out, linear.rank))):
        if shapes[name] != shape:
            raise CheckpointError(
                f"{file}: {name} has shape {list(shapes[name])}, and {list(shape)} fits the model and {CONFIG}: it belongs to "
                "another model"
            )


def _digest(folder: Path) -> str:
    """Of what makes it what it is. Errors: CheckpointError."""
    digest = xxhash.xxh3_128()
    try:
        for name in (CONFIG, TENSORS):
            digest.update((folder / name).stat().st_size.to_bytes(8, "little"))
            with (folder / name).open("rb") as opened:
                while chunk := opened.read(_CHUNK_BYTES):
                    digest.update(chunk)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read ({error}): repair or download it again") from error
    return digest.hexdigest()
