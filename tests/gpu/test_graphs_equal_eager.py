"""Graphs say what single launches say, and both what transformers says: at batches that cross the ladder's steps, whatever the
architecture and the block."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scheduler.protocol.sampling import SamplingParams
from tests.end_to_end.engines import ARCHITECTURES, LLAMA, QWEN2, QWEN3
from tests.end_to_end.prompts import OUTPUTS, PROMPTS, draw
from tests.gpu.judge import Judge, first_apart
from tests.gpu.works import GPU, VOCAB, checkpoint, loop, mixture
from tests.shared.checkpoints import LLAMA3_ROPE
from tests.workers.stepping import Lease, Stepped, Work
from workers.execution.gpu.runner import GpuRunner

pytestmark = GPU

EXTRA: dict[str, dict[str, Any]] = {LLAMA: {"rope_parameters": LLAMA3_ROPE}, QWEN2: {"tied": True}}
MARGIN = 0.1
"""Of the two best log-probabilities, above which bfloat16's rounding may change no token."""


@pytest.fixture(scope="module")
def judges(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Judge]:
    folder = tmp_path_factory.mktemp("graphs")
    return {
        name: Judge(checkpoint(folder / name, name, seed=seed, **EXTRA.get(name, {})))
        for seed, name in enumerate(ARCHITECTURES)
    }


def greedy(**how: Any) -> list[Work]:
    """Prompts around the borders of blocks, which end one after another: batches from 12 down to 1."""
    return [
        Work(prompt, SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, **how))
        for prompt, count in zip(PROMPTS, OUTPUTS, strict=True)
    ]


def require_padded_batches(seen: set[tuple[int, int]]) -> None:
    """(decodes, size of the graph): batches at the ladder's steps and between them have been run."""
    sizes = {size for _, size in seen}
    assert len(sizes) > 6
    assert any(decodes < size for decodes, size in seen)
    assert any(decodes == size for decodes, size in seen)


@contextlib.contextmanager
def watching(rank: Stepped) -> Iterator[set[tuple[int, int]]]:
    """Gathers (decodes, size of the graph) of each decode step."""
    runner = rank.rank.executor
    assert isinstance(runner, GpuRunner)
    assert runner._whole is not None
    seen: set[tuple[int, int]] = set()
    kept = runner._whole.fit

    def fit(size: int) -> int | None:
        fitting = kept(size)
        if fitting is not None:
            seen.add((size, fitting))
        return fitting

    runner._whole.fit = fit  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        runner._whole.fit = kept  # type: ignore[method-assign]


@pytest.mark.parametrize("block", [16, 256])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_float32_equals_transformers_with_graphs_and_without(architecture: str, block: int, judges: dict[str, Judge]) -> None:
    judge = judges[architecture]
    options = {"block_size": block, "max_num_seqs": 12, "max_num_batched_tokens": 512, "max_model_len": 512}
    with contextlib.closing(loop(judge.path, **options)) as rank:
        with watching(rank) as seen:
            graphs = rank.generate(greedy())
        sampled = rank.generate(mixture(14, 24))
        with rank.eager():
            eager, eager_sampled = rank.generate(greedy()), rank.generate(mixture(14, 24))
    require_padded_batches(seen)
    for lease in graphs:
        judge.require_best(lease, f"{architecture}, blocks of {block}, graphs")
    pairs = zip([*graphs, *sampled], [*eager, *eager_sampled], strict=True)
    for lease, other in pairs:
        assert len(lease.tokens) == lease.work.most
        judge.require_same(lease, other, f"{architecture}, blocks of {block}, graphs | eager")
    judge.require_rare()


def test_prompts_in_small_chunks_beside_decodes(judges: dict[str, Judge]) -> None:
    judge = judges[QWEN3]
    with contextlib.closing(loop(judge.path, max_num_seqs=12, max_num_batched_tokens=33, max_model_len=512)) as rank:
        for lease in rank.generate(greedy()):
            assert len(lease.tokens) == lease.work.most
            judge.require_best(lease, "chunks of 33")
    judge.require_rare()


def test_the_same_seed_says_the_same_alone_and_among_64(judges: dict[str, Judge]) -> None:
    judge = judges[QWEN3]
    works = mixture(64, 24)
    works += [
        Work([token % VOCAB for token in draw(20, seed=seed)], SamplingParams(temperature=1.0, max_tokens=24, ignore_eos=True),
             seed) for seed in range(4)
    ]  # fmt: skip
    works = works[-64:]
    with contextlib.closing(loop(judge.path, max_num_seqs=64, max_num_batched_tokens=2048)) as rank:
        together = rank.generate(works)
        alone = [rank.generate([work])[0] for work in works[::4] + works[-4:]]
    for lease, by_itself in zip(together[::4] + together[-4:], alone, strict=True):
        assert len(lease.tokens) == 24
        judge.require_same(lease, by_itself, "among 64 | alone")
    for lease in together[-4:]:
        judge.require_best(lease, "sampled among 64")
    judge.require_rare()


def test_bfloat16_parts_from_the_eager_path_at_small_margins_only(judges: dict[str, Judge]) -> None:
    options = {"dtype": "bfloat16", "block_size": 256, "max_num_seqs": 12, "max_num_batched_tokens": 512, "max_model_len": 512}
    works = greedy(logprobs=2)
    with contextlib.closing(loop(judges[QWEN3].path, **options)) as rank:
        graphs = rank.generate(works)
        with rank.eager():
            eager = rank.generate(works)
    margins = [parted for pair in zip(graphs, eager, strict=True) if (parted := margin_where_apart(*pair)) is not None]
    count = sum(len(lease.tokens) for lease in eager)
    print(f"bfloat16: {len(margins)} of {len(works)} sequences ({count} tokens) parted from the eager path, margins {margins}")
    assert all(margin < MARGIN for margin in margins)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("block", [16, 256])
def test_kv_in_fp8_says_with_graphs_what_it_says_without(dtype: str, block: int, judges: dict[str, Judge]) -> None:
    """And, in float32, what a CPU says with its KV in FP8. Rounding may push a number over to another of FP8's."""
    options: dict[str, Any] = {
        "dtype": dtype, "kv_dtype": "fp8", "block_size": block, "max_num_seqs": 12, "max_num_batched_tokens": 512,
        "max_model_len": 512,
    }  # fmt: skip
    works = greedy(logprobs=2)
    with contextlib.closing(loop(judges[QWEN3].path, **options)) as rank:
        assert rank.pool.layout.dtype == "float8_e4m3fn"
        runs = [rank.generate(works)]
        with rank.eager():
            eager = rank.generate(works)
    if dtype == "float32":
        with contextlib.closing(Stepped(judges[QWEN3].path, device="cpu", depth=0, **options)) as on_cpu:
            runs.append(on_cpu.generate(works))
    for run in runs:
        margins = [margin_where_apart(*pair) for pair in zip(run, eager, strict=True)]
        assert all(margin is None or margin < MARGIN for margin in margins)


def test_large_prefill_steps_are_the_same_captured_and_launched_one_by_one(tmp_path: Path) -> None:
    """Steps of some thousand prompt tokens, of several prompts and of one in parts, each padded up to the next size."""
    options = {"dtype": "bfloat16", "block_size": 256, "max_num_batched_tokens": 4096, "max_model_len": 6144}
    lengths = (2900, 1000, 40, 5000, 700, 3300)
    works = [
        Work(
            [token % VOCAB for token in draw(length, seed=length)],
            SamplingParams(temperature=0.0, max_tokens=3, logprobs=2, ignore_eos=True),
        )
        for length in lengths
    ]
    path = checkpoint(tmp_path / "long", QWEN3, max_position_embeddings=8192)
    with contextlib.closing(loop(path, **options)) as rank:
        captured = rank.generate(works)
        with rank.eager():
            eager = rank.generate(works)
    for ours, theirs in zip(captured, eager, strict=True):
        assert len(ours.tokens) == 3
        margin = margin_where_apart(ours, theirs)
        assert margin is None or margin < MARGIN


def margin_where_apart(lease: Lease, eager: Lease) -> float | None:
    """How much likelier the best token was than the second where they part; None if they never do."""
    if lease.tokens == eager.tokens:
        return None
    first, second = eager.logprobs[first_apart(lease.tokens, eager.tokens)].top_logprobs
    return first - second
