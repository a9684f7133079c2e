"""KV in FP8 is rounded once, where it is written: whoever reads it later says what the first reader said.

A chunk attends to what it has just written as others will find it. So hits, cuts into chunks, blocks, ranks, preemption,
copies, fetches and host memory change nothing, as with KV in the model's own dtype. Judged in float64, whose rounding is too
small to push a number over to another of FP8's.
"""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.models.zoo import make
from deploy import LLM
from deploy.frontend.outputs import RequestOutput
from kvcache.layout import FP8
from tests.end_to_end.agreement.settings import Setting, open_setting
from tests.end_to_end.agreement.turns import turns
from tests.end_to_end.engines import LLAMA, QWEN3, greedy, kv_memory, open_llm, run, tokens
from tests.end_to_end.prompts import PROMPTS, SAMPLING, draw
from tests.end_to_end.same import require_equal
from tests.end_to_end.waiting import nothing_left_behind, wait_idle
from tests.shared.checkpoints import make_checkpoint
from tests.workers.model.checkpoint.test_kv_scales import PROJECTIONS, with_scales

NARROW: dict[str, Any] = {"dtype": "float64", "kv_dtype": "fp8"}


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With scales of keys and values, of which none is 1."""
    return with_scales(make_checkpoint(tmp_path_factory.mktemp("scaled"), QWEN3), PROJECTIONS)


@pytest.fixture(scope="module")
def plain(scaled: Path) -> list[RequestOutput]:
    """One group of one rank, a large pool, no prefix cache, every prompt in one step."""
    with open_setting(scaled, Setting(QWEN3, budget=8192), kv_dtype="fp8") as llm:
        return run(llm, PROMPTS, SAMPLING)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "setting",
    [
        Setting(QWEN3, 16, size=1, groups=1, block=16, caching=True, small=True),
        Setting(QWEN3, 33, size=2, groups=1, block=256, caching=False, small=True),
        Setting(QWEN3, 13, size=2, groups=2, block=16, caching=True, small=False),
        Setting(QWEN3, 2048, size=1, groups=1, block=256, caching=True, small=False),
    ],
    ids=str,
)
def test_however_it_is_run(setting: Setting, scaled: Path, plain: list[RequestOutput]) -> None:
    with open_setting(scaled, setting, kv_dtype="fp8") as llm:
        for turn, outputs in enumerate(turns(llm, setting, SAMPLING)):
            for position, (output, expected) in enumerate(zip(outputs, plain, strict=True)):
                require_equal(output, expected, f"turn {turn}, prompt {position}: {SAMPLING[position]}")
        preemptions = llm.stats().preemptions
    assert bool(preemptions) == setting.small


def test_it_is_not_what_the_model_says_with_kv_of_its_own_dtype(scaled: Path, plain: list[RequestOutput]) -> None:
    """Or nothing above was rounded; and with other scales it is rounded otherwise."""
    with open_setting(scaled, Setting(QWEN3, budget=8192)) as llm:
        assert tokens(run(llm, PROMPTS, SAMPLING)) != tokens(plain)


PREFIX = draw(320, seed=90)
FOLLOWED = [PREFIX + draw(12, seed=91 + number) for number in range(16)]
OUTPUT = greedy(24)


@pytest.mark.few(1)
@pytest.mark.parametrize("size", [2, 1], ids=lambda size: f"tp{size}")
def test_a_prefix_from_another_group(size: int, scaled: Path) -> None:
    with open_llm(scaled, **NARROW) as llm:
        expected = tokens(run(llm, FOLLOWED, OUTPUT))
    with nothing_left_behind(), open_llm(scaled, **NARROW, size=size, groups=2, max_num_batched_tokens=32) as llm:
        run(llm, [PREFIX], greedy(2))
        assert tokens(run(llm, FOLLOWED, OUTPUT)) == expected
        wait_idle(llm)
        stats = llm.stats()
    assert stats.fetches >= 1
    assert stats.failed_transfers == 0
    assert stats.fetched_tokens >= 304, "all full blocks of the prefix"


def test_what_was_evicted_comes_back_from_host_memory(scaled: Path) -> None:
    prompts = [draw(200, seed=200 + number) for number in range(6)]
    with open_llm(scaled, **NARROW) as llm:
        expected = tokens(run(llm, prompts, OUTPUT))
    host = kv_memory(scaled, 192, 16, FP8)
    with open_llm(scaled, **NARROW, blocks=32, host_kv_memory=host, max_num_batched_tokens=32) as llm:
        for _ in range(2):
            for prompt, output in zip(prompts, expected, strict=True):
                assert tokens(run(llm, [prompt], OUTPUT)) == [output]
            wait_idle(llm)
        stats = llm.stats()
    assert stats.loads >= 1
    assert stats.failed_transfers == 0


@pytest.fixture(scope="module", params=["gemma3_text", "gemma2", "minicpm3", "gemma"])
def varied(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Classes of transformers: windows, a soft cap, heads whose keys and values differ, and one that is plain."""
    return make(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.few(1)
def test_classes_of_transformers(varied: Path) -> None:
    """Whole prompts without a cache; then in chunks, with a small pool, with hits."""
    prompts = [draw(length, seed=length) for length in (150, 40, 17)]

    def outputs(times: int, **options: Any) -> list[list[list[list[int]]]]:
        asked = {"local": True, "check_invariants": True, "seed": 0, "threads": 1, "max_model_len": 256} | NARROW
        with LLM(varied, **asked | {"kv_memory": 4 << 20} | options) as llm:
            return [tokens(run(llm, prompts, greedy(24))) for _ in range(times)]

    expected = outputs(1, block_size=256, enable_prefix_caching=False)
    assert outputs(2, block_size=16, max_num_batched_tokens=16) == 2 * expected


@pytest.mark.few(1)
@pytest.mark.parametrize("architecture", [LLAMA, QWEN3])
def test_in_float32_greedily(architecture: str, checkpoints: dict[str, Path]) -> None:
    """Through the compiled kernels of that dtype, where there are some."""
    narrow: dict[str, Any] = {"dtype": "float32", "kv_dtype": "fp8"}
    with open_llm(checkpoints[architecture], block=256, enable_prefix_caching=False, **narrow) as llm:
        expected = tokens(run(llm, PROMPTS, greedy(16)))
    with open_llm(checkpoints[architecture], block=16, blocks=50, max_num_batched_tokens=16, **narrow) as llm:
        for _ in range(2):
            assert tokens(run(llm, PROMPTS, greedy(16))) == expected
