"""Who goes next: priorities first, then the tenant that was served least, then whoever came first.

The virtual token counter of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024). Imports `sequence`.
"""

import heapq
import itertools

from scheduler.state.sequence import PRIORITY_SHIFT, Head, Sequence, Tenant

FEWEST_REMEMBERED = 1 << 10
MOST_REMEMBERED = 1 << 16
"""Tenants without a live sequence: below the first number none is forgotten; above the second those served least are."""


class FairQueue:
    """The queue, and a counter of served tokens for each tenant.

    A start adds the prompt tokens that it has to compute, those of the first start alone: recomputing is not the tenant's
    doing. Output counts `OUTPUT_WEIGHT` a token, in arrears: when a block fills, when the sequence is preempted and when it
    ends. So nothing is added per step, and a counter is late by at most OUTPUT_WEIGHT * block_size tokens
    for each of the tenant's running sequences. That much, and what one request may add, is how far tenants of one priority can
    be apart while both always have something waiting; what starts out of turn (`waiting`) comes on top, and is made up for.

    A tenant that had nothing waiting is lifted to the smallest counter among those that have; if none has, to that of the last
    one that had: idleness saves nothing up. This smallest counter never falls, so whoever is idle below it may be forgotten.

    Heaps are lazy: counters only grow, so an entry that is too small is put right when it comes up. A queued sequence is known
    by its `ticket`: entries with another one are void.
    """

    def __init__(self) -> None:
        self.tenants = 0  # with a sequence that waits
        self._tenants: dict[str, Tenant] = {}
        self._tokens: dict[tuple[int, Tenant], int] = {}  # waiting, by priority and tenant
        self._heads: list[Head] = []
        self._counters: list[tuple[float, int, Tenant]] = []
        self._last = Tenant()
        self._numbers = itertools.count()
        self._remembered = FEWEST_REMEMBERED

    # ---- sequences

    def open(self, name: str) -> Tenant:
        """One more sequence lives on this tenant's account: until it ends the tenant is not forgotten."""
        tenant = self._tenants.get(name)
        if tenant is None:
            if len(self._tenants) >= self._remembered:
                self._forget()
            tenant = self._tenants[name] = Tenant(name, next(self._numbers), self.floor())
        tenant.live += 1
        return tenant

    def enter(self, sequence: Sequence) -> None:
        """It has no blocks: a stay begins. `push` says when its turn may come."""
        tenant = sequence.tenant
        if not tenant.stays:
            tenant.served = max(tenant.served, self.floor())
            self.tenants += 1
            if not tenant.listed:
                tenant.listed = True
                heapq.heappush(self._counters, (tenant.served, tenant.number, tenant))
        tenant.stays += 1
        key = (sequence.place >> PRIORITY_SHIFT, tenant)
        self._tokens[key] = self._tokens.get(key, 0) + sequence.committed

    def leave(self, sequence: Sequence) -> None:
        """The stay is over: it has started or ended."""
        tenant = sequence.tenant
        tenant.stays -= 1
        if not tenant.stays:
            self.tenants -= 1
            self._last = tenant
        key = (sequence.place >> PRIORITY_SHIFT, tenant)
        self._tokens[key] -= sequence.committed
        if not self._tokens[key]:
            del self._tokens[key]

    def pass_by(self, tenant: Tenant) -> None:
        """A sequence starts past the queue, in which nobody is: as if it had entered and left it."""
        assert not self.tenants, "somebody waits"
        tenant.served = max(tenant.served, self.floor())
        self._last = tenant

    def push(self, sequence: Sequence) -> None:
        """Its turn may come, under the ticket that it has."""
        tenant = sequence.tenant
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

    def queued(self) -> list[Sequence]:
        """All whose turn may come, for the invariants."""
        entries = [entry for tenant in self._tenants.values() for entry in tenant.queue]
        return [sequence for _, ticket, sequence in entries if sequence.ticket == ticket]

    # ---- counters

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
        return self._last.served

    def served(self, name: str) -> float:
        """Its counter; what it would be lifted to, if it is not known."""
        tenant = self._tenants.get(name)
        return self.floor() if tenant is None else tenant.served

    def waiting(self, name: str) -> tuple[int, int]:
        """Sequences of a tenant that wait, and their tokens."""
        tenant = self._tenants.get(name)
        if tenant is None or not tenant.stays:
            return 0, 0
        return tenant.stays, sum(tokens for (_, other), tokens in self._tokens.items() if other is tenant)

    def ahead(self, name: str, priority: int) -> float:
        """Waiting tokens that go before one more sequence of this tenant, about. Linear in the tenants that wait.

        All that are more urgent; of its own priority what it has waiting itself, and of each other tenant as much as it takes
        until that one has been served as much as this one will have been. Hits and outputs to come are left out.
        """
        same = [(tenant, tokens) for (level, tenant), tokens in self._tokens.items() if level == priority]
        urgent = sum(tokens for (level, _), tokens in self._tokens.items() if level < priority)
        own = sum(tokens for tenant, tokens in same if tenant.name == name)
        reach = max(self.served(name), self.floor()) + own
        others = (min(tokens, max(0.0, reach - tenant.served)) for tenant, tokens in same if tenant.name != name)
        return urgent + own + sum(others)

    def _head(self, tenant: Tenant) -> Head:
        place = tenant.queue[0][0]
        tenant.head = (place >> PRIORITY_SHIFT, tenant.served, place, next(self._numbers), tenant)
        return tenant.head

    def _forget(self) -> None:
        """Forgets tenants without a live sequence: at or below the floor all, which changes nothing, and beyond a number those
        served least."""
        floor = self.floor()
        idle = [(tenant.served, name) for name, tenant in self._tenants.items() if not tenant.live]
        kept = sorted(entry for entry in idle if entry[0] > floor)[-MOST_REMEMBERED:]
        names = {name for _, name in kept}
        for _, name in idle:
            if name not in names:
                del self._tenants[name]
        self._remembered = max(FEWEST_REMEMBERED, 2 * len(self._tenants))
