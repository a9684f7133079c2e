"""Who goes next: priorities first, then the tenant that was served least, then whoever came first.

The virtual token counter of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024). Imports `sequence`.
"""

import heapq
import itertools
from dataclasses import dataclass, field

from scheduler.sequence import Sequence

OUTPUT_WEIGHT = 2.0
"""What an output token counts against a computed prompt token: as in the paper."""

FEWEST_REMEMBERED = 1 << 10
MOST_REMEMBERED = 1 << 16
"""Tenants without a waiting sequence: below the first number none is forgotten; above the second those served least are."""

Head = tuple[int, float, int, int, "Tenant"]
"""priority, counter and place of a tenant's first sequence; a number that breaks ties; the tenant."""


@dataclass(slots=True, eq=False)
class Tenant:
    """served: its counter. stays: its sequences without a lease. queue: those of them whose turn may come, by place.

    listed: it is in the heap of counters. head: its valid entry in the heap of heads; all others of it are void.
    """

    number: int
    served: float
    stays: int = 0
    queue: list[tuple[int, int, Sequence]] = field(default_factory=list)
    listed: bool = False
    head: Head | None = None


class FairQueue:
    """The queue, and a counter of served tokens for each tenant.

    A start adds the prompt tokens that it has to compute, those of the first start alone: recomputing is not the tenant's
    doing. Output counts `OUTPUT_WEIGHT` a token, in arrears: when a page fills or a lease is extended, when the sequence is
    preempted and when it ends. So nothing is added per step, and a counter is late by at most OUTPUT_WEIGHT * page_size tokens
    for each of the tenant's running sequences. That much, and what one request may add, is how far tenants that always have
    something waiting can be apart.

    A tenant that had nothing waiting is lifted to the smallest counter among those that have; if none has, to that of the last
    one that had: idleness saves nothing up. This smallest counter never falls, so whoever is idle below it may be forgotten.

    Heaps are lazy: counters only grow, so an entry that is too small is put right when it comes up. A queued sequence is known
    by its `ticket`: entries with another one are void.
    """

    def __init__(self) -> None:
        self.tenants = 0  # with a sequence that waits
        self._tenants: dict[str, Tenant] = {}
        self._tokens: dict[int, dict[str, int]] = {}  # priority -> tenant -> its waiting tokens
        self._heads: list[Head] = []
        self._counters: list[tuple[float, int, Tenant]] = []
        self._last: Tenant | None = None
        self._numbers = itertools.count()
        self._remembered = FEWEST_REMEMBERED

    # ---- who waits

    def enter(self, sequence: Sequence) -> None:
        """It has no lease: a stay begins. `push` says when its turn may come."""
        tenant = self._tenant(sequence.tenant)
        if not tenant.stays:
            tenant.served = max(tenant.served, self.floor())
            self.tenants += 1
            if not tenant.listed:
                tenant.listed = True
                heapq.heappush(self._counters, (tenant.served, tenant.number, tenant))
        tenant.stays += 1
        tokens = self._tokens.setdefault(sequence.priority, {})
        tokens[sequence.tenant] = tokens.get(sequence.tenant, 0) + sequence.committed

    def leave(self, sequence: Sequence) -> None:
        """The stay is over: it has started or ended."""
        tenant = self._tenant(sequence.tenant)
        tenant.stays -= 1
        if not tenant.stays:
            self.tenants -= 1
            self._last = tenant
        tokens = self._tokens[sequence.priority]
        tokens[sequence.tenant] -= sequence.committed
        if not tokens[sequence.tenant]:
            del tokens[sequence.tenant]
            if not tokens:
                del self._tokens[sequence.priority]

    def push(self, sequence: Sequence) -> None:
        """Its turn may come, under the ticket that it has."""
        tenant = self._tenant(sequence.tenant)
        heapq.heappush(tenant.queue, (sequence.place, sequence.ticket, sequence))
        if tenant.queue[0][2] is sequence:
            heapq.heappush(self._heads, self._head(tenant))

    def pop(self) -> Sequence | None:
        """Takes out whose turn it is; None if nobody is there. Amortised O(log n)."""
        heads = self._heads
        while heads:
            head = heads[0]
            _, served, place, _, tenant = head
            if head is not tenant.head:
                heapq.heappop(heads)
                continue
            queue = tenant.queue
            while queue and queue[0][1] != queue[0][2].ticket:
                heapq.heappop(queue)
            first = heapq.heappop(queue)[2] if queue and queue[0][0] == place and served == tenant.served else None
            if queue:
                heapq.heapreplace(heads, self._head(tenant))
            else:
                heapq.heappop(heads)
                tenant.head = None
            if first is not None:
                return first
        return None

    def waiting(self, name: str) -> tuple[int, int]:
        """Sequences of a tenant that wait, and their tokens."""
        tenant = self._tenants.get(name)
        return (tenant.stays if tenant else 0), sum(tokens.get(name, 0) for tokens in self._tokens.values())

    def queued(self) -> list[Sequence]:
        """All whose turn may come, for the invariants."""
        entries = [entry for tenant in self._tenants.values() for entry in tenant.queue]
        return [sequence for _, ticket, sequence in entries if sequence.ticket == ticket]

    # ---- counters

    def charge(self, name: str, tokens: float) -> None:
        """Adds to what a tenant was served."""
        self._tenant(name).served += tokens

    def served(self, name: str) -> float:
        """Its counter; what it would be lifted to, if it is not known."""
        tenant = self._tenants.get(name)
        return self.floor() if tenant is None else tenant.served

    def floor(self) -> float:
        """The smallest counter of a tenant that waits; if none does, that of the last one that did."""
        counters = self._counters
        while counters:
            served, number, tenant = counters[0]
            if not tenant.stays:
                tenant.listed = False
                heapq.heappop(counters)
            elif served < tenant.served:
                heapq.heapreplace(counters, (tenant.served, number, tenant))
            else:
                return served
        return 0.0 if self._last is None else self._last.served

    def ahead(self, name: str, priority: int) -> float:
        """Waiting tokens that go before one more sequence of this tenant, about. Linear in the tenants that wait.

        All that are more urgent; of its own priority what it has waiting itself, and of each other tenant as much as it takes
        until that one has been served as much as this one will have been. Hits and outputs to come are left out.
        """
        urgent = sum(sum(tokens.values()) for level, tokens in self._tokens.items() if level < priority)
        same = self._tokens.get(priority, {})
        own = same.get(name, 0)
        level = max(self.served(name), self.floor()) + own
        others = (min(tokens, max(0.0, level - self._tenants[other].served)) for other, tokens in same.items() if other != name)
        return urgent + own + sum(others)

    def _head(self, tenant: Tenant) -> Head:
        place, _, sequence = tenant.queue[0]
        tenant.head = (sequence.priority, tenant.served, place, next(self._numbers), tenant)
        return tenant.head

    def _tenant(self, name: str) -> Tenant:
        tenant = self._tenants.get(name)
        if tenant is None:
            if len(self._tenants) >= self._remembered:
                self._forget()
            tenant = self._tenants[name] = Tenant(next(self._numbers), self.floor())
        return tenant

    def _forget(self) -> None:
        """Forgets idle tenants: at or below the floor all, which changes nothing, and beyond a number those served least."""
        floor = self.floor()
        idle = [(tenant.served, name) for name, tenant in self._tenants.items() if not tenant.stays]
        kept = sorted(entry for entry in idle if entry[0] > floor)[-MOST_REMEMBERED:]
        names = {name for _, name in kept}
        for _, name in idle:
            if name not in names:
                del self._tenants[name]
        self._remembered = max(FEWEST_REMEMBERED, 2 * len(self._tenants))
