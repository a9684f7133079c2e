"""Ranks of one tensor-parallel group that share a GPU: what several GPUs run, but for the links between them and NCCL.

Steps, graphs included, meet in kernels over joined memory alone. Ranks take turns on the device, so outputs are short.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._C._distributed_c10d import TCPStore

from tests.gpu.works import DEVICE, GPU, mixture
from tests.workers.parallel.test_parallel import free_address
from tests.workers.stepping import Stepped

pytestmark = GPU

SPAWN = get_context("spawn")
PATIENCE_S = 240.0
TRIAL_S, ALONE_S = 60.0, 3.0
OPTIONS: dict[str, Any] = {"max_num_seqs": 4, "kv_memory": 1 << 26}
COUNT, TOKENS = 6, 10
LAST_TURN = 6
"""Of the rank that ends itself while others are in the midst of their steps."""


def run_rank(rank: int, size: int, address: str, path: Path, goes: bool, pipe: Pipe) -> None:
    from workers.parallel.connect import PeerLost, connect
    from workers.parallel.one_device import OneDeviceGroup

    comm = connect(rank, size, device=torch.device(DEVICE, 0), address=address, timeout_s=PATIENCE_S)
    assert isinstance(comm, OneDeviceGroup)
    stepped = Stepped(path, device=DEVICE, comm=comm, tensor_parallel_size=size, **OPTIONS)
    works = mixture(COUNT, TOKENS)
    if not goes:
        graphs = [lease.tokens for lease in stepped.generate(works)]
        with stepped.eager():
            pipe.send((graphs, [lease.tokens for lease in stepped.generate(works)]))
        pipe.recv()
        return
    for work in works[:4]:
        stepped.start(work)
    pipe.send("built")
    if rank == size - 1:
        for _ in range(LAST_TURN):
            stepped.turn()
        os.kill(os.getpid(), 9)

    def hear() -> None:
        comm.abort(pipe.recv())

    threading.Thread(target=hear, daemon=True).start()
    try:
        while True:
            stepped.turn()
            comm.check()
    except PeerLost as lost:
        torch.cuda.synchronize()
        pipe.send(str(lost))
    pipe.recv()


def try_memory(rank: int, size: int, address: str, what: str, pipe: Pipe) -> None:
    """what: the last rank does not come to the trial, or brings other numbers than it should."""
    from workers.kernels.rows.reduce import sum_all
    from workers.parallel import peer_memory, trial

    host, port = address.rsplit(":", 1)
    memory = peer_memory.PeerMemory(rank, size, TCPStore(host, int(port), size, rank == 0), torch.device(DEVICE, 0))
    last = rank == size - 1
    if last and what == "is wrong":
        vars(trial)["sum_all"] = lambda peers, x: sum_all(peers, x.neg_())
    if what == "stays away":
        pipe.send("" if last else memory.fault(ALONE_S))
    else:
        pipe.send(memory.fault(TRIAL_S))
    pipe.recv()


class Ranks:
    """So many processes, each of which runs main(rank, size, address, *args, pipe); what each says."""

    def __init__(self, size: int, main: Callable[..., None], *args: object) -> None:
        address = free_address()
        self.pipes: list[Pipe] = []
        self.processes: list[Any] = []
        for rank in range(size):
            here, there = SPAWN.Pipe()
            self.processes.append(SPAWN.Process(target=main, args=(rank, size, address, *args, there), daemon=True))
            self.processes[-1].start()
            there.close()
            self.pipes.append(here)

    def told(self, rank: int) -> Any:
        assert self.pipes[rank].poll(PATIENCE_S), f"rank {rank} says nothing"
        return self.pipes[rank].recv()

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


@pytest.fixture
def ranks() -> Iterator[Any]:
    made: list[Ranks] = []

    def make(*args: Any) -> Ranks:
        made.append(Ranks(*args))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_two_ranks_say_what_one_says(ranks: Any, model: Path) -> None:
    """float32, greedy and every way of sampling, with graphs and without; to the same bits on both ranks."""
    both = ranks(2, run_rank, model, False)
    told = [both.told(rank) for rank in range(2)]
    alone = Stepped(model, device=DEVICE, **OPTIONS)
    wanted = [lease.tokens for lease in alone.generate(mixture(COUNT, TOKENS))]
    alone.close()
    for graphs, eager in told:
        assert graphs == wanted
        assert eager == wanted


def test_a_rank_that_is_killed_in_its_midst_ends_the_others_steps(ranks: Any, model: Path) -> None:
    both = ranks(2, run_rank, model, True)
    assert [both.told(rank) for rank in range(2)] == ["built", "built"]
    both.processes[1].join(PATIENCE_S)
    assert both.processes[1].exitcode == -9
    assert not both.pipes[0].poll(1.0), "it waits for the other in its kernels"
    begun_s = time.monotonic()
    both.pipes[0].send("a peer has gone")
    assert "a peer has gone" in both.told(0)
    print(f"its step ended {1e3 * (time.monotonic() - begun_s):.0f} ms after it was told")


@pytest.mark.parametrize(
    ("what", "faults"),
    [("is right", ("", "")), ("is wrong", ("not those that", "not those that")), ("stays away", ("had not ended", ""))],
)
def test_a_trial_of_joined_memory_tells_what_is_wrong(ranks: Any, what: str, faults: tuple[str, str]) -> None:
    both = ranks(2, try_memory, what)
    for rank, fault in enumerate(faults):
        said = both.told(rank)
        assert fault in said
        assert bool(fault) == bool(said)
