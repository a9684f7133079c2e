"""Admission, routing and victims, as functions over plain numbers."""

import pytest

from scheduler.policy import GroupLoad, admissible, route, time_to_first_token

IDLE = GroupLoad(
    hit_tokens=0, new_pages=4, free=100, available=100, total=100, free_rows=8, running=0, backlog=0, starving=False
)
TOKENS, PAGE = 1024, 256


def test_a_prefix_attracts() -> None:
    assert route([IDLE, IDLE._replace(hit_tokens=3 * PAGE, new_pages=1)], TOKENS, PAGE) == 1


def test_the_longest_prefix_loses_to_an_idle_group_when_its_own_is_loaded() -> None:
    hit = IDLE._replace(hit_tokens=3 * PAGE, new_pages=1)
    assert route([IDLE, hit._replace(backlog=3000)], TOKENS, PAGE) == 1
    assert route([IDLE, hit._replace(backlog=3200)], TOKENS, PAGE) == 0
    assert route([IDLE, hit._replace(running=180)], TOKENS, PAGE) == 1
    assert route([IDLE, hit._replace(running=200)], TOKENS, PAGE) == 0


def test_pages_that_would_be_evicted_cost() -> None:
    full = IDLE._replace(free=0, available=50)
    assert time_to_first_token(full, TOKENS, PAGE) > time_to_first_token(IDLE, TOKENS, PAGE)
    assert route([full, IDLE._replace(running=1)], TOKENS, PAGE) == 1


def test_ties_go_to_the_group_with_more_pages_then_to_the_first() -> None:
    assert route([IDLE, IDLE, IDLE], TOKENS, PAGE) == 0
    assert route([IDLE, IDLE._replace(available=101)], TOKENS, PAGE) == 1


def test_equal_requests_spread_over_equal_groups() -> None:
    loads = [IDLE] * 4
    for _ in range(8):
        chosen = route(loads, TOKENS, PAGE)
        assert chosen is not None
        loads[chosen] = loads[chosen]._replace(running=loads[chosen].running + 1)
    assert [load.running for load in loads] == [2] * 4


@pytest.mark.parametrize(
    ("load", "may_start"),
    [
        (IDLE, True),
        (IDLE._replace(free_rows=0), False),
        (IDLE._replace(starving=True, running=1), False),
        (IDLE._replace(free=0, available=4), True),  # an empty group needs no head room
        (IDLE._replace(free=0, available=4, running=1), False),
        (IDLE._replace(free=0, available=5, running=1), True),
        (IDLE._replace(free=0, available=13, running=1, total=1_000), False),
        (IDLE._replace(free=0, available=14, running=1, total=1_000), True),
        (IDLE._replace(free=3, available=3), False),
    ],
)
def test_the_admission_watermark(load: GroupLoad, may_start: bool) -> None:
    assert admissible(load) is may_start
    assert (route([load], TOKENS, PAGE) == 0) is may_start


def test_no_group_at_all() -> None:
    assert route([], TOKENS, PAGE) is None
