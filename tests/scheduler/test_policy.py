"""Admission, routing and victims, as functions over plain numbers."""

import pytest

from scheduler.policy import GroupLoad, VictimCost, admissible, choose_victim, route, time_to_first_token

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


# ---- victims

FULL = VictimCost(lost_tokens=1024, freed_pages=4, output_tokens=300, place=7)


def test_the_cheapest_to_rebuild_for_each_page_freed_gives_way() -> None:
    half = FULL._replace(lost_tokens=512)
    assert choose_victim([FULL, half], PAGE) == 1
    assert choose_victim([FULL, half._replace(freed_pages=2)], PAGE) == 0, "equal cost a page: the first has as much output"
    assert choose_victim([FULL, half._replace(freed_pages=1)], PAGE) == 0
    assert choose_victim([FULL, FULL._replace(lost_tokens=0)], PAGE) == 1, "it has computed nothing, or others have it all"


def test_how_full_the_last_page_is_does_not_decide() -> None:
    assert choose_victim([FULL._replace(lost_tokens=1020), FULL._replace(lost_tokens=1000, place=6)], PAGE) == 0
    assert choose_victim([FULL._replace(lost_tokens=1020), FULL._replace(lost_tokens=800, place=6)], PAGE) == 1


def test_equal_costs_go_by_progress_then_priority_then_age() -> None:
    assert choose_victim([FULL, FULL._replace(output_tokens=20, place=1)], PAGE) == 1
    assert choose_victim([FULL, FULL._replace(output_tokens=290, place=8)], PAGE) == 1, "in the same page of output"
    urgent = FULL._replace(place=(-1 << 48) + 900)
    assert choose_victim([urgent, FULL], PAGE) == 1
    assert choose_victim([FULL, FULL._replace(place=6)], PAGE) == 0


def test_who_frees_nothing_gives_way_last_but_does() -> None:
    shared = FULL._replace(lost_tokens=0, freed_pages=0, place=9)
    assert choose_victim([shared, FULL], PAGE) == 1
    assert choose_victim([shared._replace(place=8), shared], PAGE) == 1, "all share with each other: the last"
    assert choose_victim([], PAGE) is None
