"""Sums and gathers over ranks that read each other's memory: processes with shared memory, under Triton's interpreter."""

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing import get_context

pytest.importorskip("triton")

from tests.workers.kernels.devices import CUDA
from workers.kernels.rows.gather import gather
from workers.kernels.rows.norm import add_rms_norm
from workers.kernels.rows.peers import PROGRAMS, Peers
from workers.kernels.rows.reduce import sum_add_rms_norm, sum_all, sum_rows, takes
from workers.parallel import trial
from workers.parallel.in_process import sum_in_rank_order

pytestmark = pytest.mark.skipif(CUDA, reason="ranks with GPUs of their own meet in tests/gpu")

SPAWN = get_context("spawn")
ROWS, PACKETS = 4, 3 * 4 * 96
CASES = [(1, 96, torch.float32), (3, 33, torch.float32), (4, 95, torch.bfloat16), (2, 5, torch.float16), (4, 96, torch.float32)]
"""Rows and width: all of the room, shares that do not divide evenly, fewer rows than before and more again."""

TRUNCATED = {torch.bfloat16: 2.0**-6}
SUMMED = 8.0
"""The interpreter cuts bfloat16 off where a GPU rounds: of numbers of that size. All else is the same to the bit."""


@dataclass(frozen=True)
class Memory:
    """What one rank lets the others see."""

    inbox: Tensor
    given_up: Tensor

    @classmethod
    def shared(cls, first: int) -> "Memory":
        old = first - 2  # which was the turn of what stands there: NaN, whatever the dtype
        inbox = torch.full((2, PACKETS), (old << 32) | 0xFFFFFFFF, dtype=torch.int64)
        tensors = inbox, torch.zeros(1, dtype=torch.int32)
        return cls(*(tensor.share_memory_() for tensor in tensors))  # type: ignore[no-untyped-call]


def peers_of(rank: int, memories: list[Memory], first: int) -> Peers:
    inboxes = torch.tensor([memory.inbox.data_ptr() for memory in memories])
    turns = torch.full((PROGRAMS,), first, dtype=torch.int32)
    return Peers(rank, len(memories), PACKETS, inboxes, turns, memories[rank].given_up.data_ptr())


def part(rank: int, case: int) -> Tensor:
    rows, width, dtype = CASES[case]
    generator = torch.Generator().manual_seed(100 * rank + case)
    return (torch.randn(rows, width, generator=generator) * 3).to(dtype)


def others(case: int) -> tuple[Tensor, Tensor]:
    """The residual stream and a norm's weight, equal on all ranks."""
    rows, width, dtype = CASES[case]
    generator = torch.Generator().manual_seed(7000 + case)
    return torch.randn(rows, width, generator=generator).to(dtype), torch.randn(width, generator=generator).to(dtype)


def _sum_all(rank: int, memories: list[Memory], first: int, pipe: Any) -> None:
    torch.set_num_threads(1)
    peers, told = peers_of(rank, memories, first), []
    for turn in range(2):
        for case in range(len(CASES)):
            two_shot = bool((turn + case) % 2)
            total = sum_rows(peers, part(rank, case), two_shot=two_shot)
            hidden, weight = others(case)
            normed = sum_add_rms_norm(peers, part(rank, case), hidden, weight, 1e-6, two_shot=two_shot)
            told.append((case, total, hidden, normed))
    pipe.send([(case, *(tensor.float().numpy() for tensor in tensors)) for case, *tensors in told])
    pipe.recv()


torch.manual_seed(0)  # every process makes the same
PARTS = [
    torch.arange(5, dtype=torch.int64), torch.tensor([True, False, True]), torch.randn(3, 7), torch.zeros(0, 4),
    torch.randn(9, 61), torch.randn(2, 33).to(torch.bfloat16), torch.randn(41, 96), torch.arange(11, dtype=torch.uint8)[3:],
]  # fmt: skip
"""What is gathered: with words of 8, 4, 2 bytes and 1, nothing, one piece and several, more than one launch has room for."""

LARGE = (37, 61)
"""A sum of several launches, the last of which has part of a row."""


def _gather_all(rank: int, memories: list[Memory], first: int, pipe: Any) -> None:
    torch.set_num_threads(1)
    peers, told = peers_of(rank, memories, first), []
    for turn in range(2):  # sums between them, which use the same places
        for number, tensor in enumerate(PARTS):
            told.append(gather(peers, _own(tensor, rank + turn)).numpy(force=True) if tensor.dtype != torch.bfloat16 else
                        gather(peers, _own(tensor, rank + turn)).view(torch.int16).numpy())  # fmt: skip
            sum_rows(peers, part(rank, number % len(CASES)), two_shot=bool(number % 2))
        large = torch.full(LARGE, float(rank + turn))
        sum_all(peers, large)
        told.append(large.numpy())
    pipe.send(told)
    pipe.recv()


def _own(tensor: Tensor, rank: int) -> Tensor:
    """Another one for each rank, of the same shape and place in its storage."""
    return torch.logical_xor(tensor, torch.tensor(bool(rank % 2))) if tensor.dtype == torch.bool else tensor + rank


def _wait_for_nobody(rank: int, memories: list[Memory], first: int, pipe: Any) -> None:
    if rank:
        pipe.send("here")
        pipe.recv()  # it never comes to the sum
        return
    pipe.send("here")
    sum_rows(peers_of(rank, memories, first), part(rank, 0))
    pipe.send("given up")
    pipe.recv()


def _try(what: str, rank: int, memories: list[Memory], first: int, pipe: Any) -> None:
    """what: the last rank does not come to the trial, or brings other numbers than it should."""
    torch.set_num_threads(1)
    memory, last = memories[rank], rank == len(memories) - 1
    for module in ("reduce", "gather"):  # the interpreter's looks are slow
        vars(sys.modules[f"workers.kernels.rows.{module}"])["TRIES"] = 16
    if last and what == "is wrong":
        vars(trial)["sum_all"] = lambda peers, x: sum_all(peers, x.neg_())
    if not (last and what == "stays away"):
        patience_s = 2.0 if what == "stays away" else 150.0
        peers, shapes = peers_of(rank, memories, first), [(1, 32), (2, 96)]
        pipe.send(trial.find_fault(peers, torch.device("cpu"), lambda: memory.given_up.fill_(1), patience_s, shapes))
    pipe.recv()


Run = Callable[..., tuple[list[Any], list[Memory], list[Any]]]


@pytest.fixture
def run() -> Iterator[Run]:
    processes: list[Any] = []

    def start(size: int, job: Callable[..., None], first: int = 0) -> tuple[list[Any], list[Memory], list[Any]]:
        memories = [Memory.shared(first) for _ in range(size)]
        pipes = []
        for rank in range(size):
            here, there = SPAWN.Pipe()
            processes.append(SPAWN.Process(target=job, args=(rank, memories, first, there), daemon=True))
            processes[-1].start()
            there.close()
            pipes.append(here)
        return pipes, memories, processes

    yield start
    for process in processes:
        process.kill()
        process.join()


def received(pipe: Any) -> Any:
    assert pipe.poll(180), "a rank says nothing"
    return pipe.recv()


@pytest.mark.few(1)
@pytest.mark.parametrize(("size", "first"), [(2, 0), (3, 2**31 - 5)])
def test_every_rank_has_the_sum_in_rank_order_and_what_follows_it(size: int, first: int, run: Run) -> None:
    """The second time with turns that run over the largest number."""
    pipes, _, _ = run(size, _sum_all, first)
    told = [received(pipe) for pipe in pipes]
    assert len(told[0]) == 2 * len(CASES)
    for each in zip(*told, strict=True):
        case = each[0][0]
        parts = [part(rank, case) for rank in range(size)]
        total = sum_in_rank_order(parts, torch.empty_like(parts[0]))
        hidden, weight = others(case)
        normed = add_rms_norm(hidden, total, weight, 1e-6)
        wanted = (total, hidden, normed)
        for _, *ours in each:
            for mine, also, right in zip(ours, each[0][1:], wanted, strict=True):
                assert (mine == also).all(), "the same bits on every rank"
                error = (torch.as_tensor(mine).float() - right.float()).abs()
                assert (error <= TRUNCATED.get(right.dtype, 0.0) * (right.float().abs() + SUMMED)).all()


@pytest.mark.few(1)
@pytest.mark.parametrize("size", [2, 3])
def test_every_rank_has_what_each_has(size: int, run: Run) -> None:
    pipes, _, _ = run(size, _gather_all)
    told = [received(pipe) for pipe in pipes]
    for turn in range(2):
        for number, tensor in enumerate(PARTS):
            wanted = torch.stack([_own(tensor, rank + turn) for rank in range(size)])
            wanted = wanted.view(torch.int16) if tensor.dtype == torch.bfloat16 else wanted
            for ours in told:
                assert torch.equal(torch.from_numpy(ours[turn * (len(PARTS) + 1) + number]), wanted), tensor.dtype
        for ours in told:
            assert (ours[(turn + 1) * (len(PARTS) + 1) - 1] == sum(range(turn, turn + size))).all()


@pytest.mark.parametrize(
    ("what", "faults"),
    [("stays away", ["had not ended after 2 s"]), ("is wrong", ["not those that came"] * 2), ("is right", ["", ""])],
)
def test_a_trial_says_what_is_wrong_and_waits_for_nobody(what: str, faults: list[str], run: Run) -> None:
    pipes, _, _ = run(2, partial(_try, what))
    for pipe, fault in zip(pipes, faults, strict=False):
        said = received(pipe)
        assert fault in said
        assert bool(fault) == bool(said)


@pytest.mark.slow
def test_who_is_told_to_waits_no_more_for_a_rank_that_does_not_come(run: Run) -> None:
    pipes, memories, processes = run(2, _wait_for_nobody)
    assert received(pipes[0]) == "here"
    assert not pipes[0].poll(3.0), "it waits"
    os.kill(processes[1].pid, 9)
    memories[0].given_up.fill_(1)
    assert received(pipes[0]) == "given up"


def test_what_has_no_room_is_not_taken() -> None:
    peers = peers_of(0, [Memory.shared(0)] * 3, 0)
    assert takes(peers, torch.empty(ROWS, 96))
    assert not takes(peers, torch.empty(ROWS + 1, 96))
    assert not takes(peers, torch.empty(ROWS, 97))
    assert takes(peers, torch.empty(ROWS, 192, dtype=torch.bfloat16))
    assert not takes(peers, torch.empty(96))
