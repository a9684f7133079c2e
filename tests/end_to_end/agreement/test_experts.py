"""Mixtures of experts of the native decoder in the engine: the same tokens as transformers, with one rank and two, experts
shared out by width and whole, blocks of 16 and of 256, prompts in chunks, prefixes hit, sequences preempted."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.models.compare import SETTINGS, Reference, Setting, compare
from benchmarks.models.zoo import make

KINDS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"norm_topk_prob": True, "num_hidden_layers": 3, "decoder_sparse_step": 2, "mlp_only_layers": []},
    "mixtral": {},
    "qwen2_moe": {},
}
BY_EXPERT = tuple(replace(setting, expert_parallel=True) for setting in SETTINGS if setting.size > 1)


@pytest.fixture(scope="module", params=KINDS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Reference]:
    path = make(request.param, tmp_path_factory.mktemp(request.param), **KINDS[request.param])
    return path, Reference(path)


@pytest.mark.parametrize("setting", [*SETTINGS, *BY_EXPERT], ids=str)
def test_the_same_tokens(checkpoint: tuple[Path, Reference], setting: Setting) -> None:
    path, reference = checkpoint
    outcome = compare(path, reference, setting, "native")
    assert outcome.wrong == ()
    assert outcome.hits > 0
    assert outcome.preemptions > 0 or not setting.small
