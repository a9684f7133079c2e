"""How evenly experts were wanted, from what reports tell of them."""

import numpy as np
import pytest

from scheduler.protocol.leaders import ExpertLoad
from scheduler.state.experts import ExpertBalance


def load(*tokens: list[int]) -> ExpertLoad:
    return ExpertLoad(tuple(range(len(tokens))), np.array(tokens, np.int64).tobytes())


def test_imbalance_is_of_what_came_since_the_last_time() -> None:
    balance = ExpertBalance()
    assert (balance.layers, balance.imbalance) == ((), ())
    balance.take(load([6, 2, 0, 0], [2, 2, 2, 2]))
    assert (balance.layers, balance.imbalance) == ((0, 1), (3.0, 1.0))
    balance.take(load([7, 3, 1, 1], [2, 2, 2, 6]))
    assert (balance.imbalance, balance.busiest) == ((1.0, 4.0), (0, 3))
    assert balance.tokens.tolist() == [[7, 3, 1, 1], [2, 2, 2, 6]]


def test_while_nothing_ran_it_stays() -> None:
    balance = ExpertBalance()
    balance.take(load([4, 0]))
    balance.take(load([4, 0]))
    assert balance.imbalance == (2.0,)


@pytest.mark.parametrize(
    "told", [ExpertLoad((), b""), ExpertLoad((0, 1), bytes(24)), ExpertLoad((0,), bytes(9)), ExpertLoad((0,), b"")]
)
def test_what_is_not_whole(told: ExpertLoad) -> None:
    assert not told.whole
    assert load([1, 2], [3, 4]).whole
