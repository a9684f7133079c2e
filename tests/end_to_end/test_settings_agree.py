"""In float64 every setting says exactly the same, greedy and sampled: tokens, ends and log-probabilities."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from deploy.frontend.outputs import RequestOutput
from tests.end_to_end.prompts import PROMPTS, SAMPLING
from tests.end_to_end.same import require_equal
from tests.end_to_end.settings import ARCHITECTURES, COVERING, Setting, open_setting, run
from tests.end_to_end.turns import turns

Plain = Callable[[str], list[RequestOutput]]


@pytest.fixture(scope="module")
def plain(checkpoints: dict[str, Path]) -> Plain:
    """By architecture: one group of one rank, a large pool, no prefix cache, every prompt in one step."""

    @cache
    def outputs(architecture: str) -> list[RequestOutput]:
        with open_setting(checkpoints[architecture], Setting(architecture, budget=8192), "float64") as llm:
            return run(llm, PROMPTS, SAMPLING)

    return outputs


@pytest.mark.parametrize("setting", COVERING, ids=str)
def test_same_outputs(setting: Setting, checkpoints: dict[str, Path], plain: Plain) -> None:
    with open_setting(checkpoints[setting.architecture], setting, "float64") as llm:
        for turn, outputs in enumerate(turns(llm, setting, SAMPLING)):
            for position, (output, expected) in enumerate(zip(outputs, plain(setting.architecture), strict=True)):
                require_equal(output, expected, f"turn {turn}, prompt {position}: {SAMPLING[position]}")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_comparison_is_not_empty(architecture: str, plain: Plain) -> None:
    """Sampling samples, stop ids stop, choices differ: what is compared above has all of it."""
    outputs = plain(architecture)
    ends = {choice.finish_reason for output in outputs for choice in output.outputs}
    assert ends == {"stop", "length"}
    for output in outputs:
        texts = {tuple(choice.token_ids) for choice in output.outputs}
        assert len(texts) == len(output.outputs), "choices of one prompt differ"
    greedy_start = outputs[0].outputs[0].token_ids
    assert len(set(greedy_start)) > 5, "the model does not repeat itself"
