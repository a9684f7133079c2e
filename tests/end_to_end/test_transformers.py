"""Greedy float32 output against transformers' `generate`, token for token, over every pair of settings."""

from pathlib import Path

import pytest

from tests.end_to_end.prompts import OUTPUTS, PROMPTS
from tests.end_to_end.reference import Ledger, Reference
from tests.end_to_end.settings import COVERING, Setting, greedy, open_setting, uncovered_pairs
from tests.end_to_end.turns import turns

PARAMS = [greedy(count) for count in OUTPUTS]


def test_the_table_covers_every_pair() -> None:
    assert not uncovered_pairs()


@pytest.mark.parametrize("setting", COVERING, ids=str)
def test_same_tokens(
    setting: Setting, checkpoints: dict[str, Path], references: dict[str, Reference], ledger: Ledger
) -> None:
    reference = references[setting.architecture]
    with open_setting(checkpoints[setting.architecture], setting, "float32") as llm:
        for turn, outputs in enumerate(turns(llm, setting, PARAMS)):
            for prompt, output, count in zip(PROMPTS, outputs, OUTPUTS, strict=True):
                assert len(output.outputs[0].token_ids) == count
                reference.require_same(prompt, output.outputs[0].token_ids, ledger, f"{setting}, turn {turn}")
    ledger.require_rare()
