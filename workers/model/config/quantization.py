"""What config.json says of quantised weights: read into one record, or refused by name before anything is loaded.

Imports no torch: front ends have none. What a format stores besides is checked against this in `checkpoint`, and how that
becomes numbers is in `stored`.
"""

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from workers.model.config.fields import CheckpointError, Fields

logger = logging.getLogger(__name__)

Kind = Literal["fp8", "int8", "packed", "awq", "gptq", "mxfp4"]
"""How a weight's numbers are stored: as they are with a scale beside them (fp8, int8), several in a word (packed: of
compressed-tensors, awq, gptq), or two in a byte with a power of two for 32 (mxfp4)."""

METHODS = ("fp8", "compressed-tensors", "awq", "gptq", "mxfp4")
LINEAR = "Linear"
"""The class that groups of compressed-tensors are for, if they are for no module by name."""

HARMLESS = {
    "quant_method", "modules_to_not_convert", "dequantize", "fmt", "scale_fmt", "activation_scheme", "weight_block_size",
    "ignored_layers", "kv_cache_scheme", "config_groups", "format", "ignore", "quantization_status",
    "global_compression_ratio", "sparsity_config", "transform_config", "version", "bits", "w_bit", "q_group_size",
    "group_size", "zero_point", "backend", "do_fuse", "fuse_max_seq_len", "modules_to_fuse", "exllama_config", "desc_act",
    "sym", "checkpoint_format", "dynamic", "lm_head", "pack_dtype", "is_marlin_format", "rotation", "damp_percent",
    "damp_auto_increment", "static_groups", "true_sequential", "model_name_or_path", "model_file_base_name", "meta",
    "batch_size", "block_name_to_quantize", "cache_block_outputs", "dataset", "tokenizer", "max_input_length",
    "model_seqlen", "module_name_preceding_first_block", "pad_token_id", "use_cuda_fp16", "use_exllama",
    "modules_in_block_to_quantize", "quantizer", "hyb_act", "act_group_aware",
}  # fmt: skip
"""Fields that are checked, or say nothing about the numbers. Others are named in the log."""


@dataclass(frozen=True, slots=True)
class WeightForm:
    """How one weight [out, in] is stored.

    block: rows and columns of it that share a scale, None for all of them; where `free`, the scale's own shape says which.
    zeros: zero points are stored. shift: what is added to these, as they are stored. mixed: a group's columns may lie apart.
    """

    kind: Kind
    bits: int = 8
    block: tuple[int | None, int | None] = (None, None)
    free: bool = False
    zeros: bool = False
    shift: int = 0
    mixed: bool = False

    def __str__(self) -> str:
        return {"fp8": "FP8", "mxfp4": "MXFP4"}.get(self.kind, f"int{self.bits}")


@dataclass(frozen=True, slots=True)
class QuantizationRule:
    """targets: names of modules, "re:" and a pattern for them, or "Linear"."""

    targets: tuple[str, ...]
    form: WeightForm


@dataclass(frozen=True, slots=True)
class Scheme:
    """Which weights are quantised, and how. ignored: as `QuantizationRule.targets`, or names and parts of names. made: while
    loading, from weights that are stored plain."""

    method: str
    rules: tuple[QuantizationRule, ...]
    ignored: tuple[str, ...] = ()
    made: bool = False

    def form(self, module: str) -> WeightForm | None:
        """How that module's weight is stored if it is quantised, which the checkpoint's tensors say; a rule that names it comes
        before one for all."""
        for fits in (lambda target: target == module, lambda target: _matches(target, module), lambda target: target == LINEAR):
            for rule in self.rules:
                if any(fits(target) for target in rule.targets):
                    return rule.form
        return None

    def quantises(self, module: str) -> bool:
        """What config.json promises, where no weights are looked at."""
        spared = any(_names(target, module) for target in self.ignored)
        return self.form(module) is not None and not spared

    def __str__(self) -> str:
        if self.made:
            return "FP8, made while loading"
        return f"{self.method} ({', '.join(sorted({str(rule.form) for rule in self.rules}))})"


def chosen(stored: Scheme | None, asked: str) -> Scheme | None:
    """What `--quantization` asks for, of weights that are stored so. Errors: CheckpointError for what they are not."""
    if asked == "auto" or (stored is not None and stored.method == asked):
        return stored
    if stored is None and asked == "fp8":
        return FP8_MADE
    found = "in 16 bits or more" if stored is None else f"quantised by {stored.method}"
    makes = "fp8 is made of weights in 16 bits; " if asked == "fp8" else ""
    raise CheckpointError(f"quantization={asked!r} was asked for, but the weights are {found}: {makes}leave it at auto")


def read_scheme(fields: Fields) -> Scheme | None:
    """What `quantization_config` says, or `compression_config`, as older files call it; None where the weights are plain.

    Errors: CheckpointError for a method, or an option inside one, that is not computed.
    """
    name = next((name for name in ("quantization_config", "compression_config") if fields.get(name)), None)
    if name is None or _quantizes_only_kv(fields):
        return None
    found = _Quantization(fields.nested(name), name)
    method = found.get("quant_method")
    readers: dict[str, Callable[[_Quantization], Scheme]] = {
        "fp8": _fp8, "compressed-tensors": _compressed_tensors, "awq": _awq, "gptq": _gptq, "mxfp4": _mxfp4,
    }  # fmt: skip
    reader = readers.get(method) if isinstance(method, str) else None
    if reader is None:
        raise found.refused("quant_method", method, METHODS)
    scheme = reader(found)
    unknown = sorted(set(found.names()) - HARMLESS)
    if unknown:
        logger.warning("%s says %s, which is not looked at", name, ", ".join(unknown))
    return scheme


FP8_MADE = Scheme("fp8", (QuantizationRule((LINEAR,), WeightForm("fp8", block=(1, None))),), ("lm_head",), made=True)
"""What `--quantization fp8` makes of every linear layer of the decoder's own."""


def _quantizes_only_kv(fields: Fields) -> bool:
    """Whether `quantization_config` is about keys and values, and says nothing of weights."""
    said = fields.nested("quantization_config")
    return said.get("kv_cache_scheme") is not None and said.get("config_groups") == {} and not fields.get("compression_config")


class _Quantization:
    """The object in config.json, or one inside it, with errors that name its field."""

    def __init__(self, fields: Fields, where: str) -> None:
        self._fields, self._where = fields, where

    def get(self, name: str, default: Any = None) -> Any:
        return self._fields.get(name, default)

    def names(self) -> list[str]:
        return self._fields.names()

    def inside(self, name: str) -> "_Quantization":
        return _Quantization(self._fields.nested(name), f"{self._where}.{name}")

    def refused(self, name: str, value: Any, instead: Any) -> CheckpointError:
        """instead: what there is, one or several."""
        choices = ", ".join(str(each) for each in instead) if isinstance(instead, tuple | list) else str(instead)
        return self._fields.error(
            f"{self._where}.{name}={value!r} is not supported: choose a checkpoint with {choices}, or one in bfloat16, "
            f"float16 or float32"
        )

    def one_of(self, name: str, *allowed: Any, default: Any = None) -> Any:
        """The field's value. `default`: where it is left out."""
        value = self.get(name, default)
        if not any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in allowed):
            raise self.refused(name, value, allowed)
        return value

    def nothing(self, name: str) -> None:
        """Whatever the field would say is not computed."""
        if self.get(name):
            raise self.refused(name, self.get(name), f"no {name}")

    def list_of_names(self, name: str) -> tuple[str, ...]:
        value = self.get(name, [])
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise self.refused(name, value, "a list of names")
        return tuple(value)

    def group(self, name: str) -> int | None:
        """Columns that share a scale; None for all of a row."""
        value = self.get(name, -1)
        if not isinstance(value, int) or isinstance(value, bool) or (value < 1 and value != -1):
            raise self.refused(name, value, "a number of columns, or -1")
        return None if value == -1 else value

    def block(self, name: str) -> tuple[int, int] | None:
        value = self.get(name)
        if value is None:
            return None
        if isinstance(value, str) and re.fullmatch(r"\d+x\d+", value):  # as older releases write it
            value = [int(part) for part in value.split("x")]
        if not isinstance(value, list) or len(value) != 2 or not all(isinstance(each, int) and each > 0 for each in value):
            raise self.refused(name, value, "two numbers of rows and columns")
        return value[0], value[1]


def _fp8(found: _Quantization) -> Scheme:
    """Of transformers and vLLM: per tensor, per row, or in blocks."""
    found.one_of("activation_scheme", "dynamic", "static", default="dynamic")
    found.one_of("fmt", "e4m3", default="e4m3")
    block = found.block("weight_block_size")
    form = WeightForm("fp8", block=block or (None, None), free=block is None)
    ignored = found.list_of_names("modules_to_not_convert") + found.list_of_names("ignored_layers")
    return Scheme("fp8", (QuantizationRule((LINEAR,), form),), ignored)


def _awq(found: _Quantization) -> Scheme:
    found.one_of("version" if found.get("version") else "format", "gemm", "GEMM", default="gemm")
    found.one_of("zero_point", True, default=True)
    bits = found.one_of("w_bit" if found.get("w_bit") else "bits", 4)
    group = found.group("q_group_size" if found.get("q_group_size") else "group_size")
    form = WeightForm("awq", bits, (1, group), zeros=True)
    return Scheme("awq", (QuantizationRule((LINEAR,), form),), found.list_of_names("modules_to_not_convert"))


def _gptq(found: _Quantization) -> Scheme:
    """Its zero points are stored one too low, but in its second format."""
    second = found.one_of("checkpoint_format", "gptq", "gptq_v2", default="gptq") == "gptq_v2"
    bits = found.one_of("bits", 4, 8)
    found.one_of("pack_dtype", "int32", default="int32")
    for name in ("dynamic", "is_marlin_format", "rotation"):
        found.nothing(name)
    shift, mixed = 0 if second else 1, bool(found.get("desc_act"))
    form = WeightForm("gptq", bits, (1, found.group("group_size")), zeros=True, shift=shift, mixed=mixed)
    return Scheme("gptq", (QuantizationRule((LINEAR,), form),), found.list_of_names("modules_to_not_convert"))


def _mxfp4(found: _Quantization) -> Scheme:
    """Of gpt-oss: experts alone."""
    form = WeightForm("mxfp4", 4, (1, 32))
    experts = QuantizationRule((r"re:.*experts\.(gate_up_proj|down_proj)$",), form)
    return Scheme("mxfp4", (experts,), found.list_of_names("modules_to_not_convert"))


def _compressed_tensors(found: _Quantization) -> Scheme:
    found.one_of("quantization_status", "compressed", default="compressed")
    formats = ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized", "mixed-precision")
    usual = found.one_of("format", *formats)
    found.inside("sparsity_config").one_of("format", "dense", default="dense")
    found.nothing("transform_config")
    groups = found.inside("config_groups")
    rules = tuple(_rule(groups.inside(name), usual) for name in groups.names())
    if not rules:
        raise found.refused("config_groups", found.get("config_groups"), "at least one group")
    return Scheme("compressed-tensors", rules, found.list_of_names("ignore"))


def _rule(group: _Quantization, usual: str) -> QuantizationRule:
    """usual: the format of groups that name none."""
    if group.get("input_activations"):  # their numbers stay as they are, or are rounded token by token: never more coarsely
        group.inside("input_activations").one_of("num_bits", 8)
    group.nothing("output_activations")
    stored = group.one_of("format", "float-quantized", "int-quantized", "naive-quantized", "pack-quantized", default=usual)
    weights = group.inside("weights")
    packed = stored == "pack-quantized"
    kind = weights.one_of("type", "int", *(() if packed else ("float",)), default="int")
    bits = weights.one_of("num_bits", 8, *((4,) if packed else ()), default=8)
    weights.nothing("dynamic")
    symmetric = weights.one_of("symmetric", True, *((False,) if kind == "int" else ()), default=True)
    name: Kind = "packed" if packed else "fp8" if kind == "float" else "int8"
    mixed = weights.one_of("actorder", None, True, False, "group", "dynamic", "weight", "static") in (True, "group", "dynamic")
    form = WeightForm(name, bits, _shared(weights), zeros=not symmetric, mixed=mixed)
    return QuantizationRule(group.list_of_names("targets"), form)


def _shared(weights: _Quantization) -> tuple[int | None, int | None]:
    group, block = weights.group("group_size"), weights.block("block_structure")
    usual = "tensor" if group is None else "group"
    match weights.one_of("strategy", "tensor", "channel", "group", "block", default=usual):
        case "tensor":
            return None, None
        case "channel":
            return 1, None
        case "group":
            return 1, group
    if block is None:
        raise weights.refused("block_structure", None, "two numbers of rows and columns")
    return block


def _matches(target: str, module: str) -> bool:
    return target.startswith("re:") and re.match(target.removeprefix("re:"), module) is not None


def _names(target: str, module: str) -> bool:
    """Whether a list of modules that are spared has this one in it: by its name, a part of that, or a pattern."""
    return _matches(target, module) or f".{target}." in f".{module}."
