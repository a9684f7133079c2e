"""What changes logits before temperature: logit bias, min_tokens, the penalties on tokens seen, and grammars. By row.

A row that uses none of them costs nothing. Token counts live on the device, where the next step needs them; all else
is host bookkeeping. Imports torch, NumPy, the request's parameters and what a grammar allows.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from scheduler.protocol.sampling import SamplingParams
from workers.sampling import settings
from workers.sampling.constraints import Allowed

Ints = npt.NDArray[np.integer]


@dataclass(frozen=True, slots=True)
class _RowEdits:
    """One resident row. Columns: indices into this rank's shard. place: its place in the count tables, if it has one."""

    bias_columns: npt.NDArray[np.int64]
    bias: npt.NDArray[np.float64]
    stop_columns: npt.NDArray[np.int64]
    stop_from: int  # the first position at which a stop id may be sampled
    place: int | None
    params: SamplingParams


class LogitEdits:
    """Applies each row's bias, min_tokens, penalties and grammar to its logits, in that order, and counts what is sampled.

    Ids that this rank does not own are ignored. Order of calls: admit, then (apply, count) for each step, then release.
    """

    def __init__(self, *, first_id: int, local_vocab: int, device: torch.device) -> None:
        self._first_id = first_id
        self._width = local_vocab
        self._device = device
        self._rows: dict[int, _RowEdits] = {}
        self._free_places: list[int] = []
        # [places, local_vocab]: how often an id was emitted, and whether it is in the prompt
        self._output = torch.zeros(0, local_vocab, dtype=torch.int32, device=device)
        self._prompt = torch.zeros(0, local_vocab, dtype=torch.bool, device=device)

    def admit(self, row: int, params: SamplingParams, stop_ids: tuple[int, ...], prompt: Ints, output: Ints) -> bool:
        """Takes over `row`. Returns whether its logits will ever be changed."""
        self.release(row)
        place = self._take_place(prompt, output) if settings.penalises(params) else None
        stops = stop_ids if params.min_tokens > 0 else ()
        if place is None and not params.logit_bias and not stops:
            return False
        bias_ids = np.fromiter(params.logit_bias, np.int64, len(params.logit_bias))
        bias = np.fromiter(params.logit_bias.values(), np.float64, len(params.logit_bias))
        owned = self._owned(bias_ids)
        self._rows[row] = _RowEdits(
            bias_columns=bias_ids[owned] - self._first_id,
            bias=bias[owned],
            stop_columns=self._columns(np.unique(np.array(stops, np.int64))),
            stop_from=len(prompt) + params.min_tokens,
            place=place,
            params=params,
        )
        return True

    def release(self, row: int) -> None:
        edits = self._rows.pop(row, None)
        if edits is not None and edits.place is not None:
            self._free_places.append(edits.place)

    def apply(self, logits: Tensor, rows: Ints, positions: Ints, allowed: Allowed | None = None) -> Tensor:
        """Returns edited logits [samples, local_vocab]; the argument is left as it was."""
        edits = [(sample, self._rows[row]) for sample, row in enumerate(rows.tolist()) if row in self._rows]
        if edits:
            logits = self._edit(logits.clone(), edits, positions)
        return logits if allowed is None else self._bar(logits, allowed)

    def _edit(self, logits: Tensor, edits: list[tuple[int, _RowEdits]], positions: Ints) -> Tensor:
        biased = [(sample * self._width + row.bias_columns, row.bias) for sample, row in edits if len(row.bias)]
        if biased:
            bias = self._put(np.concatenate([bias for _, bias in biased])).to(logits.dtype)
            logits.view(-1).index_add_(0, self._put(np.concatenate([at for at, _ in biased])), bias)
        barred = [
            sample * self._width + row.stop_columns
            for sample, row in edits
            if len(row.stop_columns) and positions[sample] < row.stop_from
        ]
        if barred:
            logits.view(-1).index_fill_(0, self._put(np.concatenate(barred)), -torch.inf)
        self._penalise(logits, edits)
        return logits

    def _bar(self, logits: Tensor, allowed: Allowed) -> Tensor:
        """-inf for what the grammars forbid. An accelerator is sent bits, an eighth of the bytes, and spreads them itself."""
        first, last = self._first_id // 8, -(-(self._first_id + self._width) // 8)
        octets = allowed.bits.view(np.uint8)[:, first:last]
        if logits.is_cpu:
            bits = torch.from_numpy(np.unpackbits(octets, axis=1, bitorder="little").view(np.bool_))
        else:
            shifts = torch.arange(8, dtype=torch.uint8, device=self._device)
            bits = (self._put(octets)[:, :, None] >> shifts & 1).flatten(1).bool()
        kept = bits[:, self._first_id % 8 :][:, : self._width]
        if len(allowed.samples) == len(logits):
            return torch.where(kept, logits, -torch.inf)
        samples = self._put(allowed.samples)
        return logits.index_copy(0, samples, torch.where(kept, logits[samples], -torch.inf))

    def count(self, tokens: Tensor, rows: Ints) -> None:
        """Counts the sampled `tokens` [samples] as output of their rows."""
        counted = [(i, place) for i, row in enumerate(rows.tolist()) if (place := self._place(row)) is not None]
        if not counted:
            return
        samples, places = self._put(np.array(counted, np.int64).T)
        columns = tokens[samples] - self._first_id
        owned = (columns >= 0) & (columns < self._width)
        at = places * self._width + columns.clamp(0, self._width - 1)
        self._output.view(-1).index_add_(0, at, owned.int())

    def _penalise(self, logits: Tensor, edits: Iterable[tuple[int, _RowEdits]]) -> None:
        penalised = [(sample, row.place, row.params) for sample, row in edits if row.place is not None]
        if not penalised:
            return
        factors = self._put(np.array([settings.penalties(params) for _, _, params in penalised], np.float64)).to(logits.dtype)
        if not logits.is_cpu:
            samples, places = self._put(np.array([(sample, place) for sample, place, _ in penalised], np.int64).T)
            output, prompt = self._output[places], self._prompt[places]
            logits[samples] = _penalise(logits[samples], output, prompt, factors.T[:, :, None])
            return
        for (sample, place, _), factor in zip(penalised, factors, strict=True):  # only the ids seen, without waiting
            output, prompt = self._output[place], self._prompt[place]
            seen = torch.from_numpy(np.flatnonzero(((output > 0) | prompt).numpy()))
            logits[sample, seen] = _penalise(logits[sample, seen], output[seen], prompt[seen], factor)

    def _place(self, row: int) -> int | None:
        edits = self._rows.get(row)
        return None if edits is None else edits.place

    def _take_place(self, prompt: Ints, output: Ints) -> int:
        if not self._free_places:
            self._grow()
        place = self._free_places.pop()
        emitted = self._put(self._columns(output))
        self._output[place] = 0
        self._output[place].index_add_(0, emitted, torch.ones_like(emitted, dtype=torch.int32))
        self._prompt[place] = False
        self._prompt[place].index_fill_(0, self._put(self._columns(prompt)), True)
        return place

    def _grow(self) -> None:
        places = len(self._output)
        more = max(4, places)
        self._free_places = list(range(places + more - 1, places - 1, -1))
        with torch.inference_mode(False):  # else a table grown inside inference mode could not be updated outside it
            self._output = torch.cat([self._output, self._output.new_zeros(more, self._width)])
            self._prompt = torch.cat([self._prompt, self._prompt.new_zeros(more, self._width)])

    def _owned(self, ids: Ints) -> npt.NDArray[np.bool_]:
        return (ids >= self._first_id) & (ids < self._first_id + self._width)

    def _columns(self, ids: Ints) -> npt.NDArray[np.int64]:
        return ids[self._owned(ids)].astype(np.int64) - self._first_id

    def _put(self, array: npt.NDArray[np.int64] | npt.NDArray[np.float64] | npt.NDArray[np.uint8]) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        return tensor.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else tensor


def _penalise(logits: Tensor, output: Tensor, prompt: Tensor, factors: Tensor) -> Tensor:
    """Some logits after their penalties. output: how often each id was emitted; prompt: whether it is in the prompt."""
    repetition, frequency, presence = factors.unbind()
    emitted = output > 0
    repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
    penalised = torch.where(emitted | prompt, repeated, logits)
    return penalised - frequency * output - presence * emitted
