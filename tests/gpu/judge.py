"""Where two runs in float32 may part: rounding decides where two tokens are nearly equal, and nowhere else.

transformers' logits, teacher-forced over a whole output, say for each token whether it is the best, and by how much not.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tests.end_to_end.reference import MOST_EXEMPT, NEAR_TIE, Reference
from tests.workers.stepping import Lease
from workers.sampling import noise
from workers.sampling.settings import GREEDY_BELOW


@dataclass
class Judge:
    """One checkpoint's reference. Tokens that were judged, and those that were nearly ties, in words."""

    path: Path
    judged: int = 0
    exempt: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._reference = Reference(self.path)

    def require_best(self, lease: Lease, where: str) -> None:
        """Each token of a greedy or plainly sampled output is what the reference would choose after those before it."""
        scores = self.scores(lease)
        best = scores.max(-1)
        for at, token in enumerate(lease.tokens):
            gap = float(best.values[at] - scores[at, token])
            assert gap < NEAR_TIE, (
                f"{where}: token {at} after a prompt of {len(lease.work.prompt)} is {token}, the reference says "
                f"{int(best.indices[at])} with a score {gap:.6f} higher; {lease.work.params}\n{lease.tokens}"
            )
            if gap > 0:
                self.exempt.append(f"{where}: token {at} with a gap of {gap:.1e}")
        self.judged += len(lease.tokens)

    def require_same(self, lease: Lease, other: Lease, where: str) -> None:
        """The same tokens; parted at a near tie is exempt where the reference can tell: no penalty, bias or filter."""
        if lease.tokens == other.tokens:
            self.judged += len(lease.tokens)
            return
        at = first_apart(lease.tokens, other.tokens)
        message = f"{where}: apart at token {at} of {lease.work.params}:\n{lease.tokens}\n{other.tokens}"
        assert is_plain(lease), message
        self.require_best(lease, where)
        self.require_best(other, where)

    def require_rare(self) -> None:
        """And says how many there were, for pytest -s or -rP."""
        print(f"{self.path.name}: {self.judged} tokens judged, {len(self.exempt)} nearly tied: {self.exempt}")
        assert len(self.exempt) <= max(1, int(MOST_EXEMPT * self.judged / 20)), "near ties are rare"

    def scores(self, lease: Lease) -> Tensor:
        """[output, vocab]: logits / temperature and the noise of each position."""
        assert is_plain(lease), f"the reference knows no {lease.work.params}"
        logits = self._reference.logits(lease.work.prompt, lease.tokens).double()
        temperature = lease.work.params.temperature
        if temperature < GREEDY_BELOW:
            return logits
        positions = len(lease.work.prompt) + np.arange(len(lease.tokens))
        streams = np.full(len(positions), noise.stream(lease.work.seed, 0), np.uint64)
        ids = torch.arange(logits.shape[1], dtype=torch.int32).expand(len(positions), -1).contiguous()
        keys = torch.from_numpy(noise.keys(streams, positions))
        return logits / temperature + noise.gumbel(keys, ids, torch.float32).double()


def is_plain(lease: Lease) -> bool:
    """Greedy or sampled from all ids, with nothing added to the logits."""
    params = lease.work.params
    filters = params.top_k or params.top_p < 1 or params.min_p or params.logit_bias or params.grammar
    penalties = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
    return not filters and penalties == (1.0, 0.0, 0.0) and not params.min_tokens


def first_apart(ours: list[int], theirs: list[int]) -> int:
    return next((at for at, (one, other) in enumerate(zip(ours, theirs, strict=False)) if one != other), len(ours))
