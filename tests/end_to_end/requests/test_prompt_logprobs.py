"""Log-probabilities of prompts are those of transformers, however the prompt is cut and whatever else is in the step."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cluster.resolve import DEPTH
from deploy import LLM, SamplingParams
from deploy.frontend.outputs import Logprob, PromptEntries, RequestOutput
from tests.end_to_end.engines import LLAMA, QWEN3, open_llm, run
from tests.end_to_end.prompts import PROMPTS, SHARED, draw
from tests.end_to_end.waiting import wait_idle
from tests.shared.checkpoints import load_reference

MOST = 4
ROUNDING = 1e-9  # of float64, between one way to run and another
REFERENCE_ROUNDING = 1e-4  # transformers computes norms, RoPE and softmax in float32 in any case

MEASURED = [SHARED, [*SHARED, *draw(70, seed=20)], draw(257, seed=21), draw(2, seed=22), draw(1, seed=23), SHARED[:33]]
"""Prompts longer and shorter than what is measured in a step, some with a prefix in the cache, which must not be hit."""


def references(path: Path, dtype: torch.dtype) -> list[Tensor]:
    """[prompt tokens - 1, vocab] for each prompt: the distribution of each token but the first."""
    model = load_reference(path, dtype)
    with torch.inference_mode():
        return [model(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1) for prompt in MEASURED]


def require_entry(entry: dict[int, Logprob], token: int, expected: Tensor) -> None:
    """The token first, then the most likely ones; where two are nearly equal their order is open."""
    assert next(iter(entry)) == token
    top = sorted((value.rank, other) for other, value in entry.items() if value.rank is not None)
    assert [rank for rank, _ in top] == list(range(1, MOST + 1))
    for other, value in entry.items():
        assert value.logprob == pytest.approx(float(expected[other]), abs=REFERENCE_ROUNDING)
    for (_, other), value in zip(top, expected.topk(MOST).values.tolist(), strict=True):
        assert float(expected[other]) == pytest.approx(value, abs=REFERENCE_ROUNDING)


def require_measured(output: RequestOutput, prompt: list[int], expected: Tensor) -> None:
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == len(prompt)
    assert output.prompt_logprobs[0] is None
    for entry, token, row in zip(output.prompt_logprobs[1:], prompt[1:], expected, strict=True):
        assert entry is not None
        require_entry(entry, token, row)


def ask(llm: LLM, others: bool) -> list[RequestOutput]:
    """others: with prompts that are not measured, before and between them."""
    measured = [(prompt, SamplingParams(max_tokens=6, temperature=0.0, prompt_logprobs=MOST, n=2)) for prompt in MEASURED]
    plain = [(prompt, SamplingParams(max_tokens=20, temperature=0.0)) for prompt in (PROMPTS if others else [])]
    work = [*plain[::2], *measured, *plain[1::2]]
    outputs = run(llm, [prompt for prompt, _ in work], [params for _, params in work])
    wait_idle(llm)
    return outputs[len(plain[::2]) :][: len(measured)]


def require_same(ours: PromptEntries, theirs: PromptEntries) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine is None) == (other is None)
        expected = {token: (value.rank, value.logprob) for token, value in (other or {}).items()}
        for token, value in (mine or {}).items():
            rank, logprob = expected[token]
            assert value.rank == rank
            assert value.logprob == pytest.approx(logprob, abs=ROUNDING)


@pytest.fixture(scope="module")
def alone(checkpoints: dict[str, Path]) -> list[RequestOutput]:
    """Each prompt by itself, in one step where it is short enough."""
    params = SamplingParams(max_tokens=1, prompt_logprobs=MOST)
    with open_llm(checkpoints[QWEN3], dtype="float64") as llm:
        outputs = [output for prompt in MEASURED for output in run(llm, [prompt], params)]
    for output, prompt, expected in zip(outputs, MEASURED, references(checkpoints[QWEN3], torch.float64), strict=True):
        require_measured(output, prompt, expected)
    return outputs


@pytest.mark.parametrize("architecture", [LLAMA, QWEN3])
@pytest.mark.parametrize(("size", "budget"), [(1, 2048), (2, 100)])
def test_they_are_those_of_transformers(architecture: str, size: int, budget: int, checkpoints: dict[str, Path]) -> None:
    path = checkpoints[architecture]
    with open_llm(path, size=size, dtype="float32", max_num_batched_tokens=budget) as llm:
        outputs = ask(llm, others=False)
    for output, prompt, expected in zip(outputs, MEASURED, references(path, torch.float32), strict=True):
        require_measured(output, prompt, expected)


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("size", "budget", "depth", "blocks"), [(1, 2048, 1, None), (2, 100, 0, None), (1, 100, 1, 35), (1, 2048, 0, 35)]
)
def test_they_do_not_depend_on_what_else_is_in_the_step(
    size: int,
    budget: int,
    depth: int,
    blocks: int | None,
    checkpoints: dict[str, Path],
    alone: list[RequestOutput],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """blocks: of 16 tokens, where sequences are preempted and their prompts computed again. A second run may hit the cache."""
    monkeypatch.setitem(DEPTH, "cpu", depth)
    budgeted = {"max_num_batched_tokens": budget}
    with open_llm(checkpoints[QWEN3], size=size, dtype="float64", block=16, blocks=blocks, **budgeted) as llm:
        runs = [ask(llm, others=True) for _ in range(2)]
        assert (llm.stats().preemptions > 0) == (blocks is not None)
    for outputs in runs:
        for output, expected in zip(outputs, alone, strict=True):
            require_same(output.prompt_logprobs or [], expected.prompt_logprobs or [])


def test_asking_changes_no_token(checkpoints: dict[str, Path]) -> None:
    with open_llm(checkpoints[QWEN3], dtype="float64") as llm:
        asked = ask(llm, others=True)
        plain = run(llm, MEASURED, SamplingParams(max_tokens=6, temperature=0.0))
    for output, expected in zip(asked, plain, strict=True):
        for choice in output.outputs:
            assert choice.token_ids == expected.outputs[0].token_ids
        assert expected.prompt_logprobs is None
