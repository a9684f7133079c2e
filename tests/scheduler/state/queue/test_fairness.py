"""Fair queueing by served tokens: the counter itself, and what it means for who starts."""

import itertools
import random

import numpy as np
import pytest

from scheduler.config.core import CoreConfig, QueueBounds
from scheduler.placement.limits import RequestRefused
from scheduler.protocol.sampling import SamplingParams
from scheduler.server.stats import snapshot
from scheduler.state.counters import Counters
from scheduler.state.queue import fairness
from scheduler.state.queue.fairness import FairQueue
from scheduler.state.queue.waiting import WaitingRoom
from scheduler.state.sequence import OUTPUT_WEIGHT, PRIORITY_SHIFT, Sequence, State
from tests.scheduler.cluster import Cluster, Stream, filled

numbers = itertools.count()


def waiting(queue: FairQueue, tenant: str, tokens: int = 10, priority: int = 0) -> Sequence:
    number = next(numbers)
    return Sequence(
        number=number, place=(priority << PRIORITY_SHIFT) + number, arrived_s=0.0, front_end=0, stream=number, choice=0,
        params=SamplingParams(), seed=0, stop_ids=(), salt="", prompt_tokens=tokens, max_tokens=8, blocks_at_most=1,
        blocks_at_once=1, hashes=[], buffer=np.zeros(tokens, np.int32), committed=tokens, tenant=queue.open(tenant),
        ticket=1 + number,
    )  # fmt: skip


class Queue(FairQueue):
    """With what the waiting room does around it."""

    def submit(self, *sequences: Sequence) -> None:
        for sequence in sequences:
            self.enter(sequence)
            self.push(sequence)

    def start(self, cost: float = 10) -> str:
        """The tenant whose turn it was."""
        sequence = self.pop()
        assert sequence is not None
        sequence.ticket = 0
        self.leave(sequence)
        sequence.tenant.served += cost
        sequence.tenant.live -= 1
        return sequence.tenant.name

    def charge(self, name: str, cost: float) -> None:
        tenant = self.open(name)
        tenant.served += cost
        tenant.live -= 1


# ---- the counter


def test_whoever_was_served_least_goes_next() -> None:
    queue = Queue()
    queue.submit(*(waiting(queue, "heavy") for _ in range(4)), *(waiting(queue, "light") for _ in range(4)))
    assert [queue.start() for _ in range(8)] == ["heavy", "light"] * 4
    queue.submit(*(waiting(queue, "heavy") for _ in range(6)), *(waiting(queue, "light") for _ in range(3)))
    served = [queue.start(cost=20 if turn % 3 == 0 else 10) for turn in range(9)]
    assert served.count("light") == 3


def test_priorities_go_before_tenants_and_arrival_decides_within_one() -> None:
    queue = Queue()
    queue.charge("busy", 1e6)
    late, urgent, first = waiting(queue, "idle"), waiting(queue, "busy", priority=-1), waiting(queue, "busy")
    queue.submit(late, urgent, waiting(queue, "busy"), first)
    assert [queue.pop() for _ in range(2)] == [urgent, late]


def test_a_more_urgent_sequence_of_the_same_tenant_overtakes() -> None:
    queue = Queue()
    calm, urgent = waiting(queue, "one"), waiting(queue, "one", priority=-1)
    queue.submit(calm, waiting(queue, "two"), urgent)
    assert [queue.pop() for _ in range(2)] == [urgent, calm]


def test_idleness_saves_nothing_up() -> None:
    queue = Queue()
    queue.submit(*(waiting(queue, "steady") for _ in range(20)))
    for _ in range(10):
        queue.start()
    queue.submit(*(waiting(queue, "back") for _ in range(5)))  # without a lift it would have ten at once
    assert [queue.start() for _ in range(6)].count("back") == 3
    while queue.tenants:
        queue.start()
    queue.submit(waiting(queue, "later"))
    assert queue.served("later") == queue.floor() > 0, "lifted to the one that waited last, if nobody waits"


def test_tenants_that_always_wait_are_served_alike_within_one_request() -> None:
    draw = random.Random(1)
    queue, dearest = Queue(), 100
    names = ["a", "b", "c"]
    for name in names:
        queue.submit(*(waiting(queue, name) for _ in range(400)))
    for _ in range(300):
        queue.start(cost=draw.randint(1, dearest))
        counters = [queue.served(name) for name in names]
        assert max(counters) - min(counters) <= dearest


def test_the_smallest_counter_of_those_that_wait_never_falls() -> None:
    draw = random.Random(2)
    queue, before = Queue(), 0.0
    for _ in range(2_000):
        if draw.random() < 0.5:
            queue.submit(waiting(queue, draw.choice("abcdefgh"), priority=draw.choice([0, 0, 1])))
        elif queue.tenants:
            queue.start(draw.randint(1, 50))
        queue.charge(draw.choice("abcdefgh"), draw.randint(0, 5))
        assert queue.floor() >= before
        before = queue.floor()


def test_a_million_tenants_that_come_once_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fairness, "FEWEST_REMEMBERED", 32)
    monkeypatch.setattr(fairness, "MOST_REMEMBERED", 64)
    queue = Queue()
    queue._remembered = 32
    queue.submit(waiting(queue, "patient", priority=1))  # keeps the floor where it is, so that all others are above it
    queue.charge("glutton", 1e6)
    for number in range(5_000):
        queue.submit(waiting(queue, f"guest {number}"))
        queue.start()
    assert len(queue._tenants) <= 2 * 64 + 2
    assert queue.served("glutton") == 1e6, "those served most are remembered longest"
    assert queue.start() == "patient"


def test_what_is_ahead_of_a_newcomer() -> None:
    queue = Queue()
    queue.submit(*(waiting(queue, "heavy", 100) for _ in range(5)), waiting(queue, "light", 30))
    queue.submit(waiting(queue, "vip", 7, priority=-1))
    assert queue.ahead("new", 0) == 7, "nobody has been served: its turn is the next"
    assert queue.ahead("light", 0) == 7 + 30 + 30, "its own, and as much of the other's"
    assert queue.ahead("heavy", 0) == 7 + 500 + 30
    assert queue.ahead("new", 1) == 7 + 530
    assert queue.ahead("new", -2) == 0


def test_a_void_ticket_is_passed_over() -> None:
    queue = Queue()
    gone, stays = waiting(queue, "one"), waiting(queue, "one")
    queue.submit(gone, stays)
    gone.ticket = 0
    assert queue.pop() is stays
    assert queue.pop() is None


# ---- in the core


def starts(cluster: Cluster, streams: dict[str, list[Stream]]) -> list[str]:
    """Names of the streams in the order of their ends; one runs at a time."""
    order: list[str] = []
    left = [(name, stream) for name, some in streams.items() for stream in some]
    while left:
        cluster.step()
        for name, stream in list(left):
            if stream.finished is not None:
                order.append(name)
                left.remove((name, stream))
    return order


def test_a_tenant_that_floods_the_queue_does_not_delay_another() -> None:
    cluster = Cluster((8,), max_num_seqs=1, enable_prefix_caching=False)
    heavy = [cluster.submit([0] * 4, max_tokens=2, tenant="heavy")[0] for _ in range(10)]
    light = [cluster.submit([1] * 4, max_tokens=2, tenant="light")[0] for _ in range(3)]
    assert snapshot(cluster.core).waiting_tenants == 2
    order = starts(cluster, {"heavy": heavy, "light": light})
    assert order[:6] == ["heavy", "light", "heavy", "light", "heavy", "light"]


def test_tenants_are_charged_for_what_was_computed_and_what_came_out() -> None:
    cluster = Cluster((16,), block_size=4)
    served = cluster.core.waiting.fair.served
    cluster.submit([*filled(0, 1), 1], max_tokens=1, tenant="first")
    assert served("first") == 9, "the prompt, when it starts"
    cluster.run()
    assert served("first") == 9 + OUTPUT_WEIGHT
    base = served("first")  # of the one that waited last: whoever comes now is lifted to it
    stream = cluster.submit([*filled(0, 1), 1], max_tokens=7, tenant="second")[0]
    assert served("second") == base + 1, "two blocks are cached"
    while stream.finished is None:
        cluster.step()
        late = base + 1 + OUTPUT_WEIGHT * len(stream.tokens) - served("second")
        assert 0 <= late <= OUTPUT_WEIGHT * 4, "output is charged by the block"
    assert served("second") == base + 1 + OUTPUT_WEIGHT * 7


def test_a_preemption_is_not_charged_twice() -> None:
    cluster = Cluster((5,), enable_prefix_caching=False)
    for tenant in ("old", "young"):
        cluster.submit([0] * 3, max_tokens=12, tenant=tenant)
    cluster.run()
    assert snapshot(cluster.core).preemptions > 0
    served = cluster.core.waiting.fair.served
    assert served("old") == 3 + OUTPUT_WEIGHT * 12
    assert served("young") == 2 * 3 + OUTPUT_WEIGHT * 12, "lifted to the other, which had been charged for its prompt"


def test_a_full_queue_still_takes_a_tenant_that_has_less_than_its_share() -> None:
    cluster = Cluster((8,), max_num_seqs=1, bounds=QueueBounds(max_queued_requests=4))
    for _ in range(5):
        cluster.submit([0] * 4, tenant="heavy")
    with pytest.raises(RequestRefused):
        cluster.submit([0] * 4, tenant="heavy")
    for _ in range(2):
        cluster.submit([1] * 4, tenant="light")
    with pytest.raises(RequestRefused):
        cluster.submit([1] * 4, tenant="light")  # a half of four for each of two tenants
    cluster.submit([1] * 4, tenant="third")
    for tenant in ("fourth", "fifth", "sixth"):
        if cluster.core.waiting.count < 8:
            cluster.submit([1] * 4, tenant=tenant)
    with pytest.raises(RequestRefused):
        cluster.submit([1] * 4, tenant="seventh")  # twice the bound is the end
    assert cluster.core.waiting.count == 8
    cluster.run()


# ---- the waiting room by itself


def test_a_wait_under_a_ticket_is_over_when_it_starts_or_ends() -> None:
    room = WaitingRoom(CoreConfig(queue_age_s=10.0), Counters())
    first, second = waiting(room.fair, "one"), waiting(room.fair, "one")
    room.enter(first, 0.0)
    room.enter(second, 5.0)
    room.begin(12.0)
    assert room.take(8) is first, "it has aged"
    assert first.aged
    first.state = State.RUNNING
    room.leave(first, 12.0)
    room.begin(12.0)
    assert room.take(8) is second
    assert room.take(8) is None
    room.put_back([second], settled=True)
    assert room.settled()
    second.state = State.ENDED
    room.leave(second, 13.0)
    assert not room.settled()
    assert (room.count, room.tokens, room.queued()) == (0, 0, [])
