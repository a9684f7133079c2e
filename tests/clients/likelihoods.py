"""Run by the tests of lm-eval, in Manta's own environment: what transformers says of continuations, token by token.

    python -m tests.clients.likelihoods CHECKPOINT < pairs        JSON: [[ids of the context, ids of what follows], ...]
"""

import json
import sys
from pathlib import Path

import torch

from tests.shared.checkpoints import load_reference


@torch.no_grad()
def likelihoods(checkpoint: Path, pairs: list[tuple[list[int], list[int]]]) -> list[float]:
    """The sum of the log-probabilities of each continuation, in nats."""
    model = load_reference(checkpoint)
    sums = []
    for context, continuation in pairs:
        logits = model(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1]
        rows = torch.log_softmax(logits.float(), dim=-1)
        sums.append(float(rows.gather(1, torch.tensor(continuation)[:, None]).sum()))
    return sums


if __name__ == "__main__":
    print(json.dumps(likelihoods(Path(sys.argv[1]), json.load(sys.stdin))))
