"""Log-probabilities of the model's own distribution, before bias, penalties and temperature, for the rows that asked.

Imports torch, NumPy, msgspec, the wire types and `candidates`.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from scheduler.protocol.messages import PromptLogprobs, TokenLogprobs
from workers.parallel.communicator import Communicator
from workers.sampling import candidates

Ints = npt.NDArray[np.integer]

NOT_ASKED = -1
MEASURED_AT_ONCE = 64
"""Samples, or positions of a prompt, whose logits are widened for the sums at a time: no step that measures memory at a start
does so. 168 MB of 262,144 ids in 16 bits."""


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

    def payloads(self) -> list[tuple[int, bytes]]:
        """(sample index, msgpack of `TokenLogprobs`)."""
        asked = zip(self.indices, self.counts, self.numbers.tolist(), strict=True)
        return [(index, msgspec.msgpack.encode(_entry(numbers, count))) for index, count, numbers in asked]


@dataclass(frozen=True, slots=True)
class PromptPart:
    """Log-probabilities of a part of one prompt on their way to the host.

    index: of the sequence in the step. first: position of the first token measured. count, numbers: as in `Logprobs`.
    """

    index: int
    first: int
    count: int
    numbers: Tensor

    def payload(self) -> bytes:
        """msgpack of `PromptLogprobs`."""
        entries = tuple(_entry(numbers, self.count) for numbers in self.numbers.tolist())
        return msgspec.msgpack.encode(PromptLogprobs(self.first, entries))


def _entry(numbers: list[float], count: int) -> TokenLogprobs:
    most = len(numbers) // 2
    ids = tuple(int(token) for token in numbers[1 : 1 + min(count, most)])
    return TokenLogprobs(numbers[0], ids, tuple(numbers[1 + most : 1 + most + len(ids)]))


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


def measure_asked(
    comm: Communicator, drawn: Iterable[tuple[Tensor, Tensor]], counts: Ints, vocab_size: int, dtype: torch.dtype
) -> Logprobs | None:
    """What the samples of a step asked for; None if none did. Waits for nothing.

    drawn: raw logits [n, local_vocab] and tokens [n] int64 of the step's first samples, of the next ones, ... counts: [samples]
    top entries that each wants, or NOT_ASKED. dtype: of the arithmetic.
    """
    asked = np.flatnonzero(counts != NOT_ASKED)
    if not len(asked):
        return None
    numbers = _in_parts(comm, _picked(drawn, asked), int(counts[asked].max()), vocab_size, dtype)
    return Logprobs(tuple(asked.tolist()), tuple(counts[asked].tolist()), to_host(numbers))


def _picked(drawn: Iterable[tuple[Tensor, Tensor]], asked: npt.NDArray[np.int64]) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits and tokens of those samples, `MEASURED_AT_ONCE` at most."""
    for logits, tokens in drawn:
        here, asked = asked[asked < len(tokens)], asked[asked >= len(tokens)] - len(tokens)
        if len(here):
            for at in torch.split(to_device(here, logits.device), MEASURED_AT_ONCE):
                yield logits[at], tokens[at]


def _in_parts(
    comm: Communicator, parts: Iterable[tuple[Tensor, Tensor]], most: int, vocab_size: int, dtype: torch.dtype
) -> Tensor:
    """`measure`, of one part after another."""
    return torch.cat([measure(comm, logits.to(dtype), tokens, most, vocab_size) for logits, tokens in parts])


def to_host(numbers: Tensor) -> Tensor:
    """On the host once the device has been synchronised past it. Pinned, or a GPU's copy would hold up the host."""
    if not numbers.is_cuda:
        return numbers
    host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    return host.copy_(numbers, non_blocking=True)


def to_device(array: Ints | npt.NDArray[np.int32], device: torch.device) -> Tensor:
    """A copy that the host does not wait for."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def measure_prompt(
    comm: Communicator, logits: Tensor, tokens: Tensor, most: int, vocab_size: int, dtype: torch.dtype
) -> Tensor:
    """As `measure`, for many positions: logits [positions, local_vocab], the tokens that follow them [positions].

    dtype: of the arithmetic.
    """
    parts = zip(torch.split(logits, MEASURED_AT_ONCE), torch.split(tokens, MEASURED_AT_ONCE), strict=True)
    return _in_parts(comm, parts, most, vocab_size, dtype)
