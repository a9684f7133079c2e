"""What a checkpoint's own config.json says about its decoder, and how tensor parallelism divides it.

Imports no torch before a dtype is asked for: front ends need none. One more family is one more row in `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from workers.kernels.attention.form import Form
from workers.model.config.fields import CheckpointError, Fields, read_json
from workers.model.config.mixtures import (
    GPT_OSS,
    MIXTRAL,
    QWEN2_MOE,
    QWEN3_MOE,
    MixtureConfig,
    MixtureFamily,
    MixtureShape,
    read_mixture,
)
from workers.model.config.quantization import Scheme, read_scheme
from workers.model.config.rope import Rope
from workers.model.config.rope_settings import read_rope
from workers.model.config.window import narrow_layers, widest_window

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Architecture:
    """How one family departs from the common decoder. None means: as config.json's own field says."""

    attention_bias: bool | None = False  # on q, k and v
    qkv_bias: bool = False  # where there is one, `qkv_bias` may say that there is none
    o_bias: bool | None = False
    mlp_bias: bool | None = False
    qk_norm: bool = False
    sliding: str = ""  # which rule says which layers have the window: "", "always", "flag", "switch", "alternate", "even"
    window: int = 4096  # where config.json leaves it out
    sinks: bool = False  # of the attention, a number for each head
    head_dim: int | None = None  # where config.json leaves it out; None: hidden size / heads
    mixture: MixtureFamily | None = None  # what stands in the place of MLPs
    usual: Mapping[str, Any] = field(default_factory=dict)  # other fields that config.json may leave out


YARN = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False}
GPT_OSS_USUAL = {"attention_bias": True, "rms_norm_eps": 1e-5, "rope_theta": 150_000.0, "rope_parameters": YARN}

FAMILIES = {
    "Llama": Architecture(attention_bias=None, o_bias=None, mlp_bias=None),
    "Mistral": Architecture(sliding="always"),
    "Qwen2": Architecture(attention_bias=True, sliding="flag"),
    "Qwen3": Architecture(attention_bias=None, o_bias=None, qk_norm=True, sliding="flag", head_dim=128),
    "Mixtral": Architecture(sliding="always", mixture=MIXTRAL),
    "Qwen2Moe": Architecture(attention_bias=True, qkv_bias=True, sliding="alternate", mixture=QWEN2_MOE),
    "Qwen3Moe": Architecture(attention_bias=None, o_bias=None, qk_norm=True, sliding="switch", mixture=QWEN3_MOE),
    "GptOss": Architecture(
        attention_bias=None, o_bias=None, sliding="even", window=128, sinks=True, head_dim=64, mixture=GPT_OSS,
        usual=GPT_OSS_USUAL,
    ),
}  # fmt: skip

Head = Literal["vocabulary", "none", "labels"]
"""What stands behind the final norm: logits of the next token, nothing (hidden states alone), or a classifier's labels."""

HEADS: dict[str, Head] = {"ForCausalLM": "vocabulary", "Model": "none", "ForSequenceClassification": "labels"}
"""By how the name of an architecture goes on behind its family's."""

ARCHITECTURES = {family + suffix: (FAMILIES[family], head) for suffix, head in HEADS.items() for family in FAMILIES}

DTYPES = ("float64", "float32", "bfloat16", "float16")
OTHER_DTYPE_NAMES = {"double": "float64", "float": "float32", "half": "float16"}
"""torch's own second names, which config.json may have too."""


def torch_dtype(name: str) -> torch.dtype:
    """name: one of `DTYPES`."""
    import torch

    found: torch.dtype = getattr(torch, name)
    return found


@dataclass(frozen=True, slots=True)
class RankShape:
    """One rank's part of the decoder. Where there are more ranks than KV heads, neighbours hold the same KV head.

    Invariant: the query heads [head_start, head_start + heads) attend to exactly this rank's KV heads.
    """

    rank: int
    size: int
    layers: int
    head_dim: int
    heads: int
    head_start: int
    kv_heads: int
    kv_head_start: int
    intermediate: int
    intermediate_start: int
    vocab: int  # rows of the embedding and columns of the logits, padding included
    vocab_start: int
    vocab_real: int  # how many of `vocab` are tokens; the rest is padding at the end
    mixture: MixtureShape | None = None  # of layers with experts


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder's sizes and switches. Made by `read_config`; every instance is one that `Decoder` can run."""

    architecture: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab_size: int
    max_position: int  # positions that may be used: as many as YaRN stretches to
    rms_eps: float
    rope: Rope
    forms: tuple[Form, ...]  # of each layer's attention
    attention_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied: bool
    head: Head
    labels: int  # of a classifier; 0 without one
    dtype_name: str | None  # of the weights, one of DTYPES; None: config.json leaves it to what they are stored in
    eos_ids: tuple[int, ...]
    scheme: Scheme | None = None  # how weights are quantised, if they are
    mixture: MixtureConfig | None = None

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the weights; None: config.json leaves it to what they are stored in."""
        return None if self.dtype_name is None else torch_dtype(self.dtype_name)

    def require(self, size: int, device: str = "cpu") -> None:  # noqa: ARG002
        """Raises CheckpointError if that many ranks cannot divide this model evenly. It is computed on every device."""
        self.shard(0, size)

    def window(self, positions: int) -> int | None:
        """As of `widest_window`."""
        return widest_window(self.forms, positions)

    def narrow(self, positions: int) -> tuple[tuple[bool, ...], int | None]:
        """As of `narrow_layers`."""
        return narrow_layers(self.forms, positions)

    def shard(self, rank: int, size: int) -> RankShape:
        """Rank `rank` of `size`. Raises CheckpointError if that many ranks cannot divide this model evenly."""
        if size < 1 or self.heads % size:
            raise CheckpointError(
                f"tensor parallel size {size} does not divide the model's {self.heads} attention heads: "
                f"choose one of {_divisors(self.heads)}"
            )
        if self.kv_heads % size and size % self.kv_heads:
            raise CheckpointError(
                f"tensor parallel size {size} neither divides the model's {self.kv_heads} KV heads nor is a multiple "
                f"of them: choose one of {self.parallel_sizes()}"
            )
        if (refusal := self._mlp_refusal(size)) is not None:
            raise CheckpointError(f"tensor parallel size {size} {refusal}: choose one of {self.parallel_sizes()}")
        vocab = -(-self.vocab_size // size)
        return RankShape(
            rank=rank,
            size=size,
            layers=self.layers,
            head_dim=self.head_dim,
            heads=self.heads // size,
            head_start=rank * self.heads // size,
            kv_heads=max(1, self.kv_heads // size),
            kv_head_start=rank * self.kv_heads // size,
            intermediate=self.intermediate // size,
            intermediate_start=rank * self.intermediate // size,
            vocab=vocab,
            vocab_start=rank * vocab,
            vocab_real=max(0, min(vocab, self.vocab_size - rank * vocab)),
            mixture=self.mixture.shard(rank, size) if self.mixture is not None else None,
        )

    def _mlp_refusal(self, size: int) -> str | None:
        """Why that many ranks cannot share the MLPs, or the experts in their place."""
        mixture = self.mixture
        if (mixture is None or not all(mixture.sparse)) and self.intermediate % size:
            return f"does not divide the intermediate size {self.intermediate}"
        return mixture.refusal(size) if mixture is not None else None

    def parallel_sizes(self) -> list[int]:
        """Every tensor parallel size that `shard` accepts."""
        return [
            size
            for size in _divisors(self.heads)
            if not (self.kv_heads % size and size % self.kv_heads) and self._mlp_refusal(size) is None
        ]


def read_config(path: str | Path) -> ModelConfig:
    """Parse `config.json` (and `generation_config.json`, for its stop ids) in the checkpoint folder `path`.

    Both spellings of RoPE and dtype are read: transformers 5 writes `rope_parameters` and `dtype`, older files
    `rope_theta`, `rope_scaling` and `torch_dtype`. Where a file has both, what transformers makes of it counts. Raises
    CheckpointError that says what to change.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is not a folder: give the path of a checkpoint folder in Hugging Face format, an id (org/name) or a URL"
        )
    fields = Fields(read_json(folder / "config.json"), folder / "config.json")
    name = _architecture_name(fields)
    family, head = ARCHITECTURES[name]
    fields = fields.over(family.usual)
    heads = fields.integer("num_attention_heads")
    hidden = fields.integer("hidden_size")
    kv_heads = fields.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise fields.error(f"num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}")
    head_dim = fields.integer("head_dim", family.head_dim or hidden // heads)
    if head_dim % 2:
        raise fields.error(f"head_dim={head_dim} is odd, and rotary embeddings turn pairs")
    trained = fields.integer("max_position_embeddings")
    rope = read_rope(fields, trained)
    layers = fields.integer("num_hidden_layers")
    windows = _read_windows(fields, family, layers)
    _refuse_what_is_not_computed(fields)
    return ModelConfig(
        architecture=name,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=fields.integer("intermediate_size"),
        vocab_size=fields.integer("vocab_size"),
        max_position=rope.stretched(trained),
        rms_eps=fields.number("rms_norm_eps", 1e-6),
        rope=rope,
        forms=tuple(Form(head_dim**-0.5, window, sinks=family.sinks) for window in windows),
        attention_bias=_attention_bias(fields, family),
        o_bias=fields.switch("attention_bias", family.o_bias),
        mlp_bias=fields.switch("mlp_bias", family.mlp_bias),
        qk_norm=family.qk_norm,
        tied=bool(fields.get("tie_word_embeddings", False)),
        head=head,
        labels=_read_labels(fields) if head == "labels" else 0,
        dtype_name=_read_dtype(fields),
        eos_ids=read_eos_ids(fields, folder, fields.integer("vocab_size")),
        scheme=read_scheme(fields),
        mixture=read_mixture(fields, family.mixture, layers) if family.mixture is not None else None,
    )


def _architecture_name(fields: Fields) -> str:
    names = fields.get("architectures", [])
    for name in names if isinstance(names, list) else []:
        if name in ARCHITECTURES:
            return str(name)
    supported = ", ".join(ARCHITECTURES)
    raise fields.error(f"architectures={names!r} is not supported: choose a checkpoint of one of {supported}")


def _attention_bias(fields: Fields, family: Architecture) -> bool:
    return fields.switch("attention_bias", family.attention_bias) and not (family.qkv_bias and fields.get("qkv_bias") is False)


def _read_labels(fields: Fields) -> int:
    """transformers leaves out what is as it would have been: two of them."""
    named = fields.nested("id2label").size
    return named or fields.integer("num_labels", 2)


def _refuse_what_is_not_computed(fields: Fields) -> None:
    """Refuse whatever would otherwise be silently ignored and give wrong logits."""
    if fields.get("is_causal", True) is False or fields.get("use_bidirectional_attention", False):
        raise fields.error("attention to later tokens is not computed: choose a checkpoint whose attention is causal")
    if (activation := fields.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise fields.error(f"hidden_act={activation!r} is not supported: only silu is computed")


def _read_windows(fields: Fields, family: Architecture, layers: int) -> list[int | None]:
    """The sliding window of each layer, None where it sees all. As transformers' own classes of these families read it."""
    full: list[int | None] = [None] * layers
    if not family.sliding or _is_null(fields, "sliding_window"):
        return full
    if family.sliding not in ("always", "even") and not fields.get("use_sliding_window", False):
        return full
    window = fields.integer("sliding_window", family.window)
    if family.sliding == "always":
        return [window] * layers
    kinds = fields.get("layer_types")
    if kinds is None:
        first = min(layers, int(fields.get("max_window_layers", 28)))
        match family.sliding:
            case "switch":
                return [window] * layers
            case "even":
                return [None if layer % 2 else window for layer in range(layers)]
            case "alternate":
                return [None if layer % 2 or layer >= first else window for layer in range(layers)]
            case _:
                return full[:first] + [window] * (layers - first)
    if not isinstance(kinds, list) or len(kinds) != layers or not set(kinds) <= {"full_attention", "sliding_attention"}:
        raise fields.error(f"layer_types must name full_attention or sliding_attention for each of {layers} layers: {kinds!r}")
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _is_null(fields: Fields, name: str) -> bool:
    return fields.has(name) and fields.get(name) is None


def _read_dtype(fields: Fields) -> str | None:
    named = fields.get("dtype", fields.get("torch_dtype", "auto"))
    name = named.removeprefix("torch.") if isinstance(named, str) else named
    if name == "auto":
        return None
    name = OTHER_DTYPE_NAMES.get(name, name) if isinstance(name, str) else name
    if not isinstance(name, str) or name not in DTYPES:
        raise fields.error(f"dtype {named!r} is not supported: choose a checkpoint in one of {', '.join(DTYPES)}")
    return name


def read_eos_ids(fields: Fields, folder: Path, vocab_size: int) -> tuple[int, ...]:
    """Stop ids of both files: chat models often list their end-of-turn id only in generation_config.json. An id that is no
    token, such as the -1 of some files, ends nothing."""
    found: set[int] = set()
    generation = folder / "generation_config.json"
    sources = [fields, Fields(read_json(generation), generation)] if generation.exists() else [fields]
    for source in sources:
        value = source.get("eos_token_id", [])
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(token, int) for token in ids):
            raise source.error(f"eos_token_id must be an integer or a list of them, found {value!r}: repair the file")
        found.update(ids)
    return tuple(sorted(token for token in found if 0 <= token < vocab_size))


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
