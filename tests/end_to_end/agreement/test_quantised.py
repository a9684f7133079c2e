"""The engine on quantised checkpoints says what transformers says of the numbers that they stand for."""

from pathlib import Path

import pytest

from deploy.config.load import ConfigError
from tests.end_to_end.engines import QWEN3, greedy, open_llm, run, tokens
from tests.end_to_end.prompts import OUTPUTS, PROMPTS
from tests.end_to_end.reference import Ledger, Reference
from tests.shared.checkpoints import make_checkpoint
from tests.shared.quantising import FORMATS, quantise


@pytest.mark.few(1)
@pytest.mark.parametrize(("name", "size"), [("fp8-block", 2), ("compressed-w4-order", 1)])
def test_tokens(name: str, size: int, tmp_path: Path) -> None:
    plain = make_checkpoint(tmp_path / "plain", QWEN3)
    quantise(plain, tmp_path / "quantised", FORMATS[name])
    reference, ledger = Reference(plain), Ledger()
    with open_llm(tmp_path / "quantised", size=size, blocks=40, max_num_batched_tokens=64) as llm:
        outputs = tokens(run(llm, PROMPTS, [greedy(count) for count in OUTPUTS]))
    for prompt, [output] in zip(PROMPTS, outputs, strict=True):
        reference.require_same(prompt, output, ledger, name)
    ledger.require_rare()


def test_what_is_asked_for_and_is_not_there_is_said_at_once(tmp_path: Path) -> None:
    plain = make_checkpoint(tmp_path / "plain", QWEN3)
    with pytest.raises((ConfigError, ValueError), match="quantization='awq' was asked for, but the weights are in 16 bits"):
        open_llm(plain, quantization="awq")
