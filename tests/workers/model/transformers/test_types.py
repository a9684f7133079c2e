"""Every model type of the zoo says what transformers says, alone and shared out, several sequences in one ragged batch, their
prompts in chunks."""

from pathlib import Path

import pytest

from benchmarks.models.zoo import MORE, VOCAB, ZOO, make
from tests.shared.checkpoints import generate_reference
from tests.workers.model.transformers.ranks import Ranks
from workers.model.transformers.compared import COMPARED

NO_PLAN = {"gpt_oss", "hunyuan_v1_dense"}
"""transformers says of these how to divide experts, or nothing."""

PROMPTS = [[(7 * n + 3) % VOCAB for n in range(70)], [(5 * n + 1) % VOCAB for n in range(33)], [9]]
NEW_TOKENS, CHUNK = 10, 29


@pytest.fixture(scope="module", params=sorted(ZOO))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, make(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.few(4)
def test_greedy_tokens_equal_transformers(checkpoint: tuple[str, Path]) -> None:
    kind, path = checkpoint
    expected = [generate_reference(path, prompt, NEW_TOKENS) for prompt in PROMPTS]
    assert len({token for tokens in expected for token in tokens}) > 8, "the model does not repeat itself"
    for size in (1,) if kind in NO_PLAN else (1, 2):
        with Ranks(path, size) as ranks:
            assert ranks.generate(PROMPTS, NEW_TOKENS, CHUNK) == expected, f"{size} ranks"


def test_what_is_said_to_be_compared_is_compared() -> None:
    assert list(COMPARED) == sorted(ZOO | MORE)
