"""Every pair of settings says the same: in float32, greedy, what transformers' `generate` says, token for token; in float64,
greedy and sampled, exactly what one rank with room for all says: tokens, ends and log-probabilities."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from deploy.frontend.outputs import RequestOutput
from tests.end_to_end.agreement.settings import COVERING, Setting, open_setting, uncovered_pairs
from tests.end_to_end.agreement.turns import turns
from tests.end_to_end.engines import ARCHITECTURES, greedy, run
from tests.end_to_end.prompts import OUTPUTS, PROMPTS, SAMPLING
from tests.end_to_end.reference import Ledger, Reference
from tests.end_to_end.same import require_equal

Plain = Callable[[str], list[RequestOutput]]

GREEDY = [greedy(count) for count in OUTPUTS]


def judged_in(dtype: str) -> list[Setting]:
    return [setting for setting in COVERING if setting.dtype == dtype]


@pytest.fixture(scope="module")
def plain(checkpoints: dict[str, Path]) -> Plain:
    """By architecture: one group of one rank, a large pool, no prefix cache, every prompt in one step."""

    @cache
    def outputs(architecture: str) -> list[RequestOutput]:
        with open_setting(checkpoints[architecture], Setting(architecture, budget=8192)) as llm:
            return run(llm, PROMPTS, SAMPLING)

    return outputs


def test_the_table_covers_every_pair() -> None:
    assert not uncovered_pairs()


@pytest.mark.few(3)
@pytest.mark.parametrize("setting", judged_in("float32"), ids=str)
def test_the_same_tokens_as_transformers(
    setting: Setting, checkpoints: dict[str, Path], references: dict[str, Reference], ledger: Ledger
) -> None:
    reference = references[setting.architecture]
    with open_setting(checkpoints[setting.architecture], setting) as llm:
        for turn, outputs in enumerate(turns(llm, setting, GREEDY)):
            for prompt, output, count in zip(PROMPTS, outputs, OUTPUTS, strict=True):
                assert len(output.outputs[0].token_ids) == count
                reference.require_same(prompt, output.outputs[0].token_ids, ledger, f"{setting}, turn {turn}")
    ledger.require_rare()


@pytest.mark.few(1)
@pytest.mark.parametrize("setting", judged_in("float64"), ids=str)
def test_the_same_outputs_as_one_rank(setting: Setting, checkpoints: dict[str, Path], plain: Plain) -> None:
    with open_setting(checkpoints[setting.architecture], setting) as llm:
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
