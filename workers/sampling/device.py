"""The sampler of a GPU: tables that live on the device, and one call that may be captured in a graph.

    marks  [rows + 1, vocab]       int32    how often each id was emitted, and whether it is in the prompt or a barred stop id
    bias   [rows + 1, vocab]       float32
    mask   [rows + 1, vocab / 32]  int32    what a grammar allows

A row that uses none of them touches none. The ranks of a group gather their shards of the logits, and each draws the same token.
Imports torch, the kernels of `kernels.sample`, and the parts that CPUs use too.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from scheduler.sampling import SamplingParams
from workers.kernels.sample import BARRED_STOP, IN_PROMPT, Tables, Workspace, sample
from workers.parallel.communicator import Communicator
from workers.sampling import logprobs
from workers.sampling.logprobs import Logprobs
from workers.sampling.settings import BIASED, FLAGS, PENALISED, STOPS_BARRED, Record, record

Ints = npt.NDArray[np.integer]
NO_LOGPROBS = -1


class DeviceSampler:
    """One rank's sampler. All ranks make the same calls in the same order and get the same tokens.

    vocab_size: real ids. local_vocab: columns of this rank. rows: of the resident batch; one more is for padding. most: decodes
    in one step. dtype: of the logits.
    """

    def __init__(
        self, *, vocab_size: int, local_vocab: int, comm: Communicator, rows: int, most: int, device: torch.device,
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self._vocab_size = vocab_size
        self._comm = comm
        self._device = device
        self._dtype = dtype
        words = -(-local_vocab * comm.size // 32)
        self._tables = Tables(
            marks=torch.zeros(rows + 1, vocab_size, dtype=torch.int32, device=device),
            bias=torch.zeros(rows + 1, vocab_size, dtype=torch.float32, device=device),
            mask=torch.full((rows + 1, words), -1, dtype=torch.int32, device=device),
        )
        self._workspace = Workspace(max(most, rows), device)
        self._logprobs = np.full(rows, NO_LOGPROBS, np.int64)

    # ---- rows

    def admit(
        self, row: int, *, params: SamplingParams, seed: int, choice: int, stop_ids: tuple[int, ...],
        prompt: npt.NDArray[np.int32], output: npt.NDArray[np.int32],
    ) -> Record:  # fmt: skip
        """A sequence enters at `row`; returns its settings. output: tokens emitted before a restart."""
        settings = record(
            params, seed=seed, choice=choice, stop_ids=stop_ids, prompt_tokens=len(prompt), vocab_size=self._vocab_size
        )
        self._logprobs[row] = NO_LOGPROBS if params.logprobs is None else params.logprobs
        flags = int(settings[FLAGS])
        if flags & (PENALISED | STOPS_BARRED):
            self._mark(row, stop_ids if flags & STOPS_BARRED else (), prompt, output)
        if flags & BIASED:
            self._bias(row, params.logit_bias)
        return settings

    def release(self, row: int) -> None:
        """The sequence at `row` has left."""
        self._logprobs[row] = NO_LOGPROBS

    def allow(self, rows: Ints, bits: npt.NDArray[np.int32]) -> None:
        """What grammars allow next: bits [n, words] for rows [n]."""
        mask = self._tables.mask
        assert mask is not None
        mask.index_copy_(0, self._put(rows.astype(np.int64)), self._put(np.ascontiguousarray(bits)))

    def _mark(self, row: int, stop_ids: Sequence[int], prompt: Ints, output: Ints) -> None:
        marks = self._tables.marks
        assert marks is not None
        ids, counts = np.unique(output[output < self._vocab_size], return_counts=True)
        marked = np.zeros(self._vocab_size, np.int32)
        marked[ids] = counts
        marked[prompt[prompt < self._vocab_size]] |= IN_PROMPT
        marked[[stop for stop in stop_ids if stop < self._vocab_size]] |= BARRED_STOP
        marks[row].copy_(self._put(marked))

    def _bias(self, row: int, biases: dict[int, float]) -> None:
        bias = self._tables.bias
        assert bias is not None
        biased = np.zeros(self._vocab_size, np.float32)
        for token, value in biases.items():
            if token < self._vocab_size:
                biased[token] = value
        bias[row].copy_(self._put(biased))

    # ---- steps

    def sample(
        self, logits: Tensor, rows: Tensor, positions: Tensor, settings: Tensor, last_token: Tensor, out: Tensor
    ) -> None:
        """Draws a token for each of rows [n] int32 from logits [n, local_vocab], on the device alone: may be captured.

        positions: [n] int32 index that the token will have. settings: of all rows. Written: out [n] int32, last_token [rows + 1].
        """
        sample(
            self.whole(logits), rows, positions, settings, self._tables, out, last_token, vocab_size=self._vocab_size,
            workspace=self._workspace,
        )  # fmt: skip

    def whole(self, logits: Tensor) -> Tensor:
        """The logits of all ranks, [n, vocab]."""
        if self._comm.size == 1:
            return logits
        return self._comm.all_gather(logits).transpose(0, 1).reshape(len(logits), -1)

    def measure(self, logits: Sequence[Tensor], sampled: Tensor, rows: Ints) -> Logprobs | None:
        """Log-probabilities for the samples whose rows asked. logits: raw, in parts, together [n, local_vocab]. sampled: [n]."""
        counts = self._logprobs[rows]
        asked = np.flatnonzero(counts != NO_LOGPROBS)
        if not len(asked):
            return None
        at = self._put(asked)
        most = int(counts[asked].max())
        raw = torch.cat(list(logits)).index_select(0, at).float()
        numbers = logprobs.measure(self._comm, raw, sampled.index_select(0, at).long(), most, self._vocab_size)
        return Logprobs(tuple(asked.tolist()), tuple(counts[asked].tolist()), self._fetch(numbers))

    def measure_prompt(self, logits: Tensor, tokens: npt.NDArray[np.int32], most: int) -> Tensor:
        """As `Sampler.measure_prompt`."""
        follow = self._put(tokens.astype(np.int64))
        dtype = torch.float64 if self._dtype == torch.float64 else torch.float32
        return self._fetch(logprobs.measure_prompt(self._comm, logits, follow, most, self._vocab_size, dtype))

    def _put(self, array: npt.NDArray[np.int64] | npt.NDArray[np.int32] | npt.NDArray[np.float32]) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else tensor

    def _fetch(self, numbers: Tensor) -> Tensor:
        """On the host once the device is past it."""
        if self._device.type != "cuda":
            return numbers
        host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        return host.copy_(numbers, non_blocking=True)
