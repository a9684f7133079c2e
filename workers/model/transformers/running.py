"""A step through one of transformers' classes: what is under its head, then its head with all that the class does behind it.

Imports torch and transformers.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


class Positions:
    """What stands for a cache where a class counts from its length, not by `position_ids`: one for each token, so that it
    gets its own position in a batch of several sequences. Keys and values are kept by attention alone."""

    def __init__(self, positions: Tensor) -> None:
        self._before = positions - torch.arange(len(positions), device=positions.device)

    def get_seq_length(self, layer_idx: int = 0) -> Tensor:  # noqa: ARG002
        """[tokens]"""
        return self._before

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        return key, value


class BodyOutput:
    """A body's output with hidden states [1, wanted, hidden] and nothing else: what families have beside them is None."""

    def __init__(self, last_hidden_state: Tensor) -> None:
        self.last_hidden_state = last_hidden_state

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, place: int | slice) -> Any:
        return (self.last_hidden_state,)[place]


def hidden_of(model: Any, tokens: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
    """tokens, positions [tokens] int64, rows [wanted] int64 -> [wanted, hidden]: what the head is given."""
    out = _body(model)(
        input_ids=tokens[None], position_ids=positions[None], past_key_values=Positions(positions), use_cache=False,
        return_dict=True,
    )  # fmt: skip
    hidden: Tensor = out.last_hidden_state[0].index_select(0, rows)
    return hidden


def logits_of(model: Any, hidden: Tensor) -> Tensor:
    """hidden [wanted, hidden] -> [wanted, the rank's vocabulary]. The class's own forward, over a body that has said this."""
    body = _body(model)
    forward, body.forward = body.forward, lambda *_, **__: BodyOutput(hidden[None])
    try:
        ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
        logits: Tensor = model(input_ids=ids, use_cache=False, return_dict=True).logits
    finally:
        body.forward = forward
    return logits[0]


def _body(model: Any) -> Any:
    """The model without its head."""
    return next(child for child in model.children() if isinstance(child, PreTrainedModel))
