"""Ranks that go on for one scheduler after another, over sockets: real ranks in threads, real scheduler servers, no Ray."""

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from cluster.config import EngineConfig
from cluster.resolve import resolve
from kvcache.ids import GroupId
from scheduler.protocol.messages import Deltas, Finished, Request, Submit
from scheduler.protocol.sampling import SamplingParams
from scheduler.protocol.wire import FrameSocket, listen
from tests.scheduler.server.test_server import TOKEN, Served, read
from workers.config import SchedulerAddress
from workers.loop.terms import Term
from workers.process.life import ABANDONED, RankLife

TINY = Path(__file__).parents[3] / "examples" / "tiny"
PATIENCE_S = 120.0
PROMPT = list(range(300, 340))
"""Two blocks and a half."""


class Group:
    """One group: its ranks in threads of this process. reasons: with which their loops have ended."""

    def __init__(self, scheduler: SchedulerAddress, *, size: int = 1, **options: Any) -> None:
        config = EngineConfig(
            model=str(TINY), tensor_parallel_size=size, groups=2, dtype="float32", block_size=16, kv_memory=1 << 24, threads=1,
            max_model_len=256, max_num_seqs=4,
        )  # fmt: skip
        config = replace(config, **options)
        self.entered: list[tuple[int, int]] = []
        self.served = {rank: threading.Event() for rank in range(size)}
        self.ranks = [
            RankLife(
                config,
                resolve(config, "cpu"),
                0,
                0,
                rank,
                PATIENCE_S,
                "127.0.0.1",
                self._entered(rank),
                self.served[rank].set,
            )
            for rank in range(size)
        ]
        rendezvous = self.ranks[0].open()
        self.reasons: dict[int, str | BaseException] = {}
        self._threads = [
            threading.Thread(target=self._run, args=(rank, rendezvous, scheduler), daemon=True) for rank in range(size)
        ]
        for thread in self._threads:
            thread.start()

    def _entered(self, rank: int) -> Any:
        return lambda epoch: self.entered.append((rank, epoch))

    def _run(self, rank: int, rendezvous: Any, scheduler: SchedulerAddress) -> None:
        try:
            self.ranks[rank].build(rendezvous)
            self.reasons[rank] = self.ranks[rank].run(scheduler)
        except BaseException as error:
            self.reasons[rank] = error

    def rejoin(self, served: Served, epoch: int) -> None:
        self.ranks[0].terms.call(Term(address(served), epoch))

    def join(self) -> list[str | BaseException]:
        for thread in self._threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()
        return [self.reasons[rank] for rank in range(len(self.ranks))]


def address(served: Served) -> SchedulerAddress:
    return SchedulerAddress("127.0.0.1", served.port, TOKEN)


@pytest.fixture
def servers() -> Iterator[list[Served]]:
    made = [Served(asyncio.new_event_loop) for _ in range(4)]
    for each in made:
        each.ask(lambda core: core.expect(GroupId(0)))
    yield [*made]
    for each in made:
        each.close()


def die(served: Served) -> None:
    """As a process does: its sockets end, and it says nothing more. What it had is forgotten."""

    def end() -> None:
        assert served.server._server is not None
        served.server._server.close()
        for writer in [*served.server._leaders.values(), *served.server._front_ends.values()]:
            writer.transport.abort()

    served.loop.call_soon_threadsafe(end)


def close(served: Served) -> None:
    """In good order."""
    asyncio.run_coroutine_threadsafe(served.server.close(), served.loop).result(PATIENCE_S)


def submit(served: Served, *prompts: list[int], max_tokens: int) -> FrameSocket:
    front_end = served.front_end()
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    front_end.send(
        Submit(tuple(Request(at, np.array(prompt, np.int32).tobytes(), b"", params) for at, prompt in enumerate(prompts)))
    )
    return front_end


def answer(served: Served, prompt: list[int], max_tokens: int = 40) -> tuple[list[int], Finished]:
    return gather(submit(served, prompt, max_tokens=max_tokens))


def gather(front_end: FrameSocket) -> tuple[list[int], Finished]:
    """The tokens of a single stream, from now on, and its end."""
    tokens: list[int] = []
    while True:
        deltas: Deltas = msgspec.msgpack.decode(front_end.receive() or b"", type=Deltas)
        tokens += [token for token in np.frombuffer(deltas.tokens, np.int32).tolist() if token >= 0]
        for end in deltas.finished:
            return tokens, end


@pytest.mark.few(1)
@pytest.mark.parametrize("size", [1, 2])
def test_a_group_goes_on_for_the_next_scheduler_with_what_stands_in_its_pool(servers: list[Served], size: int) -> None:
    alone = servers.pop()
    group = Group(address(servers[0]), size=size)
    expected, end = answer(servers[0], PROMPT)
    assert end.cached_tokens == 0
    for epoch, (before, after) in enumerate(pairwise(servers), 1):
        under_way = submit(before, PROMPT, [7, *PROMPT], max_tokens=200)
        read(under_way, Deltas)  # in the midst of its steps
        die(before)
        group.rejoin(after, epoch)
        tokens, end = answer(after, [*PROMPT, *expected[:20]], 20)
        assert tokens == expected[20:]
        assert end.cached_tokens > 48, "what it had computed was hit"
        assert after.ask(lambda core: core.groups[GroupId(0)].epoch) == epoch
        fresh, end = answer(after, [7, *PROMPT])
        assert end.cached_tokens > 32, "as was that of the sequence which the scheduler took along"
    assert sorted(group.entered) == [(rank, epoch) for rank in range(size) for epoch in (1, 2)]
    close(servers[-1])
    assert group.join() == ["the scheduler was shut down"] * size
    other = Group(address(alone))
    assert answer(alone, [7, *PROMPT])[0] == fresh
    close(alone)
    other.join()


def test_a_connection_that_is_cut_costs_an_epoch_and_no_token(servers: list[Served]) -> None:
    """The scheduler lives: it has the sequence and its tokens, and the group has their KV."""
    served = servers[0]
    group = Group(address(served))
    expected, _ = answer(served, PROMPT, 200)
    front_end = submit(served, PROMPT, max_tokens=200)
    first = np.frombuffer(read(front_end, Deltas).tokens, np.int32).tolist()
    served.loop.call_soon_threadsafe(lambda: served.server._leaders[GroupId(0)].transport.abort())
    group.rejoin(served, 1)
    assert first + gather(front_end)[0] == expected
    assert served.ask(lambda core: core.groups[GroupId(0)].epoch) == 1
    assert served.server.fenced[GroupId(0)].cut
    close(served)
    group.join()


def test_a_scheduler_that_is_gone_before_the_group_is_built_is_waited_for_as_well(servers: list[Served]) -> None:
    with listen("127.0.0.1") as nobody:
        port = nobody.getsockname()[1]
    group = Group(SchedulerAddress("127.0.0.1", port, TOKEN))
    with pytest.raises(ConnectionError, match="has gone again"):
        group.ranks[0].terms.call(Term(SchedulerAddress("127.0.0.1", port, TOKEN), 1))
    group.rejoin(servers[0], 2)
    tokens, _ = answer(servers[0], PROMPT)
    assert len(tokens) == 40
    group.rejoin(servers[1], 3)  # its scheduler lives, but is not the one any more
    again, end = answer(servers[1], PROMPT)
    assert again == tokens
    assert end.cached_tokens == 32
    close(servers[1])
    group.join()


def test_every_rank_hears_that_its_scheduler_lives_and_of_the_next_one_as_well(servers: list[Served]) -> None:
    group = Group(address(servers[0]), size=2)
    for served in group.served.values():
        assert served.wait(PATIENCE_S)
    die(servers[0])
    group.rejoin(servers[1], 1)
    for served in group.served.values():
        served.clear()
        assert served.wait(PATIENCE_S)
    close(servers[1])
    group.join()


@pytest.mark.few(1)
@pytest.mark.parametrize("size", [1, 2])
def test_a_group_that_hears_of_no_scheduler_ends_itself(servers: list[Served], size: int) -> None:
    group = Group(address(servers[0]), size=size, abandoned_after_s=0.3)
    answer(servers[0], PROMPT)
    die(servers[0])
    assert group.join() == [ABANDONED] * size
    with pytest.raises(ConnectionError):
        group.rejoin(servers[1], 1)


def test_whoever_takes_a_group_over_that_comes_up_gets_what_was_begun(servers: list[Served]) -> None:
    """Its ports, and of a build that is under way the same rank."""
    group = Group(address(servers[0]))
    life, built = group.ranks[0], threading.Event()
    rendezvous = life.open()
    blocks: list[int] = []

    def build() -> None:
        blocks.append(life.build(rendezvous))
        built.set()

    threading.Thread(target=build, daemon=True).start()
    assert built.wait(PATIENCE_S)
    rank = life._built
    assert (life.open(), life.build(rendezvous), life._built) == (rendezvous, blocks[0], rank)
    assert answer(servers[0], PROMPT)[1].tokens == 40
    close(servers[0])
    group.join()


def test_whoever_takes_a_group_over_is_told_why_it_cannot_be_built(servers: list[Served]) -> None:
    group = Group(address(servers[0]), kv_memory=1)
    (reason,) = group.join()
    assert isinstance(reason, ValueError)
    with pytest.raises(ValueError, match=str(reason)[:30]):
        group.ranks[0].build(group.ranks[0].open())
