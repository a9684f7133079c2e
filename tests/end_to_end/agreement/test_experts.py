"""Mixtures of experts of the native decoder in the engine: the same tokens as transformers, with one rank and two, experts
shared out by width and whole, blocks of 16 and of 256, prompts in chunks, prefixes hit, sequences preempted; gpt-oss's
in 4 bits as well."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.models.compare import SETTINGS, Reference, Setting, compare
from benchmarks.models.zoo import make
from tests.end_to_end.engines import greedy, open_llm, run
from tests.shared.quantising import MXFP4, is_stack, quantise
from workers.execution import expert_counter

KINDS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"norm_topk_prob": True, "num_hidden_layers": 3, "decoder_sparse_step": 2, "mlp_only_layers": []},
    "mixtral": {},
    "qwen2_moe": {},
    "gpt_oss": {"num_hidden_layers": 3, "layer_types": None, "dtype": torch.bfloat16},
    "gpt_oss-mxfp4": {"dtype": torch.bfloat16},
}
BY_EXPERT = tuple(replace(setting, expert_parallel=True) for setting in SETTINGS if setting.size > 1)


@pytest.fixture(scope="module", params=KINDS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Reference]:
    folder, (kind, *stored) = tmp_path_factory.mktemp(request.param), request.param.split("-")
    plain = make(kind, folder / "plain", **KINDS[request.param])
    if not stored:
        return plain, Reference(plain)
    quantise(plain, folder / "quantised", MXFP4, is_stack)  # the plain one becomes what it stands for
    return folder / "quantised", Reference(plain)


@pytest.mark.few(4)
@pytest.mark.parametrize("setting", [*SETTINGS, *BY_EXPERT], ids=str)
def test_the_same_tokens(checkpoint: tuple[Path, Reference], setting: Setting) -> None:
    path, reference = checkpoint
    outcome = compare(path, reference, setting, "native")
    assert outcome.wrong == ()
    assert outcome.hits > 0
    assert outcome.preemptions > 0 or not setting.small or path.parent.name.startswith("gpt_oss"), "whose pool is larger"


def test_how_evenly_experts_were_wanted_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_counter, "INTERVAL_S", 0.0)
    path = make("qwen3_moe", tmp_path, num_hidden_layers=3, mlp_only_layers=[1], num_local_experts=4, num_experts_per_tok=4)
    with open_llm(path) as llm:
        run(llm, [[3, 4, 5]], greedy(4))
        (group,) = llm.stats().groups
    assert group.expert_layers == (0, 2)
    assert group.expert_imbalance == (1.0, 1.0), "every token goes through all of them"
