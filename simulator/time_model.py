"""How long a step of a group takes: a line fitted to what matters, so that a replay needs four numbers and no GPU.

    step = decode_step_s + prefilled tokens / prefill_tokens_per_s
                         + decoding sequences * sequence_s + their context tokens * context_token_s

Imports NumPy and msgspec.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

THROUGHPUT_SEQUENCES, THROUGHPUT_OUTPUT, THROUGHPUT_PROMPT = 32, 64, 160
"""The throughput workload of `benchmarks.engine`: sequences, output tokens of each, prompt tokens of each on average."""


@dataclass(frozen=True, slots=True)
class TimeModel:
    """Of one tensor-parallel group; the defaults are near a dense 70B model in bf16 on four H100.

    A step reads the weights once (decode_step_s) and the KV of every token of context (context_token_s). Attention inside
    prefill, which grows with the square of the prompt, is in the rate: give that of your usual prompt.
    """

    prefill_tokens_per_s: float = 6000.0
    decode_step_s: float = 0.015
    sequence_s: float = 3e-5
    context_token_s: float = 2.4e-8

    def __post_init__(self) -> None:
        if not (self.prefill_tokens_per_s > 0 and self.decode_step_s > 0 and min(self.sequence_s, self.context_token_s) >= 0):
            raise ValueError(f"{self}: the prefill rate and the decode step must be above 0, the other times not below")

    def durations_s(self, steps: int, decoding: int, context: int, prefilled: int) -> npt.NDArray[np.float64]:
        """[steps] of equal batches: `decoding` sequences with `context` tokens in all, one more each at every step."""
        first_s = self.decode_step_s + prefilled / self.prefill_tokens_per_s + decoding * self.sequence_s
        grown: npt.NDArray[np.float64] = context + decoding * np.arange(steps, dtype=np.float64)
        return first_s + self.context_token_s * grown

    def times(self, groups: int) -> "TimeModel":
        """One machine with the compute and the bandwidth of so many groups, and the latency of one."""
        return replace(
            self,
            prefill_tokens_per_s=self.prefill_tokens_per_s * groups,
            sequence_s=self.sequence_s / groups,
            context_token_s=self.context_token_s / groups,
        )


class _Measured(msgspec.Struct, frozen=True):
    prefill_tokens_per_s: float
    ms_per_token: float
    output_tokens_per_s: float


def calibrated(path: Path, model: str | None = None) -> TimeModel:
    """Fits Manta's figures in the output of `python -m benchmarks.engine --json`, whose last line is the JSON.

    model: whose figures, where there are several. The cost of a sequence follows from the difference between batch 1 and the
    batch of the throughput workload; that of context is not measured by it, and 0. Errors: ValueError, OSError.
    """
    last = path.read_text(encoding="utf-8").strip().rpartition("\n")[2]
    try:
        figures = msgspec.json.decode(last, type=dict[str, _Measured])
    except msgspec.DecodeError as error:
        raise ValueError(f"{path} is not what python -m benchmarks.engine --json prints: {error}") from error
    if model is None and len(figures) == 1:
        model = next(iter(figures))
    if model not in figures:
        raise ValueError(f"{path} has figures of {', '.join(figures)}: name one of them as FILE:MODEL")
    measured = figures[model]
    sequences = THROUGHPUT_SEQUENCES
    whole_s = sequences * THROUGHPUT_OUTPUT / measured.output_tokens_per_s
    prefill_s = sequences * THROUGHPUT_PROMPT / measured.prefill_tokens_per_s
    one_s = measured.ms_per_token / 1e3
    full_s = max(one_s, (whole_s - prefill_s) / THROUGHPUT_OUTPUT)
    sequence_s = (full_s - one_s) / (sequences - 1)
    return TimeModel(measured.prefill_tokens_per_s, max(0.0, one_s - sequence_s), sequence_s, 0.0)
