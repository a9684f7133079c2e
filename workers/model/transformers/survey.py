"""What a class does with attention, found by running it on the meta device: each layer's heads and form, on a rank of so many.

No field of config.json is read for it, since each family names them in its own way. Imports torch and this room.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workers.attention.forms import Form, HeadShape
from workers.model.config.fields import CheckpointError
from workers.model.transformers.attention import AttentionSlot, NotComputed
from workers.model.transformers.classes import build
from workers.model.transformers.compared import WORKS
from workers.model.transformers.rotary import hold_still
from workers.model.transformers.running import hidden_of, logits_of
from workers.model.transformers.sharding import head_is_shared, share_out, shares
from workers.parallel.silent import Silent

TOKENS = 3

KERNELS_HEAD_DIM = 512
"""Of keys or values, at most: beyond that a span of keys does not fit a multiprocessor."""


@dataclass(frozen=True, slots=True)
class Survey:
    """One rank's. heads, forms: of each layer. shared_head: each rank has its own part of the logits."""

    heads: tuple[HeadShape, ...]
    forms: tuple[Form, ...]
    shared_head: bool

    @property
    def pool_heads(self) -> tuple[int, int]:
        """KV heads of the pool and their size: those of all layers where they are the same, else one head as wide as the widest
        layer's."""
        sizes = self._sizes()
        return sizes.pop() if len(sizes) == 1 else (1, max(layer.width for layer in self.heads))

    def _sizes(self) -> set[tuple[int, int]]:
        return {(layer.kv_heads, max(layer.key_dim, layer.value_dim)) for layer in self.heads}

    def kernels_lack(self) -> str | None:
        """Why the kernels for GPUs cannot attend for these layers, in words."""
        for layer, heads in enumerate(self.heads):
            if heads.even.key_dim > KERNELS_HEAD_DIM:
                return (
                    f"layer {layer} has heads of {heads.even.key_dim} numbers, and the kernels for GPUs take up to "
                    f"{KERNELS_HEAD_DIM}: choose device cpu"
                )
        return None

    def costs(self) -> list[str]:
        """What the pool holds beside what some layer needs, in words."""
        said = []
        if any(layer.key_dim != layer.value_dim for layer in self.heads):
            said.append("keys and values differ in size: both take the room of the larger")
        if len({layer.width for layer in self.heads}) > 1:
            said.append("layers differ in their heads: each takes the room of the widest")
        return said


def survey(config: Any, size: int) -> Survey:
    """Of rank 0 of `size`; the others are the same. Errors: CheckpointError for a class that does what is not computed here, or
    that so many ranks cannot share."""
    whole = _run(config, 1)
    if size == 1:
        return whole
    found = _run(config, size)
    for layer, (all_heads, ours) in enumerate(zip(whole.heads, found.heads, strict=True)):
        shared = all_heads.heads // ours.heads, all_heads.kv_heads // ours.kv_heads
        few = min(size, all_heads.kv_heads)  # ranks beyond the KV heads hold a neighbour's
        if shared not in ((1, 1), (size, few)) or all_heads.key_dim != ours.key_dim:
            raise CheckpointError(
                f"tensor parallel size {size} does not divide the {all_heads.heads} query and {all_heads.kv_heads} KV heads of "
                f"layer {layer} of {config.model_type}: choose another tensor_parallel_size"
            )
    return found


def _run(config: Any, size: int) -> Survey:
    model = build(config).to(torch.bfloat16)  # some operations have shapes for it alone
    found = shares(model, size)
    for name, share in found.items():
        module, _, leaf = name.rpartition(".")
        parameters = model.get_submodule(module)._parameters
        if share.dim is not None and leaf in parameters:
            part = parameters[leaf].new_empty(share.shape(tuple(parameters[leaf].shape), 0, size))
            parameters[leaf] = torch.nn.Parameter(part, requires_grad=False)
    share_out(model, found, Silent(size))
    hold_still(model, None)
    heads: dict[int, HeadShape] = {}
    forms: dict[int, Form] = {}

    def attends(layer: int, query: Tensor, key: Tensor, value: Tensor, form: Form, sinks: Tensor | None) -> Tensor:  # noqa: ARG001
        if layer in heads:
            raise NotComputed(f"layer {layer} attends twice")
        heads[layer] = HeadShape(query.shape[1], key.shape[1], key.shape[2], value.shape[2])
        forms[layer] = form
        return query.new_empty(*query.shape[:2], value.shape[2])

    AttentionSlot(model).attends = attends
    try:
        with torch.inference_mode(), torch.device("meta"):
            tokens, positions = torch.zeros(TOKENS, dtype=torch.int64), torch.arange(TOKENS)
            logits_of(model, hidden_of(model, tokens, positions, torch.zeros(1, dtype=torch.int64)))
    except NotComputed as error:
        raise CheckpointError(f"{type(model).__name__} is not served: {error}: {WORKS}") from error
    except Exception as error:  # whatever a class of somebody else's may raise where its parameters do not fit each other
        name, found_so = type(model).__name__, f"({type(error).__name__}: {error})"
        if size > 1:
            raise CheckpointError(f"{name} cannot be run by {size} ranks {found_so}") from error
        raise CheckpointError(
            f"{name} is not served: what it asks of attention is found by running it without its numbers and with no cache of "
            f"transformers', and it cannot be run so {found_so}: {WORKS}"
        ) from error
    layers = int(config.num_hidden_layers)
    if sorted(heads) != list(range(len(heads))) or len(heads) < layers:
        raise CheckpointError(
            f"{type(model).__name__} is not served: of its {layers} layers {len(heads)} attend through transformers' registry, "
            f"so the others are recurrent, or keep what no KV cache has: {WORKS}"
        )
    order = range(len(heads))
    return Survey(tuple(heads[n] for n in order), tuple(forms[n] for n in order), size > 1 and head_is_shared(model, found))
