"""Our attention as transformers' classes call it: one name in its registry, and behind it whatever a model was given.

Imports torch, transformers, and the forms of attention. Registered under a name that has no mask: transformers then builds
none, and what a layer sees follows from the call and from the layer's type in config.json.
"""

from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface

from workers.attention.forms import Form

NAME = "manta"
SLOT = "manta_slot"
"""Attribute of every layer's modules. An argument would not do: some classes hand none on to their attention."""

HARMLESS = {
    "dropout", "position_ids", "use_cache", "cache_position", "output_attentions", "output_hidden_states",
    "output_router_logits", "is_causal", "return_dict", "logits_to_keep", "position_embeddings",
}  # fmt: skip
"""What classes hand over that changes nothing here. Whatever else comes with a value must be computed, or refused."""


class NotComputed(Exception):
    """A class asks its attention for something that is not computed here; the message says what."""


class Attends(Protocol):
    """query, key, value [tokens, heads, dim] of one layer, sinks [heads] if its form has them -> [tokens, heads, value dim]."""

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, form: Form, sinks: Tensor | None
    ) -> Tensor: ...


class AttentionSlot:
    """Where a model's layers find what computes their attention in the step under way."""

    __slots__ = ("attends",)

    def __init__(self, model: nn.Module) -> None:
        self.attends: Attends | None = None
        for module in model.modules():
            if hasattr(module, "layer_idx"):
                object.__setattr__(module, SLOT, self)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None,
    sliding_window: int | None = None, softcap: float | None = None, s_aux: Tensor | None = None, **others: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """query [1, heads, tokens, dim], key and value [1, kv_heads, tokens, dim] -> [1, tokens, heads, value dim]."""
    slot: AttentionSlot | None = getattr(module, SLOT, None)
    if slot is None or slot.attends is None:
        raise NotComputed(f"{type(module).__name__} attends, and is no layer")
    if attention_mask is not None:
        raise NotComputed("it masks its attention in a way of its own")
    if others.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise NotComputed("its tokens see those that follow")
    unknown = [name for name, given in others.items() if given is not None and name not in HARMLESS]
    if unknown:
        raise NotComputed(f"its attention takes {', '.join(sorted(unknown))}")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    window, chunk = _span(module, sliding_window)
    form = Form(scale, window, chunk, softcap, s_aux is not None)
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
    out = slot.attends(module.layer_idx, query, key, value, form, s_aux)
    return out[None], None


def _span(module: Any, sliding_window: int | None) -> tuple[int | None, int | None]:
    """The window and the chunk of a layer: some classes tell them to the mask alone."""
    config = getattr(module, "config", None)
    kinds = getattr(config, "layer_types", None)
    kind = kinds[module.layer_idx] if kinds and module.layer_idx < len(kinds) else None
    if kind == "sliding_attention" and sliding_window is None:
        sliding_window = getattr(config, "sliding_window", None)
    return sliding_window, getattr(config, "attention_chunk_size", None) if kind == "chunked_attention" else None


AttentionInterface.register(NAME, _attention)
