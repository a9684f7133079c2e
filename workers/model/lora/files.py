"""A LoRA adapter as PEFT saves it, read and held against the model before a number of it is used.

    adapter_config.json          what was trained, and how it scales
    adapter_model.safetensors    base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight [rank, in], lora_B [out, rank]

Experts are adapted one by one, as transformers had them up to version 4, or stacked: one parameter for all of a layer, of which
PEFT makes one matrix, A of one expert behind that of the other, but B with each rank's column for all experts side by side:

    ...layers.3.mlp.experts.7.up_proj.lora_A.weight       [rank, in]              lora_B [out, rank]
    ...layers.3.mlp.experts.base_layer.lora_A.weight      [experts * rank, in]    lora_B [out, rank * experts]    gate_up_proj
    ...layers.3.mlp.experts.lora_A.weight                 likewise                                                down_proj

What it asks for and is not served is refused by name: read as if it were not there, it would give another model. Imports no
torch: front ends read adapters too.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import xxhash

from scheduler.protocol.messages import Adapter
from workers.config import LoraRoom
from workers.model.config.architectures import ModelConfig
from workers.model.config.fields import CheckpointError, Fields, read_json
from workers.model.lora.modules import STACKS, WRAPPED, has_experts, modules_of, served, shape_of
from workers.model.reading import ADAPTER_CONFIG, DecoderConfig

CONFIG, TENSORS = ADAPTER_CONFIG, "adapter_model.safetensors"

FIRST_TO_TURN = (0, 19, 1)
"""Of PEFT: which before it took stacks of matrices [out, in] for such of [in, out]."""

_TENSOR = re.compile(r"base_model\.model\.((?:model\.)?layers\.(\d+)\.([\w.]+))\.lora_([AB])\.weight")
_DTYPES = {"F64", "F32", "F16", "BF16"}
_CHUNK_BYTES, _MOST_HEADER_BYTES = 1 << 22, 100 << 20
_NAMED = 5

_ANY = {
    "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "lora_dropout", "task_type", "peft_type", "r",
    "lora_alpha", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
    "use_rslora", "init_lora_weights", "bias", "peft_version", "megatron_core", "loftq_config", "eva_config",
    "qalora_group_size", "ensure_weight_tying", "target_parameters",
}  # fmt: skip
"""Fields that are read here, or that say nothing of what a trained adapter computes. All others must be as if left out."""

_REFUSED = {
    "use_dora": "DoRA scales the columns of the sum of both weights",
    "modules_to_save": "whole layers were trained beside the adapter: merge it into a checkpoint of its own",
    "trainable_token_indices": "rows of the embedding were trained: merge it into a checkpoint of its own",
    "fan_in_fan_out": "its weights are transposed",
    "lora_bias": "its B has a bias",
    "layer_replication": "it has layers that the model has not",
    "alora_invocation_tokens": "it acts on a part of the prompt alone",
}
"""Why, of fields that are known."""

_PLAIN_INITS = (None, True, False, "gaussian", "eva", "orthogonal")
"""Ways to begin the training that left the model's own weights as they were."""


@dataclass(frozen=True, slots=True)
class AdaptedLinear:
    """One linear layer: scaling * B @ A is added to its weight. projection: as in `shape_of`. rank: rows of A. a, b: names of
    the tensors. expert: of a projection of experts, which one's it is; None: of all of them, in a stack. turned: A [experts *
    rank, out] and B [in, rank * experts] change places."""

    layer: int
    projection: str
    rank: int
    scaling: float
    a: str
    b: str
    expert: int | None = None
    turned: bool = False

    @property
    def stacked(self) -> bool:
        return self.expert is None and self.projection.startswith("experts.")


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


def read_adapter(name: str, folder: str | Path, model: DecoderConfig, room: LoraRoom) -> AdapterFiles:
    """room: that ranks have. Errors: CheckpointError for what is not there, is not served, or does not fit the
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
    linears = _oriented(said, tuple(_linears(said, shapes, model, path / TENSORS)), shapes, model)
    for linear in linears:
        _fit(linear, shapes, model, path / TENSORS)
        if linear.rank > room.rank:
            raise CheckpointError(f"{path} has rank {linear.rank}, and there is room for {room.rank}: raise max_lora_rank")
        if (linear.stacked or linear.expert is not None) and not room.experts:
            raise CheckpointError(f"{path} changes experts, beside which no room is kept: start with lora_experts")
    return AdapterFiles(Adapter(name, _digest(path), str(path)), linears)


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


def _linears(
    said: Fields, shapes: Mapping[str, tuple[int, ...]], model: ModelConfig, file: Path
) -> Iterable[AdaptedLinear]:  # fmt: skip
    """Errors: CheckpointError for a tensor that nothing would read, or one half of a pair."""
    pairs: dict[tuple[str, int, str], dict[str, str]] = {}
    known = {sparse: modules_of(model, sparse) for sparse in (False, True)}
    strange = []
    for name in sorted(shapes):
        match = _TENSOR.fullmatch(name)
        if match is not None and int(match[2]) >= model.layers:
            raise CheckpointError(f"{file} adapts layer {match[2]}, and the model has {model.layers}: it belongs to another")
        if match is None or match[3] not in known[has_experts(model, int(match[2]))]:
            strange.append(name)
        else:
            pairs.setdefault((match[1], int(match[2]), match[3]), {})[match[4]] = name
    if strange:
        named = ", ".join(strange[:_NAMED]) + (", ..." if len(strange) > _NAMED else "")
        raise CheckpointError(f"{file} adapts what is not served ({named}): {served(model)}")
    if not pairs:
        raise CheckpointError(f"{file} holds no tensor: it is no adapter")
    for (module, layer, tail), names in pairs.items():
        place = known[has_experts(model, layer)][tail]
        meant = _stack_of(said, module, tail) if place is None else _as_meant(said, module, layer)
        if meant is None:
            raise CheckpointError(
                f"{file} adapts {module}, which {CONFIG} leaves out: the two are not of one adapter; save or download it again"
            )
        if len(names) != 2:
            raise CheckpointError(f"{file} has of {module} only {', '.join(names.values())}: the other half is missing")
        projection, expert = place or (f"experts.{meant.rpartition('.')[2]}", None)
        rank = _patterned(said, "rank_pattern", meant, said.integer("r"))
        alpha = _patterned(said, "alpha_pattern", meant, said.number("lora_alpha", 8))
        scaling = alpha / (math.sqrt(rank) if said.get("use_rslora") else rank)
        yield AdaptedLinear(layer, projection, int(rank), scaling, names["A"], names["B"], expert)


def _stack_of(said: Fields, module: str, tail: str) -> str | None:
    """The parameter whose tensors PEFT calls so; None: it is not meant."""
    experts = module.removesuffix(tail) + WRAPPED[-1]
    meant = [f"{experts}.{name}" for name in STACKS if _is_targeted(said, f"{experts}.{name}")]
    return dict(zip(reversed(WRAPPED), reversed(meant), strict=False)).get(tail)


def _as_meant(said: Fields, module: str, layer: int) -> str | None:
    """What it is called where PEFT looks for it, among parameters or modules; None: it is not meant."""
    parameter = f"{module}.weight"
    return parameter if _is_targeted(said, parameter) else module if _is_meant(said, module, layer) else None


def _is_targeted(said: Fields, parameter: str) -> bool:
    """Errors: CheckpointError."""
    targets = said.get("target_parameters") or []
    if not isinstance(targets, list):
        raise said.error(f"target_parameters must be a list, found {targets!r}: save or download it again")
    return bool(targets) and _names(said, "target_parameters", targets, parameter)


def _is_meant(said: Fields, module: str, layer: int) -> bool:
    """By the fields that say which modules are adapted, as PEFT reads them. Errors: CheckpointError."""
    layers = said.get("layers_to_transform")
    if layers is not None and layer not in (layers if isinstance(layers, list) else [layers]):
        return False
    targets, spared = said.get("target_modules"), said.get("exclude_modules")
    if spared and _names(said, "exclude_modules", spared, module):
        return False
    if not targets:
        return not said.get("target_parameters")
    return targets == "all-linear" or _names(said, "target_modules", targets, module)


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


def _shapes_of(linear: AdaptedLinear, model: ModelConfig) -> tuple[tuple[int, int], tuple[int, int]]:
    """What A's and B's shapes ought to be."""
    out, width = shape_of(linear.projection, model)
    if linear.turned:
        out, width = width, out
    low = linear.rank * (model.mixture.experts if linear.stacked and model.mixture is not None else 1)
    return (low, width), (out, low)


def _oriented(
    said: Fields, linears: tuple[AdaptedLinear, ...], shapes: Mapping[str, tuple[int, ...]], model: ModelConfig
) -> tuple[AdaptedLinear, ...]:
    """Stacks that PEFT took for matrices of inputs first, though they have outputs first, or the other way round, are known
    by their shapes; of as many outputs as inputs by the others', or by the version. Errors: CheckpointError where neither
    tells."""
    found, square = {}, []
    for linear in (linear for linear in linears if linear.stacked):
        turned = replace(linear, turned=True)
        if len(set(shape_of(linear.projection, model))) == 1:
            square.append(linear)
        elif (shapes[linear.a], shapes[linear.b]) == _shapes_of(turned, model):
            found[linear] = turned
        else:
            found[linear] = linear
    turns = any(linear.turned for linear in found.values())
    if square and not found and model.mixture is not None and not model.mixture.family.packed:
        version = tuple(int(part) for part in re.findall(r"\d+", str(said.get("peft_version", "")))[:3])
        if version < FIRST_TO_TURN:
            raise said.error(
                f"peft_version={said.get('peft_version')!r}: nothing tells outputs from inputs in {square[0].a}; save it with "
                "PEFT 0.19.1 or newer"
            )
    found |= {linear: replace(linear, turned=turns) for linear in square}
    return tuple(found.get(linear, linear) for linear in linears)


def _fit(linear: AdaptedLinear, shapes: Mapping[str, tuple[int, ...]], model: ModelConfig, file: Path) -> None:
    """Errors: CheckpointError."""
    for name, shape in zip((linear.a, linear.b), _shapes_of(linear, model), strict=True):
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
