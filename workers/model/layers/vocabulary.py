"""The vocabulary's two ends, of which each rank holds its share: the embedding and the head.

Imports torch and the communicator's interface. Shapes beside tensors are per rank.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.model.layers.linear import Linear
from workers.parallel.communicator import Communicator


class VocabParallelEmbedding:
    """Each rank holds `vocab` rows from `vocab_start` on; every rank gets the whole embedding of every token."""

    __slots__ = ("_comm", "_start", "weight")

    def __init__(
        self,
        vocab: int,
        vocab_start: int,
        hidden: int,
        dtype: torch.dtype,
        device: torch.device,
        comm: Communicator,
    ) -> None:
        self.weight = torch.empty(vocab, hidden, dtype=dtype, device=device)
        self._start = vocab_start
        self._comm = comm

    def __call__(self, tokens: Tensor) -> Tensor:
        """tokens [tokens] int64 -> [tokens, hidden]"""
        if self._comm.size == 1:
            return F.embedding(tokens, self.weight)
        local = tokens - self._start
        elsewhere = (local < 0) | (local >= self.weight.shape[0])
        rows = F.embedding(local.masked_fill_(elsewhere, 0), self.weight)
        return self._comm.all_reduce(rows.masked_fill_(elsewhere[:, None], 0.0))


class Head:
    """Logits over this rank's share of the vocabulary; the padding columns are -inf."""

    __slots__ = ("_real", "linear")

    def __init__(self, linear: Linear, real: int) -> None:
        self.linear = linear
        self._real = real

    def __call__(self, x: Tensor) -> Tensor:
        """x [samples, hidden] -> [samples, vocab]"""
        return self.mask(self.linear(x))

    def mask(self, logits: Tensor) -> Tensor:
        """logits [samples, vocab], of which the padding columns become -inf, in place."""
        if self._real < self.linear.out_features:
            logits[:, self._real :] = -torch.inf
        return logits
