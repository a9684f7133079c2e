"""No row ever writes to another's block: a pool full of a bit pattern, padded graphs, and every slot that nobody was given.

The pattern is a NaN where only our own kernels read, so whoever reads a slot that was not written shows it in its tokens.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.prompts import draw
from tests.gpu.works import GPU, constrained, loop, mixture
from tests.workers.pattern import FINITE, NAN, fill, require_untouched
from tests.workers.stepping import Lease, Stepped, Work
from workers.execution.gpu.graphs import StepGraphs
from workers.execution.gpu.runner import GpuRunner

pytestmark = GPU


def runner_of(rank: Stepped) -> GpuRunner:
    assert isinstance(rank.rank.executor, GpuRunner)
    return rank.rank.executor


@contextlib.contextmanager
def padded_to(graphs: StepGraphs | None, least: int) -> Iterator[None]:
    """Inside, every step of these graphs is padded to `least`, if it is not larger."""
    assert graphs is not None
    kept = graphs.fit

    def fit(size: int) -> int | None:
        fitting = kept(size)
        return max(least, fitting) if fitting is not None else None

    graphs.fit = fit  # type: ignore[method-assign]
    try:
        yield
    finally:
        graphs.fit = kept  # type: ignore[method-assign]


def beside_chunks(rank: Stepped, works: list[Work]) -> list[Lease]:
    """Steps in which each of them decodes beside the chunks of the next ones."""
    leases = []
    for work in works:
        leases.append(rank.start(work))
        rank.turn()
        rank.turn()
    rank.run()
    return leases


@pytest.mark.parametrize("count", [1, 3])
def test_graphs_of_all_sizes_with_few_rows(rank: Stepped, count: int) -> None:
    runner = runner_of(rank)
    assert runner._whole is not None
    for size in runner._whole.sizes:
        if size < count:
            continue
        fill(rank, NAN)
        with padded_to(runner._whole, size):
            leases = beside_chunks(rank, mixture(count, 20, first=size))
        assert all(len(lease.tokens) == 20 for lease in leases), f"a NaN has been read at size {size}"
        require_untouched(rank, NAN, leases)


def test_prefill_graphs_of_all_sizes_with_few_tokens(rank: Stepped) -> None:
    """Beside decodes that are padded themselves; what fills up a step of chunks has a row and a slot of nobody."""
    runner = runner_of(rank)
    assert runner._whole is not None
    assert runner._prefills is not None
    works = [
        Work(draw(length, seed=length), work.params, length)
        for length, work in zip((2, 5, 16, 17, 31), mixture(5, 9), strict=True)
    ]
    for size in runner._prefills.sizes:
        fill(rank, NAN)
        with padded_to(runner._whole, 8), padded_to(runner._prefills, size):
            leases = beside_chunks(rank, works[:2])
            leases += rank.generate(works[2:])
        assert all(len(lease.tokens) == 9 for lease in leases), f"a NaN has been read at size {size}"
        require_untouched(rank, NAN, leases)


def test_graphs_up_to_the_logits_too(rank: Stepped) -> None:
    """A grammar's rows are sampled outside of the graph, the padding with them."""
    runner = runner_of(rank)
    assert runner._unsampled is not None
    for size in runner._unsampled.sizes[3::4]:
        fill(rank, NAN)
        with padded_to(runner._whole, size):
            leases = beside_chunks(rank, [*mixture(2, 20), constrained(30)])
        assert all(lease.tokens for lease in leases)
        assert [len(lease.tokens) for lease in leases[:2]] == [20, 20]
        require_untouched(rank, NAN, leases)


def test_a_full_batch_and_what_shrinks_from_it(rank: Stepped) -> None:
    """Rows of different ends: every batch from 16 down to 1, padded as the ladder has it."""
    fill(rank, NAN)
    works = [Work(work.prompt, mixture(1, 4 + 3 * at)[0].params, at) for at, work in enumerate(mixture(16, 1))]
    leases = [rank.start(work) for work in works]
    rank.run()
    assert [len(lease.tokens) for lease in leases] == [work.most for work in works]
    require_untouched(rank, NAN, leases)


def test_launch_by_launch(rank: Stepped) -> None:
    fill(rank, NAN)
    with rank.eager():
        leases = beside_chunks(rank, mixture(7, 20))
    assert all(len(lease.tokens) == 20 for lease in leases)
    require_untouched(rank, NAN, leases)


def test_tokens_are_those_of_a_clean_pool(rank: Stepped) -> None:
    """What stands in slots that a sequence has not written makes no difference."""
    rank.pool.data.zero_()
    clean = [lease.tokens for lease in rank.generate(mixture(12, 30))]
    fill(rank, NAN)
    assert [lease.tokens for lease in rank.generate(mixture(12, 30))] == clean


def test_large_blocks_and_narrow_numbers(model: Path) -> None:
    with contextlib.closing(loop(model, dtype="bfloat16", block_size=256, max_num_seqs=6)) as rank:
        fill(rank, FINITE)
        leases = beside_chunks(rank, mixture(4, 30))
        assert all(len(lease.tokens) == 30 for lease in leases)
        require_untouched(rank, FINITE, leases)
