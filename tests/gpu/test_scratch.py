"""No row ever writes to another's page: a pool full of a bit pattern, padded graphs, and every slot that nobody was given.

The pattern is a NaN where only our own kernels read, so whoever reads a slot that was not written shows it in its tokens.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.gpu.works import GPU, constrained, loop, mixture
from tests.workers.stepping import Lease, Stepped, Work
from workers.execution.gpu_runner import GpuRunner

pytestmark = GPU

NAN = 0x7FC5A3C5
"""A NaN as float32; its halves are numbers as bfloat16, and the lower one as float16."""
FINITE = 0x3D2B3D2B
"""0.04 as bfloat16 and in float32: flash-attn multiplies what it does not want by zero."""


def runner_of(rank: Stepped) -> GpuRunner:
    assert isinstance(rank.rank.executor, GpuRunner)
    return rank.rank.executor


def words(rank: Stepped) -> torch.Tensor:
    """[page, layer, k|v, slot, words of a slot] int32, a view of the pool."""
    data = rank.pool.data
    return data.view(*data.shape[:4], -1).view(torch.int32)


def fill(rank: Stepped, pattern: int) -> None:
    words(rank).fill_(pattern)


def require_untouched(rank: Stepped, pattern: int, leases: list[Lease]) -> None:
    """Every slot but those that the leases have computed, and the scratch page, has the pattern still; of those none has."""
    pool = words(rank)
    given = torch.zeros(pool.shape[0], rank.page, dtype=torch.bool)
    for lease in leases:
        for position in range(lease.computed):
            given[lease.pages[position // rank.page], position % rank.page] = True
    same = (pool == pattern).flatten(4).all(-1).all(2).all(1).cpu()
    scratch = rank.built.pages
    wrong = (~same & ~given).nonzero().tolist()
    assert [place for place in wrong if place[0] != scratch] == [], "(page, slot) written that nobody was given"
    missing = (same & given).nonzero().tolist()
    assert missing == [], "(page, slot) that should have been written"
    assert [slot for page, slot in wrong if page == scratch] in ([], [0]), "padding writes to the first slot of its page"


@contextlib.contextmanager
def padded_to(runner: GpuRunner, size: int) -> Iterator[None]:
    """Inside, every decode step is padded to `size`."""
    assert runner._whole is not None
    kept = runner._whole.fit
    runner._whole.fit = lambda batch: max(size, kept(batch) or batch)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        runner._whole.fit = kept  # type: ignore[method-assign]


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
        with padded_to(runner, size):
            leases = beside_chunks(rank, mixture(count, 20, first=size))
        assert all(len(lease.tokens) == 20 for lease in leases), f"a NaN has been read at size {size}"
        require_untouched(rank, NAN, leases)


def test_graphs_up_to_the_logits_too(rank: Stepped) -> None:
    """A grammar's rows are sampled outside of the graph, the padding with them."""
    runner = runner_of(rank)
    assert runner._unsampled is not None
    for size in runner._unsampled.sizes[3::4]:
        fill(rank, NAN)
        with padded_to(runner, size):
            leases = beside_chunks(rank, [*mixture(2, 20), constrained(30)])
        assert all(lease.tokens for lease in leases)
        assert [len(lease.tokens) for lease in leases[:2]] == [20, 20]
        # the grammar's end is seen a step after the next has begun, which may write one slot more
        ended = leases[2]
        page, slot = divmod(ended.computed, rank.page)
        if page < len(ended.pages):
            words(rank)[ended.pages[page], :, :, slot] = NAN
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


def test_large_pages_and_narrow_numbers(model: Path) -> None:
    with contextlib.closing(loop(model, dtype="bfloat16", block_size=256, max_num_seqs=6)) as rank:
        fill(rank, FINITE)
        leases = beside_chunks(rank, mixture(4, 30))
        assert all(len(lease.tokens) == 30 for lease in leases)
        require_untouched(rank, FINITE, leases)
