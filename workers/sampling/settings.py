"""How one row samples, as the record that it has on the device (`kernels.sampling.record`). NumPy only."""

import numpy as np
import numpy.typing as npt

from scheduler.protocol.sampling import SamplingParams
from workers.kernels.sampling.record import (
    BIASED,
    CONSTRAINED,
    FLAGS,
    FREQUENCY,
    HAS_MIN_P,
    HAS_TOP_K,
    HAS_TOP_P,
    LOG_MIN_P,
    PENALISED,
    PRESENCE,
    REPETITION,
    SAMPLED,
    STOP_FROM,
    STOPS_BARRED,
    STREAM,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    WORDS,
)  # fmt: skip
from workers.sampling import noise

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy, as in vLLM: logits / temperature would overflow."""

HOTTEST = 1e4
"""Temperatures above this are taken for it: between what is left of logits nothing can be told, and of one that float16 or
float32 cannot hold nothing would be left but NaN, where an id is barred."""

Record = npt.NDArray[np.int32]


def record(
    params: SamplingParams, *, seed: int, choice: int, stop_ids: tuple[int, ...], prompt_tokens: int, vocab_size: int
) -> Record:
    """The record of one sequence, [WORDS] int32. All zeros, as a scratch row has it, is plain greedy."""
    words = np.zeros(WORDS, np.int32)
    floats = words.view(np.float32)
    flags = 0
    floats[TEMPERATURE] = 1
    if params.temperature >= GREEDY_BELOW:
        flags |= SAMPLED
        floats[TEMPERATURE] = min(params.temperature, HOTTEST)
        if 0 < params.top_k < vocab_size:
            flags |= HAS_TOP_K
            words[TOP_K] = params.top_k
        if params.top_p < 1:
            flags |= HAS_TOP_P
            words[TOP_P : TOP_P + 2] = np.array([params.top_p], np.float64).view(np.int32)
        if params.min_p > 0:
            flags |= HAS_MIN_P
            words[LOG_MIN_P : LOG_MIN_P + 2] = np.log(np.array([params.min_p], np.float64)).view(np.int32)
        words[STREAM : STREAM + 2] = np.array([noise.stream(seed, choice)], np.uint64).view(np.int32)
    floats[[REPETITION, FREQUENCY, PRESENCE]] = penalties(params)
    flags |= BIASED if params.logit_bias else 0
    flags |= PENALISED if penalises(params) else 0
    flags |= CONSTRAINED if params.grammar is not None else 0
    if params.min_tokens > 0 and stop_ids:
        flags |= STOPS_BARRED
        words[STOP_FROM] = min(prompt_tokens + params.min_tokens, np.iinfo(np.int32).max)
    words[FLAGS] = flags
    return words


def penalties(params: SamplingParams) -> tuple[float, float, float]:
    return params.repetition_penalty, params.frequency_penalty, params.presence_penalty


def penalises(params: SamplingParams) -> bool:
    return penalties(params) != (1.0, 0.0, 0.0)
