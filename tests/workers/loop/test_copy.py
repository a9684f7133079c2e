"""A sequence that starts inside a copied block says what it says undisturbed: real model, one rank and two, steps under way."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from scheduler.protocol.leaders import Copy, Drop
from tests.shared.checkpoints import make_checkpoint
from tests.workers.loop.test_batch import lease
from tests.workers.parallel.real_groups import OUTPUT, PROMPT, Group, start


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"))


Make = Callable[[int, str, int], Group]


@pytest.fixture
def make(checkpoint: Path) -> Iterator[Make]:
    made: list[Group] = []

    def group(size: int, dtype: str, depth: int) -> Group:
        made.append(Group(checkpoint, size, dtype, depth))
        return made[-1]

    yield group
    for one in made:
        one.close()


@pytest.mark.few
@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [1, 2])
def test_a_start_inside_a_copied_block(make: Make, size: int, dtype: str, depth: int) -> None:
    group = make(size, dtype, depth)
    undisturbed = group.output(lease(1, 0), start(lease(1, 0), (0, 1, 2, 3, 4)))
    assert len(undisturbed) == OUTPUT
    second = lease(2, 1)
    assert group.output(second, Copy(2, 9, 11), start(second, (0, 1, 9, 8, 7), cached=43)) == undisturbed


def test_without_the_copy_it_says_something_else(make: Make) -> None:
    """The other tests can fail: what the block held before is not what the sequence wants."""
    group = make(1, "float32", 0)
    undisturbed = group.output(lease(1, 0), start(lease(1, 0), (0, 1, 2, 3, 4)))
    group.output(lease(2, 0), start(lease(2, 0), (5, 6, 9, 8, 7), tokens=PROMPT[::-1]))
    second = lease(3, 1)
    assert group.output(second, Copy(2, 9, 3), start(second, (0, 1, 9, 8, 7), cached=43)) != undisturbed


@pytest.mark.parametrize("depth", [0, 1])
def test_the_source_is_granted_again_at_once(make: Make, depth: int) -> None:
    """Copied while its owner decodes; in the same run of the log the owner is dropped and a newcomer overwrites its blocks."""
    group = make(1, "float64", depth)
    undisturbed = group.output(lease(1, 0), start(lease(1, 0), (0, 1, 2, 3, 4)))
    first, second, third = lease(2, 0), lease(3, 1), lease(4, 0)
    group.turn(start(first, (0, 1, 2, 3, 4)))
    group.turn()
    group.turn()
    taken = group.output(
        second,
        Copy(0, 11, 16),
        Copy(1, 10, 16),
        Copy(2, 9, 12),
        start(second, (11, 10, 9, 8, 7), cached=44),
        Drop(first),
        start(third, (2, 1, 0, 3, 4), tokens=PROMPT[::-1]),
    )
    assert taken == undisturbed
