"""From birth to the step loop: how many pages a rank gets, and the largest step that a GPU's memory is measured by."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kvcache.layout import PageLayout
from workers import build
from workers.build import build_rank
from workers.config import WorkerConfig
from workers.execution.runner import ModelRunner
from workers.model.architectures import CheckpointError
from workers.parallel.in_process import Solo

TINY = Path(__file__).parents[2] / "examples" / "tiny"
LAYOUT = PageLayout(page_size=16, layers=4, kv_heads=2, head_dim=64, dtype="float32")
CONFIG = WorkerConfig(
    model=str(TINY), device="cpu", dtype="float32", page_size=16, kv_memory=None, gpu_memory_fraction=0.9, max_model_len=128,
    rows=4, step_tokens=64, report_steps=1, attention="auto", threads=1, ranks_on_host=2,
)  # fmt: skip


def test_told_memory_is_cut_into_whole_pages() -> None:
    built = build_rank(replace(CONFIG, kv_memory=5 * LAYOUT.page_bytes + 1), Solo())
    assert built.pages == 5


def test_no_more_pages_than_all_rows_could_fill() -> None:
    built = build_rank(replace(CONFIG, kv_memory=1000 * LAYOUT.page_bytes), Solo())
    assert built.pages == CONFIG.rows * CONFIG.max_model_len // CONFIG.page_size


def test_host_memory_is_cut_into_slots_of_the_same_size() -> None:
    config = replace(CONFIG, kv_memory=5 * LAYOUT.page_bytes)
    assert build_rank(config, Solo()).slots == 0
    built = build_rank(replace(config, host_kv_memory=9 * LAYOUT.page_bytes + 1), Solo())
    assert built.host is not None
    assert (built.pages, built.slots, built.host.layout) == (5, 9, LAYOUT)
    with pytest.raises(ValueError, match=r"host_kv_memory=1 holds no page"):
        build_rank(replace(config, host_kv_memory=1), Solo())


def test_memory_for_less_than_a_page_is_refused_with_the_numbers() -> None:
    with pytest.raises(ValueError, match=rf"{LAYOUT.page_bytes:,} bytes"):
        build_rank(replace(CONFIG, kv_memory=LAYOUT.page_bytes - 1), Solo())


def test_without_a_word_the_ranks_of_a_host_share_a_part_of_its_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    free = 20 * LAYOUT.page_bytes
    monkeypatch.setattr(build, "_available_memory", lambda: free)
    built = build_rank(CONFIG, Solo())
    assert built.pages == int(free * build.CPU_KV_FRACTION) // CONFIG.ranks_on_host // LAYOUT.page_bytes


def test_the_host_says_how_much_is_free() -> None:
    assert build._available_memory() > 1 << 20


def test_the_largest_step_fills_the_budget() -> None:
    """On a GPU its peak decides the pool; it must run in the pages that a step can touch, and touch no more."""
    rank = build_rank(replace(CONFIG, kv_memory=4 * LAYOUT.page_bytes), Solo()).rank
    assert isinstance(rank.executor, ModelRunner)
    pool = rank.executor._model.attention._pool  # type: ignore[attr-defined]
    pool.data.fill_(float("nan"))
    build._run_largest_step(CONFIG, rank.executor)
    assert not torch.isnan(pool.data).any(), "64 tokens fill 4 pages of 16 in every layer"


def test_a_gpu_keeps_what_the_step_and_others_need(monkeypatch: pytest.MonkeyPatch) -> None:
    """total * fraction - what others hold - the peak without the probing pool."""
    total, free, reserved, peak = 1000 << 20, 700 << 20, 200 << 20, 150 << 20
    probe = LAYOUT.pages_for(CONFIG.step_tokens) * LAYOUT.page_bytes
    cuda = SimpleNamespace(
        reset_peak_memory_stats=lambda: None,
        synchronize=lambda: None,
        mem_get_info=lambda: (free, total),
        memory_reserved=lambda: reserved,
        max_memory_allocated=lambda: peak,
    )
    monkeypatch.setattr("workers.build.torch.cuda", cuda)
    monkeypatch.setattr(build, "_run_largest_step", lambda config, runner: None)  # noqa: ARG005
    memory = build._kv_memory(replace(CONFIG, device="cuda"), SimpleNamespace(), LAYOUT)  # type: ignore[arg-type]
    assert memory == int(total * 0.9) - (total - free - reserved) - (peak - probe)


def test_a_checkpoint_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        build_rank(replace(CONFIG, model=str(tmp_path / "nowhere")), Solo())
