"""Models some of whose layers see a window, and others all: each kind has its own blocks, and the tokens are transformers'."""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.models.compare import SETTINGS, Reference, Setting, compare
from benchmarks.models.zoo import make
from deploy import LLM
from tests.end_to_end.cache.turns import OUTPUT, PROMPTS, fetch_prefix, take_turns
from tests.end_to_end.engines import QWEN3, greedy, kv_memory, open_llm, run, tokens
from tests.end_to_end.prompts import draw
from tests.end_to_end.waiting import nothing_left_behind
from tests.shared.checkpoints import generate_reference, make_checkpoint

BLOCK, WINDOW, CHUNK = 16, 40, 32
KINDS: dict[str, dict[str, Any]] = {
    "gemma3_text": {},
    "gpt_oss": {"num_hidden_layers": 3, "layer_types": None, "dtype": torch.bfloat16},
}


@pytest.fixture(scope="module", params=KINDS)
def windowed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Reference]:
    path = make(request.param, tmp_path_factory.mktemp("narrow") / request.param, **KINDS[request.param])
    return path, Reference(path)


@pytest.mark.few(2)
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_the_same_tokens_as_transformers(windowed: tuple[Path, Reference], setting: Setting) -> None:
    outcome = compare(*windowed, setting)
    assert outcome.wrong == ()
    assert outcome.hits > 0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three of four layers are narrow."""
    types = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    return make_checkpoint(
        tmp_path_factory.mktemp("narrow"), QWEN3, seed=7, use_sliding_window=True, sliding_window=WINDOW, layer_types=types,
        max_window_layers=0, num_hidden_layers=4, max_position_embeddings=1024,
    )  # fmt: skip


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[list[int]]:
    return [generate_reference(checkpoint, prompt, OUTPUT, torch.float64) for prompt in PROMPTS]


def open_mixed(path: Path, blocks: int, **options: Any) -> LLM:
    """blocks: of all layers, in whose memory both pools are."""
    return open_llm(path, block=BLOCK, blocks=blocks, dtype="float64", max_num_batched_tokens=CHUNK, **options)


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [40, 60, 200])
def test_the_same_tokens_in_less_memory_than_all_layers_would_take(
    blocks: int, checkpoint: Path, expected: list[list[int]]
) -> None:
    with nothing_left_behind(), open_mixed(checkpoint, blocks, max_num_seqs=4, max_model_len=640) as llm:
        outputs = run(llm, PROMPTS, greedy(OUTPUT))
        (group,) = llm.stats().groups
    assert [choice for choices in tokens(outputs) for choice in choices] == expected
    assert 0 < group.narrow_blocks <= group.total_blocks
    if blocks < 200:
        assert group.total_blocks > blocks, "what narrow layers do not hold is there for the others"


def test_who_had_to_give_both_kinds_away_goes_on_with_the_same_tokens(checkpoint: Path) -> None:
    prompts = [draw(280, seed=320 + number) for number in range(2)]
    expected = [generate_reference(checkpoint, prompt, OUTPUT, torch.float64) for prompt in prompts]
    with nothing_left_behind(), open_mixed(checkpoint, 26, max_num_seqs=4, max_model_len=640) as llm:
        outputs = run(llm, prompts, greedy(OUTPUT))
        stats = llm.stats()
    assert [choice for choices in tokens(outputs) for choice in choices] == expected
    assert stats.preemptions > 0


@pytest.mark.slow
def test_two_ranks_give_the_same_back(checkpoint: Path, expected: list[list[int]]) -> None:
    with open_mixed(checkpoint, 60, size=2, max_num_seqs=4, max_model_len=640) as llm:
        outputs = run(llm, PROMPTS, greedy(OUTPUT))
    assert [choice for choices in tokens(outputs) for choice in choices] == expected


def test_the_next_turn_hits_what_is_left_of_the_last_one(checkpoint: Path, expected: list[list[int]]) -> None:
    with open_mixed(checkpoint, 60, max_num_seqs=4, max_model_len=640) as llm:
        run(llm, PROMPTS[:1], greedy(100))
        again = run(llm, [[*PROMPTS[0], *expected[0][:100]]], greedy(OUTPUT - 100))[0]
    assert (again.num_cached_tokens or 0) >= (len(PROMPTS[0]) + 99) // BLOCK * BLOCK
    assert again.outputs[0].token_ids == expected[0][100:]


def test_both_kinds_come_back_from_host_memory(checkpoint: Path, expected: list[list[int]]) -> None:
    host = kv_memory(checkpoint, 120, BLOCK, "float64")
    with nothing_left_behind(), open_mixed(checkpoint, 36, host_kv_memory=host, max_num_seqs=2, max_model_len=640) as llm:
        take_turns(llm, expected)
        stats = llm.stats()
    assert stats.loads >= 1
    assert stats.failed_transfers == 0


def test_both_kinds_are_fetched_by_another_group(checkpoint: Path) -> None:
    stats = fetch_prefix(lambda groups: open_mixed(checkpoint, 400, groups=groups))
    assert stats.fetches >= 1
    assert stats.failed_transfers == 0
