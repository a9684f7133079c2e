"""Contiguous memory and blocks under a full server, on cases that fit on a hand."""

import pytest

from benchmarks.study.models.allocators import Contiguous, FullServer, Paged, paged_steps, power_of_two
from benchmarks.study.questions.fragmentation import wasted_at_end, wasted_contiguous, wasted_in_blocks
from tests.study.requests import ask, workload


@pytest.mark.parametrize(("tokens", "size"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (1025, 2048)])
def test_power_of_two(tokens: int, size: int) -> None:
    assert power_of_two(tokens) == size


def test_free_memory_in_two_places_is_not_room() -> None:
    memory = Contiguous(10, "exact", 8)
    assert memory.admit(0, ask([1] * 4, 1))
    assert memory.admit(1, ask([1] * 4, 1))
    memory.free(0)
    assert memory.allocated == 4
    assert not memory.admit(2, ask([1] * 5, 1))
    memory.free(1)
    assert memory.admit(2, ask([1] * 9, 2))


def test_reservations() -> None:
    request = ask([1] * 5, 2)  # 6 tokens have KV
    assert [Contiguous(64, way, 9).size(request) for way in ("max", "power of two", "exact")] == [16, 8, 6]


def test_blocks_are_granted_ahead_up_to_what_a_sequence_can_need() -> None:
    memory = Paged(64, 4)
    assert memory.admit(0, ask([1] * 3, 4))  # 3 + 4 ahead: 2 blocks; at most 6 tokens: 2 blocks
    assert memory.allocated == 8
    assert memory.next_growth(0, 3) is None
    assert memory.admit(1, ask([1] * 3, 9))
    assert memory.next_growth(1, 3) == 5
    assert memory.grow(1, 5)
    assert memory.allocated == 20
    memory.free(0)
    memory.free(1)
    assert memory.allocated == 0


def test_equal_full_blocks_of_prompts_are_held_once() -> None:
    memory = Paged(64, 4, unit=1)
    for number in range(3):
        assert memory.admit(number, ask([1, 2, 3, 4, 10 + number], 1))
    assert memory.allocated == 4 + 3 * 4
    memory.free(0)
    memory.free(1)
    assert memory.allocated == 8
    memory.free(2)
    assert memory.allocated == 0


def test_a_full_server_step_by_step() -> None:
    requests = workload(*(ask([9, 9, number], 2) for number in range(5)))  # 3, then 4 tokens: one block of 4
    found = FullServer(Paged(8, 4), requests, rows=100).run(8)
    assert (found.steps, found.running, found.held, found.allocated) == (4, 2.0, 7.0, 8.0)
    reserved = FullServer(Contiguous(8, "max", 8), requests, rows=100).run(8)
    assert (reserved.steps, reserved.running, reserved.held) == (8, 1.0, 3.5)


def test_without_a_block_the_youngest_starts_again() -> None:
    requests = workload(*(ask([number], 12) for number in range(3)))  # up to 12 tokens: 3 blocks of 4; at first 2
    found = FullServer(Paged(16, 4), requests, rows=100).run(16)
    assert found.preemptions == 1
    assert found.steps > 12


@pytest.mark.parametrize(("first", "last", "block"), [(1, 1, 4), (3, 9, 4), (16, 33, 16), (5, 5, 256)])
def test_block_steps(first: int, last: int, block: int) -> None:
    assert paged_steps(first, last, block) == sum(-(-tokens // block) * block for tokens in range(first, last + 1))


def test_waste_by_hand() -> None:
    lengths = [(3, 4), (5, 5)]  # tokens held: 3 + 4 + 5
    assert wasted_in_blocks(lengths, 4) == 1 - 12 / (4 + 4 + 8)
    assert wasted_at_end(lengths, 4) == 1.5
    assert wasted_contiguous(lengths, "max") == 1 - 12 / 24
    assert wasted_contiguous(lengths, "power of two") == 1 - 12 / (4 + 4 + 8)
    assert wasted_contiguous(lengths, "exact") == 1 - 12 / (4 + 4 + 5)
