"""One step's token budget."""

from dataclasses import dataclass
from random import Random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from scheduler.batching import OTHERS_SHARE, StepPlan, plan_step


@dataclass(frozen=True)
class Row:
    known: int
    computed: int
    granted: int
    age: int


@st.composite
def rows(draw: st.DrawFn) -> list[Row]:
    made = []
    ages = draw(st.permutations(range(8)))
    for age in ages[: draw(st.integers(0, 8))]:
        known = draw(st.integers(0, 40))
        computed = known if known == 0 else draw(st.one_of(st.just(known - 1), st.integers(0, known)))
        made.append(Row(known, computed, draw(st.integers(computed, 44)), age))
    return made


def plan(made: list[Row], budget: int) -> StepPlan:
    columns = [[row.known for row in made], [row.computed for row in made], [row.granted for row in made]]
    known, computed, granted = (np.array(column, np.int64) for column in columns)
    return plan_step(known, computed, granted, np.array([row.age for row in made], np.int64), budget)


@given(rows(), st.integers(1, 50))
def test_every_plan_keeps_its_promises(made: list[Row], budget: int) -> None:
    step = plan(made, budget)
    chosen, counts = step.rows.tolist(), step.counts.tolist()
    assert len(set(chosen)) == len(chosen) == len(counts)
    assert all(count >= 1 for count in counts)
    assert sum(counts) <= budget
    for row, count in zip(chosen, counts, strict=True):
        assert made[row].computed + count <= min(made[row].known, made[row].granted)
    decodes, chunks = chosen[: step.decodes], chosen[step.decodes :]
    assert all(made[row].known - made[row].computed == 1 for row in decodes)
    assert all(made[row].known - made[row].computed > 1 for row in chunks)
    assert [made[row].age for row in chunks] == sorted(made[row].age for row in chunks)
    left_out = [row for row, it in enumerate(made) if it.computed < min(it.known, it.granted) and row not in chosen]
    if left_out:
        assert sum(counts) == budget, "budget is left while somebody could have used it"
    if len(chunks) > 1:
        left, wanted = budget - step.decodes, [min(it.known, it.granted) - it.computed for it in made]
        assert counts[step.decodes] >= min(wanted[chunks[0]], left - left // OTHERS_SHARE), "the oldest is sure of most"
        cut = [row for row, count in zip(chunks, counts[step.decodes :], strict=True) if count < wanted[row]]
        assert len(set(cut) - {chunks[0]}) <= 1, "besides the oldest, one at most is cut"


def test_decodes_come_first_and_prefill_takes_the_rest() -> None:
    step = plan([Row(30, 0, 32, 0), Row(9, 8, 12, 1), Row(5, 4, 8, 2)], 10)
    assert step.rows.tolist() == [1, 2, 0]
    assert step.counts.tolist() == [1, 1, 8]
    assert step.decodes == 2


def test_the_oldest_prompt_is_prefilled_first() -> None:
    step = plan([Row(30, 0, 32, 7), Row(6, 0, 32, 3)], 10)
    assert list(zip(step.rows.tolist(), step.counts.tolist(), strict=True)) == [(1, 6), (0, 4)]


def test_a_long_prompt_shares_with_the_short_ones_behind_it() -> None:
    step = plan([Row(300, 100, 320, 0), Row(30, 0, 32, 1), Row(6, 2, 32, 2), Row(40, 0, 64, 3)], 40)
    assert list(zip(step.rows.tolist(), step.counts.tolist(), strict=True)) == [(0, 30), (1, 6), (2, 4)]


@given(st.lists(st.integers(2, 200), min_size=1, max_size=12), st.integers(2, 16), st.randoms(use_true_random=False))
def test_every_prefill_ends_within_a_bound(prompts: list[int], budget: int, random: Random) -> None:
    """Whoever comes later delays a prompt by no more than a third of what it and those before it take."""
    size = len(prompts)
    known, computed = np.array(prompts, np.int64), np.zeros(size, np.int64)
    started = np.zeros(size, np.int64)
    arrivals = sorted(random.choices(range(40), k=size))
    sure, step = budget - budget // OTHERS_SHARE, 0
    while (computed < known).any():
        here = np.array(arrivals) <= step
        chosen = plan_step(np.where(here, known, 0), np.where(here, computed, 0), known, np.arange(size), budget)
        computed[chosen.rows] += chosen.counts
        done = computed == known - 1  # the last one is a decode from then on, which is not of this matter
        computed[done] += 1
        started[(computed == known) & (started == 0)] = step + 1
        step += 1
    for row in range(size):
        older = sum(-(-prompt // sure) for prompt in prompts[: row + 1])
        assert started[row] - arrivals[row] <= older


def test_with_more_decodes_than_budget_the_oldest_decode() -> None:
    assert plan([Row(5, 4, 8, age) for age in (3, 1, 2, 0)], 2).rows.tolist() == [3, 1]


def test_a_row_without_a_free_slot_sits_out() -> None:
    assert plan([Row(9, 8, 8, 0), Row(9, 8, 12, 1)], 8).rows.tolist() == [1]
    assert plan([Row(20, 8, 8, 0)], 8).rows.tolist() == []


def test_a_prompt_is_computed_as_far_as_its_slots_go() -> None:
    assert plan([Row(20, 8, 12, 0)], 64).counts.tolist() == [4]


def test_nothing_to_do() -> None:
    assert plan([], 8).rows.tolist() == []
    assert plan([Row(0, 0, 0, 0), Row(7, 7, 8, 1)], 8).rows.tolist() == []
