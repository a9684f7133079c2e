"""From birth to the step loop: how many blocks a rank gets, and the largest step that a GPU's memory is measured by."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvcache.layout import BlockLayout
from workers.config import ResolvedWorker, WorkerConfig
from workers.execution.cpu.runner import ModelRunner
from workers.model.checkpoint.dtype import Arithmetic, choose
from workers.model.checkpoint.weights import StoredNumbers
from workers.model.config.fields import CheckpointError
from workers.model.decoders.native import Decoder
from workers.model.layers.linear import can_pack
from workers.parallel.in_process import Solo, ThreadGroup
from workers.process import build
from workers.process.build import build_rank

TINY = Path(__file__).parents[3] / "examples" / "tiny"
LAYOUT = BlockLayout(block_size=16, layers=4, kv_heads=2, head_dim=64, dtype="float32")
CONFIG = WorkerConfig(model=str(TINY), groups=2, dtype="float32", block_size=16, max_num_seqs=4, max_num_batched_tokens=64)
RESOLVED = ResolvedWorker(max_model_len=128)


def test_told_memory_is_cut_into_whole_blocks() -> None:
    built = build_rank(replace(CONFIG, kv_memory=5 * LAYOUT.block_bytes + 1), RESOLVED, Solo())
    assert built.sizes.blocks == 5


def test_no_more_blocks_than_all_rows_could_fill() -> None:
    built = build_rank(replace(CONFIG, kv_memory=1000 * LAYOUT.block_bytes), RESOLVED, Solo())
    assert built.sizes.blocks == CONFIG.max_num_seqs * RESOLVED.max_model_len // CONFIG.block_size


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kv_in_fp8_takes_a_byte_a_number_whatever_the_model_computes_in(dtype: str) -> None:
    told = replace(CONFIG, dtype=dtype, kv_dtype="fp8", kv_memory=5 * LAYOUT.block_bytes, host_kv_memory=2 * LAYOUT.block_bytes)
    built = build_rank(told, RESOLVED, Solo())
    assert built.host is not None
    assert built.pool.layout == built.host.layout == replace(LAYOUT, dtype="float8_e4m3fn")
    assert (built.sizes.blocks, built.host_sizes.blocks) == (20, 8)


def test_host_memory_is_cut_into_blocks_of_the_same_size() -> None:
    config = replace(CONFIG, kv_memory=5 * LAYOUT.block_bytes)
    assert build_rank(config, RESOLVED, Solo()).host_sizes.blocks == 0
    built = build_rank(replace(config, host_kv_memory=9 * LAYOUT.block_bytes + 1), RESOLVED, Solo())
    assert built.host is not None
    assert (built.sizes.blocks, built.host_sizes.blocks, built.host.layout) == (5, 9, LAYOUT)
    with pytest.raises(ValueError, match=r"host_kv_memory=1 holds no block"):
        build_rank(replace(config, host_kv_memory=1), RESOLVED, Solo())


def test_memory_for_less_than_a_block_is_refused_with_the_numbers() -> None:
    with pytest.raises(ValueError, match=rf"{LAYOUT.block_bytes:,} bytes"):
        build_rank(replace(CONFIG, kv_memory=LAYOUT.block_bytes - 1), RESOLVED, Solo())


def test_without_a_word_the_ranks_of_a_host_share_a_part_of_its_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    free = 20 * LAYOUT.block_bytes
    monkeypatch.setattr(build, "_available_memory", lambda: free)
    for ranks in (1, 2):
        built = build_rank(CONFIG, replace(RESOLVED, host_ranks=ranks), Solo())
        assert built.sizes.blocks == int(free * build.CPU_KV_FRACTION) // ranks // LAYOUT.block_bytes


def test_the_host_says_how_much_is_free() -> None:
    assert build._available_memory() > 1 << 20


def test_a_table_of_positions_is_as_long_as_the_limit_in_force(tmp_path: Path) -> None:
    """Ten million positions, of which 128 are used."""
    folder = copy_of_tiny(tmp_path, max_position_embeddings=10_485_760)
    built = build_rank(replace(CONFIG, model=str(folder), kv_memory=4 * LAYOUT.block_bytes), RESOLVED, Solo())
    assert isinstance(built.rank.executor, ModelRunner)
    assert isinstance(built.rank.executor._model, Decoder)
    assert built.rank.executor._model.rotary.table.shape[0] == RESOLVED.max_model_len


def copy_of_tiny(folder: Path, **fields: object) -> Path:
    for file in TINY.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    raw = json.loads((TINY / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


FULL, AVX2 = Arithmetic("AVX512", True, True), Arithmetic("AVX2", False, False)


@pytest.mark.parametrize(
    ("stored", "arithmetic", "rows", "room", "dtype", "why"),
    [
        (torch.bfloat16, FULL, 64, 1 << 30, torch.bfloat16, "as config.json says"),
        (torch.bfloat16, AVX2, 64, 1 << 30, torch.float32, r"\(AVX2\) has no bfloat16 arithmetic, .* --dtype bfloat16 keeps"),
        (torch.float16, AVX2, 64, 1 << 30, torch.float32, "has no float16 arithmetic"),
        (torch.float16, Arithmetic("AVX512", True, False), 64, 1 << 30, torch.float32, "has no float16 arithmetic"),
        (torch.bfloat16, AVX2, 1, 1 << 30, torch.bfloat16, "a row by itself is bound by memory"),
        (torch.bfloat16, AVX2, 64, 3999, torch.bfloat16, "take 4,000 bytes, and there is room for 3,999"),
        (torch.bfloat16, AVX2, 64, 4000, torch.float32, "several rows are faster in float32"),
        (torch.float32, AVX2, 64, 0, torch.float32, "as config.json says"),
        (torch.float64, AVX2, 64, 0, torch.float64, "as config.json says"),
    ],
)
def test_auto_takes_what_the_processor_computes_in(
    stored: torch.dtype, arithmetic: Arithmetic, rows: int, room: int, dtype: torch.dtype, why: str
) -> None:
    named = choose(stored, StoredNumbers(torch.float32, 1000), arithmetic, rows, room)
    assert named.dtype == dtype
    assert re.search(why, named.why)
    left_open = choose(None, StoredNumbers(stored, 1000), arithmetic, rows, room)
    assert left_open.dtype == dtype
    assert re.search(why.replace("as config.json says", "as the weights are stored"), left_open.why)


@pytest.mark.parametrize(("arithmetic", "dtype"), [(FULL, torch.bfloat16), (AVX2, torch.float32)])
def test_a_rank_says_which_dtype_it_takes_and_why(
    caplog: pytest.LogCaptureFixture, arithmetic: Arithmetic, dtype: torch.dtype
) -> None:
    with caplog.at_level("INFO", "workers.process.build"):
        built = build_rank(replace(CONFIG, dtype="auto", kv_memory=4 << 20), RESOLVED, Solo(), arithmetic=arithmetic)
    assert built.pool.dtype == dtype
    assert f"dtype {str(dtype).removeprefix('torch.')}: " in caplog.text


def test_ranks_of_one_group_take_one_dtype() -> None:
    """Their processors may differ: the group takes what the weakest computes in."""

    def build_one(comm: ThreadGroup) -> torch.dtype:
        config = replace(CONFIG, dtype="auto", kv_memory=4 << 20)
        return build_rank(config, RESOLVED, comm, arithmetic=(FULL, AVX2)[comm.rank]).pool.dtype

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(build_one, ThreadGroup.create(2))) == [torch.float32, torch.float32]


def test_this_processor_is_known() -> None:
    """What has a oneDNN kernel has arithmetic too."""
    arithmetic = Arithmetic.of(torch.device("cpu"))
    assert arithmetic.has(torch.bfloat16) == can_pack(torch.bfloat16, torch.device("cpu"))
    assert arithmetic.has(torch.float32)
    assert Arithmetic.of(torch.device("cuda")).has(torch.bfloat16)


def test_a_checkpoint_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        build_rank(replace(CONFIG, model=str(tmp_path / "nowhere")), RESOLVED, Solo())
