"""Small requests with named tokens for the study's models."""

import numpy as np

from benchmarks.study.models.streams import StudyRequest, Workload
from simulator.traces import TraceRequest


def ask(
    prompt: list[int], answer: list[int] | int, *, at_s: float = 0.0, user: int = 0, conversation: int = 0, unit: int = 1,
    tokens: int | None = None,
) -> StudyRequest:  # fmt: skip
    """answer: names, or how many tokens where they are unknown. tokens: of the prompt, where the names stand for several."""
    names = np.array(prompt, np.uint64)
    known = np.array([] if isinstance(answer, int) else answer, np.uint64)
    output = answer if isinstance(answer, int) else len(answer)
    asked = TraceRequest(0, at_s, tokens if tokens is not None else len(prompt) * unit, output, names, unit)
    return StudyRequest(asked, known, user, conversation)


def workload(*requests: StudyRequest, unit: int = 1) -> Workload:
    return Workload("chat", "by hand", list(requests), unit)
