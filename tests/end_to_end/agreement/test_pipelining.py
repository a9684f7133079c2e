"""Steps launched before the last one's tokens are read (as on a GPU), reports of several steps: the same outputs."""

from pathlib import Path

import pytest

from cluster.resolve import DEPTH
from deploy.frontend.outputs import RequestOutput
from tests.end_to_end.agreement.settings import Setting, open_setting
from tests.end_to_end.agreement.turns import turns
from tests.end_to_end.engines import QWEN3, run
from tests.end_to_end.prompts import PROMPTS, sampling
from tests.end_to_end.same import require_equal

PLAIN = Setting(QWEN3, budget=8192)
TWO_GROUPS = Setting(QWEN3, budget=33, groups=2, block=16, caching=True, small=True)
TWO_RANKS = Setting(QWEN3, budget=33, size=2, block=16, caching=True)
ONE_RANK = Setting(QWEN3, budget=2048, block=16, caching=True, small=True)
ROOMY = Setting(QWEN3, budget=33, block=16, caching=True)
LARGE_BLOCKS = Setting(QWEN3, budget=2048, block=256, caching=True)

LONGER = sampling(times=2)


@pytest.fixture(scope="module")
def plain(checkpoints: dict[str, Path]) -> list[RequestOutput]:
    with open_setting(checkpoints[QWEN3], PLAIN) as llm:
        return run(llm, PROMPTS, LONGER)


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("setting", "depth", "report_steps"),
    [
        (TWO_GROUPS, 0, 4),
        (ONE_RANK, 1, 1),
        (TWO_RANKS, 1, 1),
        (ONE_RANK, 1, 4),
        (ROOMY, 0, 16),
        (LARGE_BLOCKS, 2, 7),
    ],
    ids=lambda value: str(value),
)
def test_same_outputs(
    setting: Setting,
    depth: int,
    report_steps: int,
    checkpoints: dict[str, Path],
    plain: list[RequestOutput],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(DEPTH, "cpu", depth)
    with open_setting(checkpoints[QWEN3], setting, report_steps=report_steps) as llm:
        for turn, outputs in enumerate(turns(llm, setting, LONGER)):
            for position, (output, expected) in enumerate(zip(outputs, plain, strict=True)):
                require_equal(output, expected, f"turn {turn}, prompt {position}: {LONGER[position]}")
