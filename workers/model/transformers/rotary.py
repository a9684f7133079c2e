"""Rotary embeddings that transformers would change with the longest sequence of a batch, held still. Imports torch."""

import logging

import torch
from torch import nn

logger = logging.getLogger(__name__)

HELD = "default"
"""A kind that no forward changes. The frequencies stay what they are."""


def hold_still(model: nn.Module, positions: int | None) -> None:
    """Frequencies from here on are those for sequences of `positions` tokens, whoever is in a step, and nothing waits for the
    device to find that out. None: as they were built.

    LongRoPE: the long factors where `positions` is beyond the original length, for short sequences too (transformers takes the
    short ones for those, and changes in mid-sequence). Dynamic: the plain ones, right up to max_position_embeddings.
    """
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if not isinstance(kinds, str | dict):
            continue
        for layer_type, kind in (kinds.items() if isinstance(kinds, dict) else [(None, kinds)]):
            if kind == "longrope" and positions is not None:
                last = torch.tensor([[positions - 1]], device=module.get_buffer("inv_freq" if layer_type is None else
                                                                                f"{layer_type}_inv_freq").device)  # fmt: skip
                module(last.float(), last, **({} if layer_type is None else {"layer_type": layer_type}))
                logger.info("LongRoPE: the frequencies are those for %d tokens, whatever a sequence's length", positions)
        module.rope_type = dict.fromkeys(kinds, HELD) if isinstance(kinds, dict) else HELD  # type: ignore[assignment]
