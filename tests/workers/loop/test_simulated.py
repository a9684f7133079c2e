"""The simulated group notices what a real model would: stale blocks, wrong tables, hits on what was never computed."""

import numpy as np
import pytest

from scheduler.protocol.leaders import Command, Copy
from tests.shared.simulated import SimulatedExecutor, continuation, digest, next_token
from tests.workers.loop.test_batch import lease, start
from workers.loop.batch import ResidentBatch
from workers.loop.rank import Rank

VOCABULARY = 1 << 20
PROMPT = list(range(6))


def output(executor: SimulatedExecutor, cached: int, blocks: tuple[int, ...], *copies: Copy) -> list[int]:
    rank = Rank(ResidentBatch(2, 4, 64, 32), executor)
    tokens = []
    commands: list[Command] = [start(lease(1, 0), tokens=6, cached=cached, blocks=blocks, max_tokens=3), *copies]
    while (result := rank.turn(commands)) is not None:
        commands = []
        tokens += result.tokens.ids.tolist()
    return tokens


def test_undisturbed() -> None:
    assert output(SimulatedExecutor(8, 4, 2, VOCABULARY), 0, (3, 1, 6)) == continuation(PROMPT, 3, VOCABULARY)


def test_a_hit_on_what_was_computed_gives_the_same_tokens() -> None:
    executor = SimulatedExecutor(8, 4, 2, VOCABULARY)
    output(executor, 0, (3, 1, 6))
    assert output(executor, 4, (3, 0, 2)) == continuation(PROMPT, 3, VOCABULARY)


def test_a_hit_on_what_was_never_computed_does_not() -> None:
    assert output(SimulatedExecutor(8, 4, 2, VOCABULARY), 4, (3, 1, 6)) != continuation(PROMPT, 3, VOCABULARY)


@pytest.mark.parametrize("copied", [0, 1])
def test_a_hit_inside_a_block_reads_what_was_copied(copied: int) -> None:
    executor = SimulatedExecutor(8, 4, 2, VOCABULARY)
    output(executor, 0, (3, 1, 6))
    made = output(executor, 5, (3, 0, 2), Copy(1, 0, copied))
    assert (made == continuation(PROMPT, 3, VOCABULARY)) is (copied == 1)


def test_a_stale_or_wrong_block_does_not() -> None:
    executor = SimulatedExecutor(8, 4, 2, VOCABULARY)
    output(executor, 0, (3, 1, 6))
    assert output(executor, 4, (1, 0, 2)) != continuation(PROMPT, 3, VOCABULARY)
    executor.caches[0][3] += np.uint64(1)
    assert output(executor, 4, (3, 0, 2)) != continuation(PROMPT, 3, VOCABULARY)


def test_a_digest_depends_on_every_token_and_its_place() -> None:
    states = set()
    for prompt in ([0], [1], [0, 0], [0, 1], [1, 0], [1, 1], [0, 0, 0]):
        state = 0
        for token in prompt:
            state = digest(state, token)
        states.add(state)
        assert 0 <= next_token(state, 7) < 7
    assert len(states) == 7
