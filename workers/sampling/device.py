"""The sampler of a GPU: `Sampler`'s tokens from `workers.kernels.sampling.sample`, in a captured graph or without one.

    inside the graph    sample
    outside, before     admit, release, constrain: copies and small kernels on the same stream, so a later replay sees them
    outside, after      measure, measure_prompt: read the step's logits and tokens

The host waits in none of them. Imports torch, NumPy, the kernels and the sampler's parts; knows no model.
"""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from scheduler.protocol.sampling import SamplingParams
from workers.kernels.launch import processors
from workers.kernels.sampling import marks
from workers.kernels.sampling.record import FLAGS, PENALISED, STOPS_BARRED
from workers.kernels.sampling.sample import Tables, Workspace, geometry, sample
from workers.parallel.communicator import Communicator
from workers.sampling import logprobs, settings
from workers.sampling.logprobs import Logprobs, to_device, to_host
from workers.sampling.settings import Record

Ints = npt.NDArray[np.integer]

INTERPRETED_PROCESSORS = 1


class DeviceSampler:
    """One rank's sampler. All ranks make the same calls in the same order and get the same tokens.

    vocab_size: real ids; columns beyond are padding. max_num_seqs: rows of the batch; one more, which no sequence has, is for
    samples that pad a batch. samples: in a step, at most. dtype: of the logits; arithmetic is float32.
    Tables of [rows + 1, vocab_size] are allocated here, once: see `table_bytes`.
    Invariant: a row's token depends on its own logits, settings and history only, never on the rest of the batch.
    """

    def __init__(
        self, *, vocab_size: int, comm: Communicator, max_num_seqs: int, samples: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        if dtype == torch.float64:
            raise ValueError("the GPU's sampler takes bfloat16, float16 and float32 logits, not float64; choose one of them")
        self._vocab_size = vocab_size
        self._comm = comm
        self._device = device
        self._marks = torch.zeros(max_num_seqs + 1, vocab_size, dtype=torch.int32, device=device)
        self._bias = torch.zeros(max_num_seqs + 1, vocab_size, dtype=torch.float32, device=device)
        self._mask = torch.full((max_num_seqs + 1, -(-vocab_size // 32)), -1, dtype=torch.int32, device=device)
        self._workspace = Workspace(samples, device)
        self._logprobs = np.full(max_num_seqs, logprobs.NOT_ASKED, np.int64)
        self._processors = processors(device) if device.type == "cuda" else INTERPRETED_PROCESSORS

    @staticmethod
    def table_bytes(vocab_size: int, max_num_seqs: int) -> int:
        """What the tables take, in bytes: to be set aside before the blocks of the KV cache."""
        return (max_num_seqs + 1) * (vocab_size * 8 + -(-vocab_size // 32) * 4)

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
    ) -> Record:
        """A sequence enters the resident batch at `row`. output: tokens emitted before a restart.

        Returns its record, which must be in row `row` of `sample`'s settings when the sequence is first sampled.
        """
        self._logprobs[row] = logprobs.NOT_ASKED if params.logprobs is None else params.logprobs
        record = settings.record(
            params, seed=seed, choice=choice, stop_ids=stop_ids, prompt_tokens=len(prompt), vocab_size=self._vocab_size
        )
        flags = int(record[FLAGS])
        penalised, barred = flags & PENALISED, flags & STOPS_BARRED
        nothing = np.zeros(0, np.int32)
        if penalised or barred:
            self._marks[row].zero_()
        if params.logit_bias:
            self._bias[row].zero_()
        marks.fill(
            self._marks[row],
            self._bias[row],
            prompt=prompt if penalised else nothing,
            output=output if penalised else nothing,
            stops=np.array(sorted(set(stop_ids)), np.int64).clip(-1, 2**31 - 1).astype(np.int32) if barred else nothing,
            biases=params.logit_bias,
        )
        return record

    def release(self, row: int) -> None:
        """The sequence at `row` has left; its place may be admitted to again."""
        self._logprobs[row] = logprobs.NOT_ASKED

    def constrain(self, rows: Ints, bits: npt.NDArray[np.int32]) -> None:
        """What the next tokens of rows with a grammar may be: [rows], [rows, words] bit id % 32 of word id // 32."""
        bits = np.ascontiguousarray(bits[:, : self._mask.shape[1]])  # padded ids may have words of their own
        self._mask.index_copy_(0, to_device(rows.astype(np.int64), self._device), to_device(bits, self._device))

    @torch.no_grad()
    def sample(
        self, logits: Tensor, rows: Tensor, positions: Tensor, table: Tensor, out_tokens: Tensor, last_token: Tensor
    ) -> None:
        """Draws one token for each of `rows` from this rank's `logits` [samples, local columns], which are left as they were.

        rows, positions: [samples] int32. table: [rows + 1, WORDS] int32, the records, the last all zeros. out_tokens:
        [samples], written: NO_TOKEN where nothing can be drawn. last_token: [rows + 1], written where sampled. Both int32 or
        int64.
        """
        if self._comm.size > 1:
            logits = self._comm.all_gather(logits).movedim(0, 1).flatten(1)
        sample(
            logits,
            rows,
            positions,
            table,
            Tables(self._marks, self._bias, self._mask),
            out_tokens,
            last_token,
            vocab_size=self._vocab_size,
            workspace=self._workspace,
            plan=geometry(len(rows), self._processors),
        )

    def measures(self, rows: Ints) -> bool:
        """Whether one of `rows` asked for log-probabilities."""
        return bool((self._logprobs[rows] != logprobs.NOT_ASKED).any())

    @torch.no_grad()
    def measure(self, drawn: Iterable[tuple[Tensor, Tensor]], rows: Ints) -> Logprobs | None:
        """The log-probabilities that samples asked for. drawn: as in `logprobs.measure_asked`. rows: of all, on the host."""
        return logprobs.measure_asked(self._comm, drawn, self._logprobs[rows], self._vocab_size, torch.float32)

    @torch.no_grad()
    def measure_prompt(self, logits: Tensor, tokens: npt.NDArray[np.int32], most: int) -> Tensor:
        """`logprobs.measure_prompt` of logits [positions, local columns] and the tokens that follow them; on the host once
        the device has been synchronised past it."""
        follow = to_device(tokens.astype(np.int64), self._device)
        numbers = logprobs.measure_prompt(self._comm, logits, follow, most, self._vocab_size, torch.float32)
        return to_host(numbers)
