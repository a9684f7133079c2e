"""Admission, routing and victims, as functions over plain numbers."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler import policy
from scheduler.policy import GroupLoad, VictimCost, admissible, choose_victim, terms, time_to_first_token

IDLE = GroupLoad(
    hit_tokens=0, new_blocks=4, free=100, available=100, total=100, free_rows=8, running=0, backlog=0, starving=False
)
TOKENS, BLOCK = 1024, 256


Ways = Sequence[GroupLoad]
"""What a closer look at one group shows: the group as it is, and perhaps once more with a fetch."""


def choose(groups: Sequence[Ways], revived: Sequence[int] = ()) -> tuple[tuple[int, int] | None, list[int]]:
    """What `route` chooses, and where it took a closer look. revived: blocks of each hit that it learns only there."""
    looks: list[int] = []

    def look(at: int) -> list[tuple[GroupLoad, int]]:
        looks.append(at)
        return [(load, way) for way, load in enumerate(groups[at])]

    loads = [ways[0] for ways in groups]
    new = np.array([load.new_blocks for load in loads], np.int64) - (np.array(revived, np.int64) if revived else 0)
    room = np.array([policy.room(load.available, load.total, load.running) for load in loads], np.int64)
    backlog, running = (np.array([getattr(load, name) for load in loads]) for name in ("backlog", "running"))
    open_ = np.array([load.free_rows > 0 and not load.starving for load in loads], np.bool_)
    evicted = new - np.array([load.free for load in loads], np.int64)
    available = np.array([load.available for load in loads], np.int64)
    least = policy.least_costs(np.array([TOKENS - load.hit_tokens for load in loads]), backlog, running, evicted, BLOCK)
    fetched = np.array([TOKENS - ways[-1].hit_tokens for ways in groups])
    fetch_work = np.array([ways[-1].fetch_work for ways in groups])
    least = np.minimum(least, policy.least_costs(fetched, backlog, running, evicted, BLOCK, fetch_work))
    bounds = policy.cheapest_first(least, open_ & (new <= room), available)
    return policy.route(bounds, look, TOKENS, BLOCK), looks


def route(loads: Sequence[GroupLoad], tokens: int, block: int) -> int | None:
    assert (tokens, block) == (TOKENS, BLOCK)
    choice, _ = choose([(load,) for load in loads])
    return None if choice is None else choice[0]


def test_a_prefix_attracts() -> None:
    assert route([IDLE, IDLE._replace(hit_tokens=3 * BLOCK, new_blocks=1)], TOKENS, BLOCK) == 1


def test_the_longest_prefix_loses_to_an_idle_group_when_its_own_is_loaded() -> None:
    hit = IDLE._replace(hit_tokens=3 * BLOCK, new_blocks=1)
    assert route([IDLE, hit._replace(backlog=3000)], TOKENS, BLOCK) == 1
    assert route([IDLE, hit._replace(backlog=3200)], TOKENS, BLOCK) == 0
    assert route([IDLE, hit._replace(running=180)], TOKENS, BLOCK) == 1
    assert route([IDLE, hit._replace(running=200)], TOKENS, BLOCK) == 0


def test_blocks_that_would_be_evicted_cost() -> None:
    full = IDLE._replace(free=0, available=50)
    assert time_to_first_token(full, TOKENS, BLOCK) > time_to_first_token(IDLE, TOKENS, BLOCK)
    assert route([full, IDLE._replace(running=1)], TOKENS, BLOCK) == 1


def test_a_hit_evicts_nothing_where_it_lies_and_a_fetch_pays_for_the_room_of_its_copies() -> None:
    full = IDLE._replace(free=0, available=50)
    hit = full._replace(hit_tokens=3 * BLOCK, revived=3)
    fetch = full._replace(hit_tokens=3 * BLOCK, fetch_work=76)
    assert (hit.evicted, full.evicted, fetch.evicted) == (1, 4, 4)
    copies = 3 * policy.EVICTION_WEIGHT * BLOCK
    assert terms(fetch, TOKENS, BLOCK).evicted - terms(hit, TOKENS, BLOCK).evicted == copies

    def chosen(backlog: int, free: int) -> tuple[int, int] | None:
        ways = [load._replace(free=free) for load in (full, fetch)]
        return choose([(hit._replace(backlog=backlog),), ways], (3, 0))[0]

    assert chosen(800, free=0) == (0, 0), "waiting is cheaper than what the copies crowd out"
    assert chosen(1000, free=0) == (1, 1)
    assert chosen(800, free=4) == (1, 1), "there is room for them"


def test_ties_go_to_the_group_with_more_blocks_then_to_the_first() -> None:
    assert route([IDLE, IDLE, IDLE], TOKENS, BLOCK) == 0
    assert route([IDLE, IDLE._replace(available=101)], TOKENS, BLOCK) == 1


def test_equal_requests_spread_over_equal_groups() -> None:
    loads = [IDLE] * 4
    for _ in range(8):
        chosen = route(loads, TOKENS, BLOCK)
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
    assert (route([load], TOKENS, BLOCK) == 0) is may_start


def test_no_group_at_all() -> None:
    assert route([], TOKENS, BLOCK) is None


# ---- victims

FULL = VictimCost(lost_tokens=1024, freed_blocks=4, output_tokens=300, place=7)


def test_the_cheapest_to_rebuild_for_each_block_freed_gives_way() -> None:
    half = FULL._replace(lost_tokens=512)
    assert choose_victim([FULL, half], BLOCK) == 1
    assert choose_victim([FULL, half._replace(freed_blocks=2)], BLOCK) == 0, "equal cost a block: the first has as much output"
    assert choose_victim([FULL, half._replace(freed_blocks=1)], BLOCK) == 0
    assert choose_victim([FULL, FULL._replace(lost_tokens=0)], BLOCK) == 1, "it has computed nothing, or others have it all"


def test_how_full_the_last_block_is_does_not_decide() -> None:
    assert choose_victim([FULL._replace(lost_tokens=1020), FULL._replace(lost_tokens=1000, place=6)], BLOCK) == 0
    assert choose_victim([FULL._replace(lost_tokens=1020), FULL._replace(lost_tokens=800, place=6)], BLOCK) == 1


def test_equal_costs_go_by_progress_then_priority_then_age() -> None:
    assert choose_victim([FULL, FULL._replace(output_tokens=20, place=1)], BLOCK) == 1
    assert choose_victim([FULL, FULL._replace(output_tokens=290, place=8)], BLOCK) == 1, "in the same block of output"
    urgent = FULL._replace(place=(-1 << 48) + 900)
    assert choose_victim([urgent, FULL], BLOCK) == 1
    assert choose_victim([FULL, FULL._replace(place=6)], BLOCK) == 0


def test_who_frees_nothing_gives_way_last_but_does() -> None:
    shared = FULL._replace(lost_tokens=0, freed_blocks=0, place=9)
    assert choose_victim([shared, FULL], BLOCK) == 1
    assert choose_victim([shared._replace(place=8), shared], BLOCK) == 1, "all share with each other: the last"
    assert choose_victim([], BLOCK) is None


@st.composite
def clusters(draw: st.DrawFn) -> tuple[list[Ways], list[int]]:
    """Groups of few distinct numbers, so that ties are usual, and how many blocks of each hit nobody holds."""
    groups: list[Ways] = []
    revived = []
    for _ in range(draw(st.integers(1, 8))):
        hit, free, cached = draw(st.integers(0, 3)), draw(st.integers(0, 4)), draw(st.integers(0, 4))
        revived.append(draw(st.integers(0, min(hit, cached))))
        load = GroupLoad(
            hit_tokens=hit * BLOCK + draw(st.sampled_from((0, 64))),
            new_blocks=4 - hit + revived[-1],
            free=free,
            available=free + cached,
            total=draw(st.sampled_from((8, 400))),
            free_rows=draw(st.integers(0, 2)),
            running=draw(st.integers(0, 2)),
            backlog=draw(st.sampled_from((0, 100, 1024, 4096))),
            starving=draw(st.integers(0, 5)) == 0,
            revived=revived[-1],
        )
        fetch = load._replace(hit_tokens=3 * BLOCK + 64, fetch_work=draw(st.sampled_from((10, 300, 2000))))
        groups.append((load, fetch) if draw(st.booleans()) else (load,))
    return groups, revived


@given(clusters())
def test_a_closer_look_at_few_chooses_as_one_at_all(cluster: tuple[list[Ways], list[int]]) -> None:
    groups, revived = cluster
    costs = [
        (time_to_first_token(load, TOKENS, BLOCK), -load.available, at, way)
        for at, ways in enumerate(groups)
        for way, load in enumerate(ways)
        if admissible(load)
    ]
    choice, looks = choose(groups, revived)
    assert choice == (min(costs)[2:] if costs else None)
    assert len(looks) == len(set(looks))


def test_of_many_equal_groups_it_looks_at_one_and_of_full_ones_at_none() -> None:
    assert choose([(IDLE,)] * 100) == ((0, 0), [0])
    hit = IDLE._replace(hit_tokens=BLOCK, new_blocks=3)
    assert choose([*[(IDLE,)] * 100, (hit,)]) == ((100, 0), [100])
    fetch = IDLE._replace(hit_tokens=BLOCK, fetch_work=25)
    assert choose([(hit._replace(backlog=9000),), *[(IDLE, fetch)] * 100]) == ((1, 1), [1])
    assert choose([(IDLE._replace(free_rows=0),)] * 100) == (None, [])


def test_the_parts_of_a_cost_are_its_sum() -> None:
    load = IDLE._replace(hit_tokens=256, backlog=100, running=2, free=0, new_blocks=3, fetch_work=150)
    parts = terms(load, TOKENS, BLOCK)
    assert parts == (4 * 768, 100, 50 + 150, 32, 3 * 256)
    assert time_to_first_token(load, TOKENS, BLOCK) == sum(parts)
