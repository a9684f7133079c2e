"""Log-probabilities of the model's own distribution, before bias, penalties and temperature, for the rows that asked.

Imports torch, NumPy, msgspec, the wire type and `candidates`.
"""

from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor

from scheduler.messages import TokenLogprobs
from workers import candidates
from workers.communicator import Communicator


@dataclass(frozen=True, slots=True)
class Logprobs:
    """One step's log-probabilities on their way to the host.

    indices: which samples of the step. counts: how many top entries each asked for.
    numbers: [asked, 1 + 2 * most] float64 on the host, chosen | top ids | top log-probabilities; an accelerator may
    still be writing them, so read only once the device has been synchronised past the step.
    """

    indices: tuple[int, ...]
    counts: tuple[int, ...]
    numbers: Tensor

    def payloads(self) -> dict[int, bytes]:
        """{sample index: msgpack of `TokenLogprobs`}."""
        most = self.numbers.shape[1] // 2
        encoded = {}
        for index, count, numbers in zip(self.indices, self.counts, self.numbers.tolist(), strict=True):
            ids = tuple(int(token) for token in numbers[1 : 1 + min(count, most)])
            logprobs = tuple(numbers[1 + most : 1 + most + len(ids)])
            encoded[index] = msgspec.msgpack.encode(TokenLogprobs(numbers[0], ids, logprobs))
        return encoded


def measure(comm: Communicator, logits: Tensor, tokens: Tensor, most: int, vocab_size: int) -> Tensor:
    """Raw logits [asked, local_vocab], sampled ids [asked] -> `Logprobs.numbers` on the device, equal on all ranks."""
    width = logits.shape[1]
    column = tokens[:, None] - comm.rank * width
    owned = (column >= 0) & (column < width)
    chosen = logits.gather(1, column.clamp(0, width - 1)).masked_fill(~owned, -torch.inf)
    best = logits.amax(-1, keepdim=True)
    # A shard of nothing but padding has no mass; its log-sum-exp is -inf, not the NaN of -inf - -inf.
    mass = torch.where(best == -torch.inf, best, candidates.logsumexp(logits, best))
    shares = torch.cat([chosen, mass], 1).double()[None]
    if comm.size > 1:
        shares = comm.all_gather(shares[0])
    total = shares[:, :, 1].logsumexp(0)[:, None]
    logprob = shares[:, :, 0].amax(0)[:, None] - total
    if most == 0:
        return logprob
    values, columns = candidates.top(logits, min(most, width))
    values, ids = candidates.merge(comm, values, columns + comm.rank * width)
    shown = min(most, vocab_size)  # padded ids come last
    return torch.cat([logprob, ids[:, :shown].double(), values[:, :shown].double() - total], 1)
