"""What is known of a decoder of transformers before its weights are read, in the terms of `workers.model.reading`.

Imports transformers, and no torch until somebody asks for the class itself: front ends read limits alone, and have none. Runs
no code of a checkpoint.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import is_torch_available

from workers.model.config.architectures import DTYPES, RankShape, read_eos_ids, torch_dtype
from workers.model.config.fields import CheckpointError, Fields, read_json
from workers.model.config.quantization import Scheme, read_scheme
from workers.model.config.window import narrow_layers, widest_window
from workers.model.transformers.compared import COMPARED, WORKS

if TYPE_CHECKING:
    import torch

    from workers.model.transformers.survey import Survey

ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention", "attention"}
"""Kinds of layers that keep nothing but keys and values."""

LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""How classes are called whose checkpoints have a head over the vocabulary."""

@dataclass(frozen=True, slots=True)
class TransformersConfig:
    """Made by `read_transformers`. text: transformers' own configuration; whoever builds from it takes a copy."""

    architecture: str
    text: Any
    vocab_size: int
    max_position: int
    dtype_name: str | None
    eos_ids: tuple[int, ...]
    part_of: str | None
    """The model type of the whole checkpoint, where this is its text part alone."""
    scheme: Scheme | None = None
    """How weights are quantised, if they are."""
    surveys: "dict[int, Survey]" = field(default_factory=dict, compare=False, repr=False)
    """By tensor parallel size, once asked for."""

    @property
    def dtype(self) -> "torch.dtype | None":
        """Of the weights; None: config.json leaves it to what they are stored in."""
        return None if self.dtype_name is None else torch_dtype(self.dtype_name)

    def survey(self, size: int) -> "Survey":
        """Of the class, in torch. Errors: CheckpointError for a class that is not served, or that `size` ranks cannot share."""
        if size not in self.surveys:
            from workers.model.transformers.survey import survey

            self.surveys[size] = survey(self.text, size)
        return self.surveys[size]

    def remarks(self, size: int) -> list[str]:
        """What whoever serves it with so many ranks should know."""
        said = self.survey(size).costs()
        if self.part_of is not None:
            said.append(f"the text part of {self.part_of} is served: it sees and hears nothing")
        if self.text.model_type not in COMPARED:
            said.append(f"nobody has compared the outputs of {self.text.model_type} with transformers' own (docs/models.md)")
        return said

    def require(self, size: int, device: str = "cpu") -> None:
        """device: where it is computed. Errors: CheckpointError if that many ranks cannot share this model, or its attention is
        not computed there. Where transformers was imported without torch that is left to those who have it."""
        if is_torch_available():
            found = self.survey(size)
            lacking = found.kernels_lack() if device != "cpu" else None
            if lacking is not None:
                raise CheckpointError(f"{self.architecture}: {lacking}")

    def window(self, positions: int) -> int | None:
        """As of `widest_window`. Where transformers was imported without torch nobody can tell, and nothing is given back."""
        return widest_window(self.survey(1).forms, positions) if is_torch_available() else None

    def narrow(self, positions: int) -> tuple[tuple[bool, ...], int | None]:
        """As of `narrow_layers`."""
        return narrow_layers(self.survey(1).forms, positions) if is_torch_available() else ((), None)

    def shard(self, rank: int, size: int) -> RankShape:
        """Rank `rank` of `size`. head_dim, kv_heads: of the pool, wide enough for every layer. Where each rank has all heads,
        it starts with the first. Errors: as of `survey`."""
        found = self.survey(size)
        most = max(layer.heads for layer in found.heads)
        kv_heads, head_dim = found.pool_heads
        divided = found.heads != self.survey(1).heads
        vocab = -(-self.vocab_size // size)
        return RankShape(
            rank=rank,
            size=size,
            layers=len(found.heads),
            head_dim=head_dim,
            heads=most,
            head_start=rank * most if divided else 0,
            kv_heads=kv_heads,
            kv_head_start=rank * self.survey(1).pool_heads[0] // size if divided else 0,
            intermediate=0,
            intermediate_start=0,
            vocab=vocab,
            vocab_start=rank * vocab,
            vocab_real=max(0, min(vocab, self.vocab_size - rank * vocab)),
        )


def read_transformers(folder: Path) -> TransformersConfig:
    """Errors: CheckpointError, for what is not served, by name and reason."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder: give the path of a checkpoint folder in Hugging Face format")
    fields = Fields(read_json(folder / "config.json"), folder / "config.json")
    text = _text_config(fields, folder)
    vocab_size = _positive(fields, text, "vocab_size")
    dtype = None if text.dtype is None else str(text.dtype).removeprefix("torch.")
    if dtype is not None and dtype not in DTYPES:
        raise fields.error(f"dtype {dtype!r} is not supported: choose a checkpoint in one of {', '.join(DTYPES)}")
    return TransformersConfig(
        architecture=MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text.model_type],
        text=text,
        vocab_size=vocab_size,
        max_position=_positions(fields, text),
        dtype_name=dtype,
        eos_ids=_eos_ids(fields, text, folder, vocab_size),
        part_of=None if text.model_type == fields.get("model_type") else str(fields.get("model_type")),
        scheme=read_scheme(fields) or read_scheme(fields.nested("text_config")),
    )


def _text_config(fields: Fields, folder: Path) -> Any:
    """transformers' configuration of the checkpoint's decoder, of its text part where it also sees or hears."""
    kind = fields.get("model_type")
    if kind not in transformers.CONFIG_MAPPING:
        brings = " and the checkpoint brings code of its own, which is not run" if fields.has("auto_map") else ""
        raise fields.error(f"model_type={kind!r} is not known to transformers {transformers.__version__}{brings}: {WORKS}")
    try:
        whole = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # each family checks its own fields, with errors of its own
        raise fields.error(f"transformers cannot read it ({error}): repair or download the file again") from error
    if whole.is_encoder_decoder:
        raise fields.error(f"{kind} is an encoder-decoder, and only decoders are served: {WORKS}")
    named = fields.get("architectures", [])
    if named and not any(str(name).endswith(LANGUAGE_MODELS) for name in named):
        raise fields.error(f"architectures={named!r} is no language model: {WORKS}")
    text = whole.get_text_config()
    if text.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise fields.error(f"transformers has no causal language model for {text.model_type} alone: {WORKS}")
    others = sorted(set(getattr(text, "layer_types", None) or []) - ATTENTION_LAYERS)
    if others:
        raise fields.error(f"{text.model_type} has layers of {', '.join(others)}, which are no attention: {WORKS}")
    return text


def _eos_ids(fields: Fields, text: Any, folder: Path, vocab_size: int) -> tuple[int, ...]:
    """Of the checkpoint's files, and of the class where config.json leaves it out."""
    named = read_eos_ids(fields, folder, vocab_size)
    own = getattr(text, "eos_token_id", None)
    ids = own if isinstance(own, list) else [own]
    return tuple(sorted({*named, *(token for token in ids if isinstance(token, int) and 0 <= token < vocab_size)}))


def _positive(fields: Fields, text: Any, name: str) -> int:
    found = getattr(text, name, None)
    if not isinstance(found, int) or found < 1:
        raise fields.error(f"{name} must be a positive integer, found {found!r}: repair or download the file again")
    return found


def _positions(fields: Fields, text: Any) -> int:
    """As many as YaRN stretches to."""
    if getattr(text, "max_position_embeddings", None) is None:
        raise fields.error(
            f"{text.model_type} has no max_position_embeddings, so its positions are told in another way: {WORKS}"
        )
    positions = _positive(fields, text, "max_position_embeddings")
    rope = getattr(text, "rope_parameters", None)
    for kind in [rope, *rope.values()] if isinstance(rope, dict) else []:
        if isinstance(kind, dict) and kind.get("rope_type") == "yarn" and kind.get("original_max_position_embeddings"):
            positions = max(positions, int(kind["original_max_position_embeddings"] * kind.get("factor", 1.0)))
    return positions
