"""The sockets of a group: what its ranks say of a transfer reaches the scheduler at once, also while the group sleeps."""

import math
import threading

import msgspec
import pytest

from scheduler.protocol.handshake import Stranger, identify, introduce
from scheduler.protocol.leaders import Command, Commands, Drop, End, FromLeader, Hello, LeaseId, Moved, Offload, Report
from scheduler.protocol.messages import Connect
from scheduler.protocol.silence import Silence
from scheduler.protocol.wire import FrameSocket, listen
from tests.shared.simulated import SimulatedExecutor
from tests.workers.moving.movers import LAYOUT, PATIENCE_S, TOKEN, ids, random_pool
from workers.loop import link
from workers.loop.batch import ResidentBatch
from workers.loop.leader import Gathered, LinkClosed, SchedulerGone, follow, lead
from workers.loop.link import Greeting, SocketFeed, SocketInbox, SocketLink
from workers.loop.rank import LOOK_S, Rank
from workers.loop.reports import Reporter
from workers.moving.mover import BlockMover


def simulated() -> Rank:
    return Rank(ResidentBatch(2, 4, 64, 32), SimulatedExecutor(8, 4, 2, 50))


def part(transfer: int, *, ok: bool = True, elapsed_s: float = 1.0, message: str = "") -> Moved:
    return Moved(3, transfer, ok, elapsed_s, 100 if ok else 0, message)


def test_a_group_s_word_is_that_of_all_its_ranks() -> None:
    said: list[Moved] = []
    gathered = Gathered(2)
    gathered.send = said.append
    gathered.add(part(1, elapsed_s=2.0))
    gathered.add(part(2, ok=False, message="no memory"))
    assert said == []
    gathered.add(part(2, elapsed_s=0.5))
    gathered.add(part(1))
    assert said == [
        Moved(3, 2, False, 1.0, 100, "no memory"),
        Moved(3, 1, True, 2.0, 200, ""),
    ]


def test_a_scheduler_that_has_gone_is_the_step_loop_s_to_notice() -> None:
    def gone(moved: Moved) -> None:
        raise LinkClosed(f"nobody hears of {moved.transfer}")

    gathered = Gathered(1)
    gathered.add(part(1))  # no link yet: nobody has asked for anything
    gathered.send = gone
    gathered.add(part(2))


@pytest.mark.parametrize("nonsense", [{"hello": "world"}, 7, [99, "x"]])
def test_a_scheduler_that_talks_nonsense_counts_as_gone(nonsense: object) -> None:
    with listen("127.0.0.1") as listener:

        def talk() -> None:
            other = FrameSocket(listener.accept()[0])
            identify(other, TOKEN, Hello)
            other.send(nonsense)

        other = threading.Thread(target=talk)
        other.start()
        link = SocketLink("127.0.0.1", listener.getsockname()[1], TOKEN, Hello(0, 0, blocks=8, max_num_seqs=2))
        with pytest.raises(LinkClosed, match="gone"):
            link.receive(wait_s=math.inf)
        link.close()
        other.join()


class Scheduler:
    """The other end of the leader's socket."""

    def __init__(self) -> None:
        self._listener = listen("127.0.0.1")
        self.port: int = self._listener.getsockname()[1]
        self._sent = 0

    def accept(self) -> Hello:
        self._socket = FrameSocket(self._listener.accept()[0])
        return identify(self._socket, TOKEN, Hello)

    def command(self, *commands: Command) -> None:
        self._socket.send(Commands(self._sent, commands))
        self._sent += len(commands)

    def hear(self) -> Report | Moved | None:
        payload = self._socket.receive()
        kind: type[Report | Moved] = FromLeader  # type: ignore[assignment]
        return None if payload is None else msgspec.msgpack.decode(payload, type=kind)

    def close(self) -> None:
        self._socket.close()
        self._listener.close()


def test_who_looks_for_commands_for_a_while_hears_them_and_that_the_scheduler_goes() -> None:
    scheduler = Scheduler()
    accepting = threading.Thread(target=scheduler.accept)
    accepting.start()
    link = SocketLink("127.0.0.1", scheduler.port, TOKEN, Hello(0, 3, 8, 2))
    accepting.join()
    assert list(link.receive(wait_s=0.0)) == list(link.receive(wait_s=LOOK_S)) == []
    scheduler.command(Drop(LeaseId(1)), Drop(LeaseId(2)))
    assert list(link.receive(wait_s=PATIENCE_S)) == [Drop(LeaseId(1)), Drop(LeaseId(2))]
    link.wake()
    assert list(link.receive(wait_s=math.inf)) == [], "woken"
    scheduler.close()
    with pytest.raises(SchedulerGone):
        link.receive(wait_s=PATIENCE_S)
    link.close()


def test_two_ranks_offload_while_their_group_sleeps() -> None:
    """One `Moved` for both ranks, though the leader's loop waits for a command that comes only after it."""
    scheduler, feed_listener = Scheduler(), listen("127.0.0.1")
    pools, hosts = [random_pool(seed=rank) for rank in range(2)], [random_pool(seed=5) for _ in range(2)]
    ends: list[str] = []
    entered: list[int] = []

    def leader() -> None:
        rank, gathered = simulated(), Gathered(2)
        rank.mover = BlockMover(pools[0], hosts[0], None, gathered.add, rank=0, epoch=3)
        feed = SocketFeed(feed_listener, 1, TOKEN, ends.append, gathered.add, PATIENCE_S)
        link = SocketLink("127.0.0.1", scheduler.port, TOKEN, Hello(0, 3, 8, 2, 5, ("here:1", *feed.ports)))
        gathered.send = link.send
        ends.append(lead(rank, link, feed, Reporter(3)))
        rank.close()
        link.close()

    def peer() -> None:
        rank = simulated()
        host, port = feed_listener.getsockname()
        inbox = SocketInbox(host, port, TOKEN, Greeting(1, "there:2"), ends.append, entered.append)
        rank.mover = BlockMover(pools[1], hosts[1], None, inbox.send, rank=1, epoch=3)
        ends.append(follow(rank, inbox))
        rank.close()
        inbox.close()

    threads = [threading.Thread(target=target) for target in (leader, peer)]
    for thread in threads:
        thread.start()
    assert scheduler.accept().ports == ("here:1", "there:2")
    scheduler.command(Offload(7, ids([1, 2]), ids([3, 4])))
    moved = scheduler.hear()
    assert isinstance(moved, Moved)
    assert (moved.transfer, moved.ok, moved.bytes) == (7, True, 2 * 2 * LAYOUT.block_bytes)
    for pool, host in zip(pools, hosts, strict=True):
        assert (host.raw[3:5] == pool.raw[1:3]).all()
    scheduler.command(End("enough"))
    for thread in threads:
        thread.join(PATIENCE_S)
    assert ends.count("enough") == 2
    assert entered == []
    scheduler.close()
    feed_listener.close()


@pytest.mark.parametrize("words", ["a guess", "no greeting", "not the protocol", "a second rank 1"])
def test_a_stranger_is_no_peer(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    came = threading.Event()

    class Heard(Silence):
        def heard(self, name: int, now_s: float) -> None:
            super().heard(name, now_s)
            came.set()

    monkeypatch.setattr(link, "Silence", Heard)
    listener = listen("127.0.0.1")
    host, port = listener.getsockname()
    refused: list[bool] = []

    def stranger() -> None:
        connection = FrameSocket.connect(host, port)
        try:
            if words == "not the protocol":
                connection.send({"hello": "world"})
            else:
                token = "gu\u00e4\u00dft" if words == "a guess" else TOKEN
                introduce(connection, token, Connect() if words == "no greeting" else Greeting(1, ""))
            refused.append(False)
        except Stranger:
            refused.append(True)
        connection.receive()
        connection.close()

    def friend() -> None:
        inbox = SocketInbox(host, port, TOKEN, Greeting(2, "p:2"), lambda _: None, lambda _: None)
        assert inbox.receive() == ((End("done"),), ())
        inbox.close()

    feeds: list[SocketFeed] = []
    accepting = threading.Thread(
        target=lambda: feeds.append(SocketFeed(listener, 2, TOKEN, lambda _: None, lambda _: None, PATIENCE_S))
    )
    accepting.start()
    first = FrameSocket.connect(host, port)
    introduce(first, TOKEN, Greeting(1, "p:1"))
    assert came.wait(PATIENCE_S), "the leader greets each in a thread of its own: it may take whoever comes later for the first"
    others = [threading.Thread(target=each) for each in (stranger, friend)]
    others[0].start()
    others[0].join(PATIENCE_S)  # closed by the leader, which still waits for its second peer
    others[1].start()
    accepting.join(PATIENCE_S)
    (feed,) = feeds
    assert feed.ports == ("p:1", "p:2")
    feed.send([End("done")])
    feed.close()
    others[1].join(PATIENCE_S)
    assert refused == [words in ("a guess", "no greeting")], "a second rank 1 knows the token, and is closed all the same"
    first.close()
    listener.close()
