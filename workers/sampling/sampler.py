"""The next token of every sampled position, decided alike by all ranks that each hold a slice of the vocabulary.

A token is argmax(logits / temperature + gumbel(seed, choice, position, id)) over the ids that the filters keep, after
bias, min_tokens, penalties and grammar. Everything stays on the device; parameters come from host tables in one small
copy. The one wait: rows with top_p and no top_k (`_nucleus`). Imports torch, NumPy and the sampler's parts; knows no
model.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from scheduler.protocol.messages import NO_TOKEN
from scheduler.protocol.sampling import SamplingParams
from workers.parallel.communicator import Communicator
from workers.sampling import candidates, logprobs, noise
from workers.sampling.constraints import Allowed
from workers.sampling.logprobs import Logprobs
from workers.sampling.penalties import LogitEdits
from workers.sampling.settings import GREEDY_BELOW, HOTTEST

Ints = npt.NDArray[np.integer]


@dataclass(frozen=True, slots=True)
class Sampled:
    """tokens: [samples] int64 on the device, NO_TOKEN where the edited logits hold NaN or infinity or nothing finite.
    logprobs: None when no row asked."""

    tokens: Tensor
    logprobs: Logprobs | None = None

    def payloads(self) -> list[tuple[int, bytes]]:
        """(sample index, msgpack of `TokenLogprobs`). Only once the device has been synchronised past the step."""
        return [] if self.logprobs is None else self.logprobs.payloads()


@dataclass(frozen=True, slots=True)
class _Settings:
    """The parameters of some samples, each [samples, 1], on the device. keys: [samples, 2] int32, see `noise`."""

    table: Tensor  # [samples, 6] float64

    @property
    def temperature(self) -> Tensor:
        return self.table[:, 0:1]

    @property
    def top_k(self) -> Tensor:
        return self.table[:, 1:2].long()

    @property
    def top_p(self) -> Tensor:
        return self.table[:, 2:3]

    @property
    def min_p(self) -> Tensor:
        return self.table[:, 3:4]

    @property
    def keys(self) -> Tensor:
        return self.table[:, 4:6].int()


class Sampler:
    """One rank's sampler. All ranks make the same calls in the same order and get the same tokens.

    vocab_size: real ids; higher ones are padding, whose logits must be -inf. local_vocab: columns of this rank, which
    owns ids [rank * local_vocab, (rank + 1) * local_vocab). max_num_seqs: rows of the resident batch. dtype: of the logits; the
    arithmetic is float64 for float64 and float32 otherwise.
    Invariant: a row's token depends on its own logits, parameters and history only, never on the rest of the batch.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        local_vocab: int,
        comm: Communicator,
        max_num_seqs: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._vocab_size = vocab_size
        self._first_id = comm.rank * local_vocab
        self._comm = comm
        self._device = device
        self._dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self._edits = LogitEdits(first_id=self._first_id, local_vocab=local_vocab, device=device)
        self._plain = np.ones(max_num_seqs, np.bool_)  # greedy, and nothing else to do
        self._streams = np.zeros(max_num_seqs, np.uint64)
        self._settings = np.zeros((max_num_seqs, 4), np.float64)  # temperature, top_k (0: all), top_p (inf: all), min_p
        self._logprobs = np.full(max_num_seqs, logprobs.NOT_ASKED, np.int64)

    def admit(
        self,
        row: int,
        *,
        params: SamplingParams,
        seed: int,
        choice: int,
        stop_ids: tuple[int, ...],
        prompt: npt.NDArray[np.int32],
        output: npt.NDArray[np.int32],
    ) -> None:
        """A sequence enters the resident batch at `row`. output: tokens emitted before a restart."""
        greedy = params.temperature < GREEDY_BELOW
        top_k = params.top_k if params.top_k < self._vocab_size else 0
        top_p = params.top_p if params.top_p < 1 else np.inf
        temperature = min(params.temperature, HOTTEST)
        self._settings[row] = (1, 1, np.inf, 0) if greedy else (temperature, top_k, top_p, params.min_p)
        self._streams[row] = noise.stream(seed, choice)
        self._logprobs[row] = logprobs.NOT_ASKED if params.logprobs is None else params.logprobs
        edited = self._edits.admit(row, params, stop_ids, prompt, output)
        self._plain[row] = greedy and not edited and params.logprobs is None and params.grammar is None

    def release(self, row: int) -> None:
        """The sequence at `row` has left; its place may be admitted to again."""
        self._edits.release(row)

    @torch.no_grad()
    def sample(self, logits: Tensor, rows: Ints, positions: Ints, allowed: Allowed | None = None) -> Sampled:
        """Draws one token for each of `rows` from `logits` [samples, local_vocab], which are left as they were.

        positions: [samples] index that the new token will have in its sequence, from 0, the prompt included.
        allowed: what those samples may be whose rows have a grammar.
        """
        if not len(rows):
            return Sampled(torch.zeros(0, dtype=torch.int64, device=self._device))
        if self._plain[rows].all():
            return Sampled(self._greedy(logits))
        raw = logits.to(self._dtype)
        tokens = self._draw(self._edits.apply(raw, rows, positions, allowed), rows, positions)
        self._edits.count(tokens, rows)
        return Sampled(tokens, self._measure(raw, tokens, rows))

    @torch.no_grad()
    def measure_prompt(self, logits: Tensor, tokens: npt.NDArray[np.int32], most: int) -> Tensor:
        """`logprobs.measure_prompt` of logits [positions, local_vocab] and the tokens that follow them; on the host once
        the device has been synchronised past it."""
        follow = self._put(tokens.astype(np.int64))
        numbers = logprobs.measure_prompt(self._comm, logits, follow, most, self._vocab_size, self._dtype)
        return numbers.to("cpu", non_blocking=True)

    def _greedy(self, logits: Tensor) -> Tensor:
        column = candidates.argmax(logits)[:, None]
        value = logits.gather(1, column)
        if self._comm.size == 1:
            return _if_finite(column[:, 0], value)
        winner = candidates.agree(self._comm, torch.cat([value.double(), column.double() + self._first_id], 1))
        return _if_finite(winner[:, 1].long(), winner[:, :1])

    def _draw(self, logits: Tensor, rows: Ints, positions: Ints) -> Tensor:
        host = self._settings[rows]
        keys = noise.keys(self._streams[rows], positions)
        settings = _Settings(self._put(np.concatenate([host, keys], axis=1)))
        scaled = logits if (host[:, 0] == 1).all() else logits / settings.temperature.to(self._dtype)
        bounded = host[:, 1] > 0
        if bounded.all():
            return self._draw_bounded(scaled, settings, host)
        if not bounded.any():
            return self._draw_unbounded(scaled, settings, host)
        tokens = torch.empty(len(rows), dtype=torch.int64, device=self._device)
        for draw, chosen in ((self._draw_bounded, bounded), (self._draw_unbounded, ~bounded)):
            at = self._put(np.flatnonzero(chosen))
            tokens[at] = draw(scaled[at], _Settings(settings.table[at]), host[chosen])
        return tokens

    def _draw_bounded(self, scaled: Tensor, settings: _Settings, host: npt.NDArray[np.float64]) -> Tensor:
        """Rows with top_k, greedy ones (top_k 1) among them: each rank's best top_k are all that can matter."""
        count = min(int(host[:, 1].max()), scaled.shape[1])
        values, columns = candidates.top(scaled, count)
        values, ids = candidates.merge(self._comm, values, columns + self._first_id)
        weights = (values - values[:, :1]).double().exp()
        ranks = torch.arange(values.shape[1], device=self._device)
        # A running sum is the same however many candidates other rows want; the mass of those ahead leaves oneself out.
        sums = weights.cumsum(-1)
        ahead = torch.cat([torch.zeros_like(sums[:, :1]), sums[:, :-1]], 1)
        total = sums.gather(1, settings.top_k.clamp(max=values.shape[1]) - 1)
        likely = values >= (values[:, :1] + settings.min_p.log()).to(self._dtype)
        kept = (ranks < settings.top_k) & (ahead < settings.top_p * total) & likely
        scores = values + noise.gumbel(settings.keys, ids.int(), self._dtype)
        scores = scores.masked_fill(~kept, -torch.inf)
        best = scores.amax(-1, keepdim=True)
        return _if_finite(ids.masked_fill(scores < best, torch.iinfo(ids.dtype).max).amin(-1), values[:, :1])

    def _draw_unbounded(self, scaled: Tensor, settings: _Settings, host: npt.NDArray[np.float64]) -> Tensor:
        """Rows without top_k: the best score among the ids that can still win, filtered by min_p and top_p."""
        nucleus = bool(np.isfinite(host[:, 2]).any())
        best, mass = self._summary(scaled, nucleus)
        values, ids = candidates.compact(scaled, self._floor(best, mass, settings), self._first_id)
        scores = noise.gumbel(settings.keys, ids, self._dtype).add_(values)
        if host[:, 3].any():
            scores.masked_fill_(values < (best[:, :1] + settings.min_p.log()).to(self._dtype), -torch.inf)
        if not nucleus:
            return _if_finite(self._winner(scores, values, ids)[:, 1].long(), best[:, :1])
        weights = (values - mass.to(self._dtype)).exp_()
        return _if_finite(self._nucleus(scores, values, ids, weights, settings.top_p), best[:, :1])

    def _summary(self, scaled: Tensor, with_mass: bool) -> tuple[Tensor, Tensor]:
        """The most likely token of all ranks, [samples, (scaled logit, id)] float64, and log(sum(exp)) [samples, 1]."""
        column = candidates.argmax(scaled)[:, None]
        value = scaled.gather(1, column)
        mass = candidates.logsumexp(scaled, value) if with_mass else value
        mass = torch.where(value == -torch.inf, value, mass)  # a shard of nothing but padding
        offer = torch.cat([value.double(), column.double() + self._first_id, mass.double()], 1)
        if self._comm.size == 1:
            return offer[:, :2], offer[:, 2:]
        offers = self._comm.all_gather(offer)
        best = offers[:, :, 0].argmax(0)[None, :, None].expand(1, len(offer), 2)
        return offers[:, :, :2].gather(0, best)[0], offers[:, :, 2].logsumexp(0)[:, None]

    def _floor(self, best: Tensor, mass: Tensor, settings: _Settings) -> Tensor:
        """No id whose scaled logit lies below this can win: [samples, 1], the same on all ranks.

        The most likely id passes every filter, so the winner scores at least as much, and noise adds at most `highest`.
        From the nucleus's last id on lies more than 1 - top_p, shared by no more ids than there are, none likelier.
        """
        score = best[:, :1] + noise.gumbel(settings.keys, best[:, 1:].int(), self._dtype)
        reach = score - noise.highest(self._dtype)
        likely = best[:, :1] + settings.min_p.log()
        inside = mass + ((1 - settings.top_p).clamp(min=0) / self._vocab_size).log()  # -inf without top_p
        floor = torch.maximum(torch.maximum(reach, likely), inside)
        slack = 0.01 + 1e-6 * best[:, :1].abs()  # covers rounding
        return (floor - slack).to(self._dtype)

    def _winner(self, scores: Tensor, values: Tensor, ids: Tensor) -> Tensor:
        """The best score of all ranks: [samples, (score, id, scaled logit)] float64."""
        at = candidates.argmax(scores)[:, None]
        offer = torch.cat([column.gather(1, at).double() for column in (scores, ids, values)], 1)
        return candidates.agree(self._comm, offer)

    def _nucleus(self, scores: Tensor, values: Tensor, ids: Tensor, weights: Tensor, top_p: Tensor) -> Tensor:
        """The best score in the nucleus: the ids ahead of which, in order of likelihood, lies less than top_p. No sort.

        A winner with too much ahead of it is out, and so is all behind it; the best of those ahead is next. Just what
        filtering first gives, in a few rounds (rejection, as in FlashInfer's sampling kernels). Each round waits for
        the device, to learn whether any row is left.
        """
        tokens = torch.empty(len(scores), dtype=torch.int64, device=scores.device)
        left = torch.arange(len(scores), device=scores.device)
        while len(left):
            winner = self._winner(scores, values, ids)
            tokens[left] = winner[:, 1].long()
            value, token = winner[:, 2:].to(values.dtype), winner[:, 1:2].int()
            ahead = (values > value) | ((values == value) & (ids < token))
            mass = self._comm.all_reduce((weights * ahead).sum(-1, keepdim=True, dtype=torch.float64))
            again = (mass >= top_p).squeeze(1).nonzero().squeeze(1)
            left, top_p = left[again], top_p[again]
            scores = scores[again].masked_fill(~ahead[again], -torch.inf)
            values, ids, weights = values[again], ids[again], weights[again]
        return tokens

    def _measure(self, logits: Tensor, tokens: Tensor, rows: Ints) -> Logprobs | None:
        return logprobs.measure_asked(self._comm, [(logits, tokens)], self._logprobs[rows], self._vocab_size, self._dtype)

    def _put(self, array: npt.NDArray[np.float64] | npt.NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)


def _if_finite(tokens: Tensor, best: Tensor) -> Tensor:
    """NO_TOKEN for rows whose best logit [rows, 1], which any NaN takes the place of, is not finite."""
    return tokens.masked_fill(~best.squeeze(1).isfinite(), NO_TOKEN)
