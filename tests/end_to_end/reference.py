"""transformers as the reference: its greedy tokens, its logits, its embeddings, and when it may be departed from.

Where two tokens are nearly equal in the reference's own logits, rounding decides; such a departure is exempt. Each is
counted, and they must be rare.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import transformers
from torch import Tensor

from tests.shared.checkpoints import load_reference

NEAR_TIE = 1e-3
MOST_EXEMPT = 0.02
"""Share of the sequences that may be exempt."""


@dataclass
class Ledger:
    """Sequences compared so far, and those that were exempt, in words."""

    compared: int = 0
    exempt: list[str] = field(default_factory=list)

    def require_rare(self) -> None:
        allowed = max(1, int(MOST_EXEMPT * self.compared))
        assert len(self.exempt) <= allowed, f"{len(self.exempt)} of {self.compared} were near ties: {self.exempt}"


class Reference:
    """One checkpoint in transformers. Answers are kept: each is computed once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._answers: dict[tuple[tuple[int, ...], int], list[int]] = {}
        self._logits: dict[tuple[int, ...], Tensor] = {}

    @cached_property
    def model(self) -> "torch.nn.Module":
        model: torch.nn.Module = load_reference(self.path)
        model.generation_config.eos_token_id = None  # type: ignore[union-attr]
        return model

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        key = tuple(prompt), count
        if key not in self._answers:
            ids = torch.tensor([prompt])
            out = self.model.generate(  # type: ignore[operator]
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0
            )
            self._answers[key] = out[0, len(prompt) :].tolist()
        return self._answers[key]

    @torch.inference_mode()
    def logits(self, prompt: list[int], output: list[int]) -> Tensor:
        """[output, vocab]: from what the reference chooses each token, after the output's before it. Kept, too."""
        ids = (*prompt, *output[:-1])
        if ids not in self._logits:
            self._logits[ids] = self.model(torch.tensor([ids])).logits[0, len(prompt) - 1 :]
        return self._logits[ids]

    def require_same(self, prompt: list[int], output: list[int], ledger: Ledger, where: str) -> None:
        """Token for token what `generate` would say, which takes a step for each, or first apart at a near tie."""
        told = self.logits(prompt, output)
        expected = told.argmax(-1).tolist()
        ledger.compared += 1
        if output == expected:
            return
        at = next(at for at, (ours, theirs) in enumerate(zip(output, expected, strict=True)) if ours != theirs)
        gap = float(told[at, expected[at]] - told[at, output[at]])
        assert 0.0 <= gap < NEAR_TIE, (
            f"{where}: token {at} after a prompt of {len(prompt)} is {output[at]}, the reference says {expected[at]} "
            f"with a logit {gap:.6f} higher\nours   {output}\ntheirs {expected}"
        )
        ledger.exempt.append(f"{where}, prompt of {len(prompt)}: token {at} with a gap of {gap:.1e}")


@torch.inference_mode()
def embeddings(path: Path, prompts: Sequence[Sequence[int]], pooling: str) -> npt.NDArray[np.float32]:
    """[prompts, hidden], of length 1: of the hidden states of the last layer behind the final norm."""
    model = transformers.AutoModel.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    states = [model(torch.tensor([prompt])).last_hidden_state[0] for prompt in prompts]
    vectors = torch.stack([each.mean(0) if pooling == "mean" else each[-1] for each in states])
    unit: npt.NDArray[np.float32] = torch.nn.functional.normalize(vectors).numpy()
    return unit
