"""What a leader says of its pool: all that is certain, and nothing that has been overwritten, by whomever."""

import numpy as np
import pytest
from msgspec.structs import replace

from kvcache.ids import BlockId
from kvcache.standing import Standing
from scheduler.protocol.leaders import Command, Drop, Grant, LeaseId, Load, Moved, Offload, Receive, Remap, Trim
from tests.shared.simulated import SimulatedExecutor, digest
from tests.workers.loop.test_batch import lease, start
from workers.loop.batch import ResidentBatch
from workers.loop.ledger import MOST_STEPS, Ledger
from workers.loop.rank import Rank

BLOCKS = 12


def ids(*blocks: int) -> bytes:
    return np.array(blocks, np.int32).tobytes()


def rank(depth: int = 0, max_model_len: int = 400, host_blocks: int = 2) -> Rank:
    batch = ResidentBatch(3, 4, 64, max_model_len)
    made = Rank(batch, SimulatedExecutor(max(BLOCKS, max_model_len // 4), 4, 3, 50), depth)
    made.ledger = Ledger(batch, max(BLOCKS, max_model_len // 4), host_blocks)
    return made


def run(rank: Rank, *commands: Command, turns: int = 1) -> None:
    rank.turn(commands)
    for _ in range(turns - 1):
        rank.turn(())


def told(rank: Rank) -> list[Standing]:
    """Once the batch is empty."""
    run(rank, *rank.vacate())
    while not rank.idle:
        rank.turn(())
    assert rank.ledger is not None
    here, host = rank.ledger.standing()
    assert not host
    return here


def summary(standing: list[Standing]) -> list[tuple[int, int | None, int]]:
    """(block, the one before it, its tokens), in order."""
    return [(each.block, each.before, len(each.content) // 4) for each in standing]


FIRST, SECOND = lease(1, 0), lease(2, 1)


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("steps", [3, MOST_STEPS, 3 * MOST_STEPS + 5])
def test_it_has_the_tokens_of_prompts_and_of_outputs(depth: int, steps: int) -> None:
    made = rank(depth)
    blocks = tuple(range(80, 0, -1))
    run(made, start(FIRST, 6, blocks=blocks, max_tokens=300), turns=steps)
    computed = 6 + steps - 1 - depth
    standing = told(made)
    assert [each.block for each in standing] == list(blocks[: len(standing)])
    assert [each.before for each in standing] == [None, *blocks[: len(standing) - 1]]
    tokens = np.frombuffer(b"".join(each.content for each in standing), np.int32)
    assert len(tokens) == computed
    assert tokens[:6].tolist() == list(range(6))
    state, executor = 0, made.executor
    assert isinstance(executor, SimulatedExecutor)
    for at, token in enumerate(tokens.tolist()):  # whatever it says, the KV there is of exactly these tokens
        state = digest(state, token)
        assert executor.caches[0][blocks[at // 4], at % 4] == state


def test_a_hit_is_known_though_nobody_here_has_computed_it() -> None:
    """It came from another group, or from host memory."""
    made = rank()
    run(made, start(FIRST, 10, cached=8, blocks=(5, 3, 4)))
    assert summary(told(made)) == [(5, None, 4), (3, 5, 4), (4, 3, 2)]


def test_a_salt_goes_with_the_first_block() -> None:
    made = rank()
    run(made, replace(start(FIRST, 4, blocks=(5,)), salt="tenant"))
    run(made, replace(start(SECOND, 4, blocks=(6,)), salt="other"))
    assert {(each.block, each.salt) for each in told(made)} == {(5, "tenant"), (6, "other")}


@pytest.mark.parametrize(
    "overwritten",
    [
        start(SECOND, 4, blocks=(2,)),
        Receive(1, ids(2), 1, 0, ()),
        Load(1, ids(1), ids(2)),
    ],
    ids=["start", "receive", "load"],
)
def test_what_follows_a_block_that_is_overwritten_is_not_told(overwritten: Command) -> None:
    made = rank()
    run(made, start(FIRST, 11, blocks=(1, 2, 3)))
    run(made, Drop(FIRST))
    run(made, overwritten)
    standing = told(made)
    assert [each for each in summary(standing) if each[0] != 2] == [(1, None, 4)]
    assert all(each.before is None for each in standing)


def test_a_block_that_is_granted_and_not_filled_is_not_told() -> None:
    made = rank()
    run(made, start(FIRST, 8, blocks=(1, 2)))
    run(made, Drop(FIRST))
    run(made, start(SECOND, 3, blocks=(5,)), Grant(SECOND, (2, 6)))
    assert summary(told(made)) == [(5, None, 3), (1, None, 4)]


def test_a_token_that_was_sampled_before_its_block_came_is_known() -> None:
    made = rank()
    run(made, start(FIRST, 4, blocks=(1,)), turns=2)  # it has sampled one, for which there is no block
    assert made.ledger is not None
    made.ledger._work_off()
    run(made, Grant(FIRST, (7,)), turns=3)
    tokens = [np.frombuffer(each.content, np.int32).tolist() for each in told(made)]
    again = rank()
    run(again, start(FIRST, 4, blocks=(1, 7)), turns=4)
    assert tokens == [np.frombuffer(each.content, np.int32).tolist() for each in told(again)]
    assert len(tokens) == 2


def test_blocks_that_were_given_back_are_told_until_somebody_else_has_them() -> None:
    made = rank()
    run(made, start(FIRST, 16, blocks=(1, 2, 3, 4, 5)))
    run(made, Trim(FIRST, 2), turns=2)
    assert [each.block for each in told(made)] == [1, 2, 3, 4, 5]
    made = rank()
    run(made, start(FIRST, 16, blocks=(1, 2, 3, 4, 5)))
    run(made, Trim(FIRST, 2), start(SECOND, 4, blocks=(2, 6)), turns=3)
    assert summary(told(made)) == [(2, None, 4), (6, 2, 2), (1, None, 4)], "what followed it cannot be told any more"


def test_what_a_row_has_sampled_is_not_taken_for_what_stands_in_a_block_that_it_has_given_back() -> None:
    """Not all steps have been worked off when the block goes to somebody else."""
    made = rank()
    run(made, start(FIRST, 4, blocks=(1, 2, 3, 4, 5), max_tokens=40), turns=12)
    run(made, Trim(FIRST, 3), replace(start(SECOND, 8, blocks=(2, 6)), max_tokens=1))
    contents = {each.block: each.content for each in told(made)}
    assert contents[BlockId(2)] == np.arange(4, dtype=np.int32).tobytes()


def test_a_prompt_that_is_granted_piece_by_piece_is_told_whole() -> None:
    """Also one that began in the midst: its first block follows what it has followed when it was filled."""
    made = rank()
    run(made, start(FIRST, 14, blocks=(1, 2)))
    run(made, Grant(FIRST, (3, 4)), turns=2)
    run(made, Drop(FIRST))
    run(made, start(SECOND, 18, cached=12, blocks=(3, 5), first=2), Grant(SECOND, (6,)), turns=2)
    contents = {each.block: np.frombuffer(each.content, np.int32).tolist() for each in told(made)}
    assert contents[BlockId(5)] == [12, 13, 14, 15]
    assert contents[BlockId(6)][:2] == [16, 17]
    assert contents[BlockId(4)][:2] == [12, 13]
    assert summary(told(made))[:5] == [(1, None, 4), (2, 1, 4), (3, 2, 4), (5, 3, 4), (6, 5, 3)]


def test_what_a_window_that_was_brought_follows_is_not_known() -> None:
    """Block 2 had followed block 1, which stands there still."""
    made = rank()
    run(made, start(FIRST, 12, blocks=(1, 2, 3)))
    run(made, Drop(FIRST))
    run(made, Receive(1, ids(2), 1, 0, ()))
    run(made, start(SECOND, 10, cached=8, blocks=(2, 6), first=1))
    assert summary(told(made)) == [(1, None, 4)]


def test_after_a_twin_was_given_up_the_next_block_follows_the_other() -> None:
    made = rank()
    run(made, start(FIRST, 4, blocks=(1,)))
    run(made, start(SECOND, 7, blocks=(5, 6)))
    run(made, Remap(SECOND, 0, 1))
    run(made, start(lease(3, 2), 2, blocks=(5,)))
    assert (6, 1, 4) in summary(told(made))


def test_the_last_used_comes_first_and_a_block_before_what_follows_it() -> None:
    made = rank()
    for at, blocks in enumerate([(1, 2), (3, 4), (5, 6)]):
        run(made, start(lease(at + 1, 0), 8, blocks=blocks, cached=0, max_tokens=1))
    run(made, start(lease(9, 0), 8, cached=4, blocks=(1, 9), max_tokens=1))
    assert [each.block for each in told(made)] == [1, 9, 5, 6, 3, 4, 2]


def test_nobody_may_run_when_it_is_told() -> None:
    made = rank()
    run(made, start(FIRST, 4, blocks=(1,)))
    assert made.ledger is not None
    with pytest.raises(AssertionError, match="who runs"):
        made.ledger.standing()


def test_commands_for_a_lease_that_has_ended_change_nothing() -> None:
    made = rank()
    run(made, start(FIRST, 8, blocks=(1, 2), max_tokens=1))  # it ends by itself
    before = told(made)
    run(made, Grant(FIRST, (3,)), Remap(FIRST, 0, 7), Drop(FIRST), Drop(LeaseId(0)))
    assert told(made) == before
    assert summary(before) == [(1, None, 4), (2, BlockId(1), 4)]


# ---- host memory


def offload(rank: Rank, transfer: int, blocks: tuple[int, ...], host_blocks: tuple[int, ...], *, ok: bool = True) -> None:
    run(rank, Offload(transfer, ids(*blocks), ids(*host_blocks)))
    assert rank.ledger is not None
    rank.ledger.moved(Moved(0, transfer, ok))


def stored(rank: Rank) -> list[tuple[int, int | None, int]]:
    run(rank, *rank.vacate())
    assert rank.ledger is not None
    return summary(rank.ledger.standing()[1])


def test_what_was_copied_to_host_memory_is_known_there() -> None:
    """In two transfers, of which the second goes on where the first one ended."""
    made = rank(host_blocks=5)
    run(made, start(FIRST, 8, blocks=(1, 2), max_tokens=1))
    offload(made, 7, (1, 2), (4, 0))
    run(made, start(SECOND, 16, cached=8, blocks=(1, 2, 6, 7), max_tokens=1))
    offload(made, 8, (6, 7), (3, 1))
    assert stored(made) == [(4, None, 4), (0, 4, 4), (3, 0, 4), (1, 3, 4)]
    assert made.ledger is not None
    here, there = made.ledger.standing()
    assert [each.content for each in there] == [each.content for each in here]


def test_what_comes_from_host_memory_is_still_there() -> None:
    """And what follows it goes to the same place."""
    made = rank(host_blocks=5)
    run(made, start(FIRST, 4, blocks=(1,), max_tokens=1))
    offload(made, 1, (1,), (4,))
    run(made, start(SECOND, 4, blocks=(1,), max_tokens=1))  # others: it is gone from the pool
    run(made, Load(2, ids(4), ids(9)))
    run(made, start(lease(3, 2), 8, cached=4, blocks=(9, 8), max_tokens=1))
    offload(made, 3, (8,), (2,))
    assert stored(made) == [(4, None, 4), (2, 4, 4)]


FAULTS = ["it failed", "nobody has answered", "it was overwritten", "nobody knows what it follows", "nor what it is"]


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_not_certain_of_host_memory_is_not_told(fault: str) -> None:
    made = rank(host_blocks=5)
    run(made, start(FIRST, 8, blocks=(1, 2), max_tokens=1))
    if fault == "nobody knows what it follows":
        offload(made, 1, (2,), (3,))
    elif fault == "nor what it is":
        offload(made, 1, (9,), (3,))
    elif fault == "nobody has answered":
        run(made, Offload(1, ids(1), ids(3)))
    else:
        offload(made, 1, (1,), (3,), ok=fault != "it failed")
    if fault == "it was overwritten":
        run(made, Offload(2, ids(2), ids(3)))
    assert stored(made) == []


def test_what_follows_a_block_that_is_overwritten_in_host_memory_is_not_told() -> None:
    made = rank(host_blocks=5)
    run(made, start(FIRST, 8, blocks=(1, 2), max_tokens=1))
    run(made, replace(start(SECOND, 4, blocks=(5,), max_tokens=1), salt="other"))
    offload(made, 1, (1,), (3,))
    offload(made, 2, (5,), (3,))
    offload(made, 3, (2,), (4,))
    assert stored(made) == [(3, None, 4)]


def test_a_transfer_of_another_scheduler_is_not_taken_for_one_of_the_last() -> None:
    made = rank(host_blocks=5)
    run(made, start(FIRST, 8, blocks=(1, 2), max_tokens=1))
    run(made, Offload(1, ids(1), ids(3)))
    assert made.ledger is not None
    made.ledger.forget_transfers()
    made.ledger.moved(Moved(1, 1, True))
    assert stored(made) == []


def test_narrow_blocks_are_told_beside_the_full_ones_until_either_is_overwritten() -> None:
    batch = ResidentBatch(3, 4, 64, 400, narrow=True)
    executor = SimulatedExecutor(12, 4, 3, 5, None, 6, 8)
    group = Rank(batch, executor)
    group.ledger = Ledger(batch, 12, 0, 8)
    begun = replace(start(lease(1, 0), tokens=11, blocks=(3, 4, 5), max_tokens=6), narrow=ids(0, 1, 2))
    run(group, begun, turns=3)
    run(group, Trim(lease(1, 0), 1, narrow=True))
    run(group, Remap(lease(1, 0), 1, 7, narrow=True), Drop(lease(1, 0)))
    group.ledger.standing()
    assert sorted(group.ledger.narrow()) == [(0, 3), (2, 5), (7, 4)]
    overwriting = replace(start(lease(2, 1), tokens=3, blocks=(5,)), narrow=ids(7))
    run(group, overwriting, Drop(lease(2, 1)))
    group.ledger.standing()
    assert group.ledger.narrow() == [(0, 3)], "block 5 and narrow block 7 are another's"
