"""A sequence that starts inside a copied page says what it says undisturbed: real model, one rank and two, steps under way."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from scheduler.messages import Command, Copy, Drop, LeaseId, Start
from scheduler.sampling import SamplingParams
from tests.checkpoints import make_checkpoint
from tests.workers.test_batch import lease
from tests.workers.test_build import CONFIG
from workers.build import build_rank
from workers.communicator import Communicator
from workers.in_process import Solo, ThreadGroup
from workers.rank import Rank

PROMPT = np.random.default_rng(7).integers(0, 199, 45).tolist()
OUTPUT = 20
PAGES = 12  # of 16 tokens


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"))


class Group:
    """Ranks as threads, all of which make the same turns."""

    def __init__(self, model: Path, size: int, dtype: str, depth: int) -> None:
        config = replace(CONFIG, model=str(model), dtype=dtype, kv_memory=PAGES << 20, max_model_len=96)
        self.threads = ThreadPoolExecutor(size)
        comms: Sequence[Communicator] = ThreadGroup.create(size) if size > 1 else [Solo()]

        def build(comm: Communicator) -> Rank:
            built = build_rank(config, comm)
            assert built.pages >= PAGES
            return Rank(built.rank.batch, built.rank.executor, depth)

        self.ranks = list(self.threads.map(build, comms))

    def turn(self, *commands: Command) -> dict[int, int]:
        """{lease: token} of the step that was committed, the same on every rank."""
        results = list(self.threads.map(lambda rank: rank.turn(commands), self.ranks))
        made = []
        for result in results:
            samples = result.step.samples & result.live if result is not None else np.zeros(0, np.bool_)
            leases = result.step.leases[samples].tolist() if result is not None else []
            made.append(dict(zip(leases, result.tokens.ids[samples].tolist() if result is not None else [], strict=True)))
        assert all(tokens == made[0] for tokens in made)
        return made[0]

    def output(self, name: LeaseId, *commands: Command) -> list[int]:
        tokens = []
        while True:
            tokens += [token for of, token in self.turn(*commands).items() if of == name]
            commands = ()
            if self.ranks[0].idle:
                return tokens

    def close(self) -> None:
        for rank in self.ranks:
            rank.close()
        self.threads.shutdown()


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


def start(name: LeaseId, blocks: Sequence[int], cached: int = 0, tokens: Sequence[int] = PROMPT) -> Start:
    return Start(
        lease=name, tokens=np.array(tokens, np.int32).tobytes(), prompt_tokens=len(tokens), cached_tokens=cached,
        blocks=np.array(blocks, np.int32).tobytes(), params=SamplingParams(max_tokens=OUTPUT, temperature=0.0), seed=3,
        choice=0, stop_ids=(), max_tokens=OUTPUT,
    )  # fmt: skip


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [1, 2])
def test_a_start_inside_a_copied_page(make: Make, size: int, dtype: str, depth: int) -> None:
    group = make(size, dtype, depth)
    undisturbed = group.output(lease(1, 0), start(lease(1, 0), (0, 1, 2, 3, 4)))
    assert len(undisturbed) == OUTPUT
    second = lease(2, 1)
    assert group.output(second, start(second, (0, 1, 9, 8, 7), cached=43), Copy(second, 2, 9, 11)) == undisturbed


def test_without_the_copy_it_says_something_else(make: Make) -> None:
    """The other tests can fail: what the page held before is not what the sequence wants."""
    group = make(1, "float32", 0)
    undisturbed = group.output(lease(1, 0), start(lease(1, 0), (0, 1, 2, 3, 4)))
    group.output(lease(2, 0), start(lease(2, 0), (5, 6, 9, 8, 7), tokens=PROMPT[::-1]))
    second = lease(3, 1)
    assert group.output(second, start(second, (0, 1, 9, 8, 7), cached=43), Copy(second, 2, 9, 3)) != undisturbed


@pytest.mark.parametrize("depth", [0, 1])
def test_the_source_is_granted_again_at_once(make: Make, depth: int) -> None:
    """Copied while its owner decodes; in the same run of the log the owner is dropped and a newcomer overwrites its pages."""
    group = make(1, "float64", depth)
    undisturbed = group.output(lease(1, 0), start(lease(1, 0), (0, 1, 2, 3, 4)))
    first, second, third = lease(2, 0), lease(3, 1), lease(4, 0)
    group.turn(start(first, (0, 1, 2, 3, 4)))
    group.turn()
    group.turn()
    taken = group.output(
        second,
        start(second, (11, 10, 9, 8, 7), cached=44),
        Copy(second, 0, 11, 16),
        Copy(second, 1, 10, 16),
        Copy(second, 2, 9, 12),
        Drop(first),
        start(third, (2, 1, 0, 3, 4), tokens=PROMPT[::-1]),
    )
    assert taken == undisturbed


def test_a_copy_whose_lease_has_ended_leaves_its_target_alone(make: Make) -> None:
    """The target may be another's by then."""
    group = make(1, "float32", 0)
    undisturbed = group.output(lease(1, 0), start(lease(1, 0), (0, 1, 2, 3, 4)))
    first, second = lease(2, 0), lease(3, 1)
    group.turn(start(first, (0, 1, 9, 8, 7), cached=43))
    made = group.output(second, Drop(first), start(second, (0, 1, 2, 3, 4), cached=44), Copy(first, 5, 2, 16))
    assert made == undisturbed
