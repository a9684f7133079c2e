"""Which of a checkpoint's tensors are a quantised weight's parts, and that they are what config.json says. Imports `stored`.

Whether a weight is quantised its tensors say; how, config.json. What is stored in fewer bits and is no part of a weight that is
known here is refused by whoever reads it, like every tensor that nothing reads.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from workers.model.config.fields import CheckpointError
from workers.model.config.quantization import Scheme, WeightForm
from workers.model.quantization.stored import Grouped, Mxfp4, Quantised, Scaled, Scales
from workers.model.quantization.words import AwqWords, GptqWords, PackedWords, Stored, Words

FP8 = "F8_E4M3"

PARTS = {
    "fp8": ("weight", "weight_scale", "weight_scale_inv"),
    "int8": ("weight", "weight_scale", "weight_zero_point"),
    "packed": ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"),
    "awq": ("qweight", "qzeros", "scales"),
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
}
"""What a module's parts are called behind its name."""

FLOATS = ("F32", "F16", "BF16", "F8_E8M0")
KINDS: dict[str, tuple[str, ...]] = {
    "weight": (FP8, "I8"), "weight_scale": FLOATS, "weight_scale_inv": FLOATS, "scales": FLOATS, "weight_packed": ("I32",),
    "qweight": ("I32",), "qzeros": ("I32",), "weight_zero_point": ("I32", "I8"), "g_idx": ("I32", "I64"),
    "weight_g_idx": ("I32", "I64"), "weight_shape": ("I64", "I32"),
}  # fmt: skip
"""What each part may be stored in: the same bits mean something else in another type."""

MADE_BY = {"fp8": "weight", "int8": "weight", "packed": "weight_packed", "awq": "qweight", "gptq": "qweight"}
"""The part that says that the module is quantised."""

ACTIVATIONS = ("input_scale", "activation_scale", "input_zero_point", "input_global_scale")
"""For activations that are rounded to a range that was measured: here they keep theirs, which is closer."""

STACKED = re.compile(r"(.*)_blocks$")


@dataclass
class Weights:
    """made: by the name that a plain checkpoint would have for it. parts: tensors that are in these. biases: of modules whose
    format stores one for all, wanted or not."""

    made: dict[str, Quantised] = field(default_factory=dict)
    parts: set[str] = field(default_factory=set)
    biases: set[str] = field(default_factory=set)


def quantised(scheme: Scheme, names: Iterable[str], stored: Callable[[str], Stored]) -> Weights:
    """names: of all tensors. stored: one by its name. Errors: CheckpointError for parts that are missing, or that config.json
    contradicts."""
    found, all_names = Weights(), set(names)
    for name in sorted(all_names):
        if scheme.method == "mxfp4":
            _stack(found, name, all_names, stored)
            continue
        module, _, leaf = name.rpartition(".")
        form = scheme.form(module) if leaf in MADE_BY.values() else None
        if form is None or leaf != MADE_BY[form.kind] or not _is_quantised(form, stored(name)):
            continue
        parts = {part: f"{module}.{part}" for part in PARTS[form.kind] if f"{module}.{part}" in all_names}
        weight = _made(form, _Parts(module, parts, stored))
        if weight is None:
            continue
        if leaf != "weight" and f"{module}.weight" in all_names:
            raise CheckpointError(f"{module}.weight is there twice, by itself and in {name}: download the checkpoint again")
        found.made[f"{module}.weight"] = weight
        found.parts |= {*parts.values()} | {f"{module}.{part}" for part in ACTIVATIONS if f"{module}.{part}" in all_names}
        if form.kind in ("awq", "gptq"):
            found.biases.add(f"{module}.bias")
    return found


def _is_quantised(form: WeightForm, weight: Stored) -> bool:
    """A module may be spared, by a rule of any kind: then its weight is stored as it is."""
    kinds = {"fp8": FP8, "int8": "I8"}
    return form.kind not in kinds or weight.get_dtype() == kinds[form.kind]


class _Parts:
    """Of one module."""

    def __init__(self, module: str, names: dict[str, str], stored: Callable[[str], Stored]) -> None:
        self._module, self._names, self._stored = module, names, stored

    def __getitem__(self, part: str) -> Stored:
        """Errors: CheckpointError where it is missing, or stored in a type that says something else."""
        if part not in self._names:
            raise CheckpointError(
                f"tensor {self._module}.{part} is missing, without which its weight means nothing: download the checkpoint "
                f"again"
            )
        found = self._stored(self._names[part])
        _require_kind(self._names[part], found, KINDS[part])
        return found

    def get(self, part: str) -> Stored | None:
        return self[part] if part in self._names else None

    def name(self, part: str) -> str:
        return f"{self._module}.{part}"

    def shape(self, part: str, expected: tuple[int, ...]) -> None:
        """Errors: CheckpointError where it is another."""
        found = tuple(self[part].get_shape())
        if found != expected:
            raise CheckpointError(
                f"{self.name(part)} has shape {list(found)}, but config.json asks for {list(expected)}: one of the two is from "
                f"another model; download both again"
            )


def _require_kind(name: str, stored: Stored, kinds: tuple[str, ...]) -> None:
    if stored.get_dtype() not in kinds:
        raise CheckpointError(
            f"tensor {name} is stored as {stored.get_dtype()}, and not as {' or '.join(kinds)}: that is another format, which "
            f"is not supported; choose the checkpoint in one that is, or in bfloat16, float16 or float32"
        )


def _made(form: WeightForm, parts: _Parts) -> Quantised | None:
    match form.kind:
        case "fp8" | "int8":
            return _scaled(form, parts)
        case "packed":
            return _packed(form, parts)
        case "gptq":
            words = GptqWords(form.bits, form.shift, parts["qweight"], parts["qzeros"], parts["scales"])
            return _grouped(form, parts, words, parts.get("g_idx"))
        case _:
            return _grouped(form, parts, AwqWords(parts["qweight"], parts["qzeros"], parts["scales"]), None)


def _scaled(form: WeightForm, parts: _Parts) -> Quantised | None:
    """None where there is no scale: what then stands there as FP8 is refused by whoever reads it."""
    values, inverse = parts["weight"], parts.get("weight_scale_inv")
    scale = parts.get("weight_scale") if inverse is None else inverse
    if scale is None or len(values.get_shape()) != 2:
        return None
    rows, columns = values.get_shape()
    block = None if form.free else form.block
    name = parts.name("weight_scale" if inverse is None else "weight_scale_inv")
    zeros = Scales(parts.name("weight_zero_point"), parts["weight_zero_point"], (rows, columns), block) if form.zeros else None
    return Scaled(values, Scales(name, scale, (rows, columns), block), zeros)


def _packed(form: WeightForm, parts: _Parts) -> Quantised:
    out, columns = (int(size) for size in parts["weight_shape"][...].tolist())
    each, group = 32 // form.bits, form.block[1] or columns
    groups = -(-columns // group)
    if form.block[0] is None:
        raise CheckpointError(
            f"{parts.name('weight_scale')} is one for the whole weight, which is not read where words are packed: choose a "
            f"checkpoint with scales of rows or groups"
        )
    parts.shape("weight_packed", (out, -(-columns // each)))
    parts.shape("weight_scale", (out, groups))
    if form.zeros:
        parts.shape("weight_zero_point", (-(-out // each), groups))
    zero = parts["weight_zero_point"] if form.zeros else None
    words = PackedWords(form.bits, (out, columns), groups, parts["weight_packed"], parts["weight_scale"], zero)
    return Grouped(words, form.block[1], parts.get("weight_g_idx"))


def _grouped(form: WeightForm, parts: _Parts, words: Words, order: Stored | None) -> Quantised:
    """Of AWQ and GPTQ, whose tensors say how large the weight is."""
    out, columns = words.shape
    groups = -(-columns // (form.block[1] or columns))
    parts.shape("scales", (groups, out))
    parts.shape("qzeros", (groups, -(-out * form.bits // 32)))
    if order is not None:
        parts.shape("g_idx", (columns,))
    return Grouped(words, form.block[1], None if order is None or _in_order(order, form, columns) else order)


def _in_order(order: Stored, form: WeightForm, columns: int) -> bool:
    """Whether columns lie group by group, as where nothing was reordered: then parts of the scales are enough."""
    return torch.equal(order[...].long(), torch.arange(columns) // (form.block[1] or columns))


def _stack(found: Weights, name: str, names: set[str], stored: Callable[[str], Stored]) -> None:
    """Of experts in MXFP4."""
    match = STACKED.match(name)
    if match is None:
        return
    scales = f"{match[1]}_scales"
    if scales not in names:
        raise CheckpointError(f"tensor {scales} is missing, without which {name} means nothing: download the checkpoint again")
    for part in (name, scales):
        _require_kind(part, stored(part), ("U8",))
    shape = tuple(stored(name).get_shape())
    if len(shape) != 4 or shape[3] != 16 or tuple(stored(scales).get_shape()) != shape[:3]:
        raise CheckpointError(
            f"{name} has shape {list(shape)} and {scales} {list(stored(scales).get_shape())}, which are no blocks of 32 with a "
            f"scale each: one of the two is from another model; download both again"
        )
    found.made[match[1]] = Mxfp4(stored(name), stored(scales))
    found.parts |= {name, scales}
