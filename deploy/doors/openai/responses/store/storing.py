"""Responses that are kept so that others can go on from them: a bounded store, and how a front end reaches one.

Each response is kept with what it adds to its conversation, its *turn*; the turn before belongs to the response that it goes on
from, and is shared by all that do. So a conversation is kept once, and whole for as long as its last response is, whatever
becomes of those before. Pure but for the clock, which is given; imports msgspec.
"""

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import msgspec

from deploy.config.serve import ServeConfig

ENTRY_BYTES = 512
"""What an entry takes beside its texts, about."""


class StoredTurn(msgspec.Struct, frozen=True, array_like=True):
    """JSON lists of items. input: what was asked. output: what was answered."""

    input: bytes
    output: bytes

    @property
    def size_bytes(self) -> int:
        return len(self.input) + len(self.output)


class Bounds(msgspec.Struct, frozen=True, array_like=True):
    """Of a store. count: responses. age_s: since a response was made."""

    count: int
    size_bytes: int
    age_s: float


def bounds_of(config: ServeConfig) -> Bounds:
    """Of an endpoint's store."""
    return Bounds(config.stored_responses, config.stored_response_bytes, config.stored_response_age_s)


class ResponseStore(Protocol):
    """Where a front end keeps responses. owner: the account whose they are; nobody else's are found."""

    async def put(self, owner: str, name: str, previous: str | None, body: bytes, turn: StoredTurn) -> bool:
        """previous: the response that it goes on from. Whether it is kept. Never raises: a store that cannot be reached keeps
        nothing."""
        ...

    async def body(self, owner: str, name: str) -> bytes | None:
        """As it was told. None: it is not here. Errors: RequestError UNAVAILABLE."""
        ...

    async def turns(self, owner: str, name: str) -> list[StoredTurn] | None:
        """Of its conversation, to its own. None: it is not here. Errors: RequestError UNAVAILABLE."""
        ...

    async def delete(self, owner: str, name: str) -> bool:
        """Whether it was here. Errors: RequestError UNAVAILABLE."""
        ...


@dataclass(slots=True, eq=False)
class _Told:
    """A turn in its conversation. users: responses and later turns that need it."""

    turn: StoredTurn
    before: "_Told | None"
    users: int = 1


@dataclass(slots=True, eq=False)
class _Entry:
    body: bytes
    told: _Told
    until_s: float


class _Account:
    """What one owner has, the oldest first."""

    def __init__(self) -> None:
        self.entries: OrderedDict[str, _Entry] = OrderedDict()
        self.size_bytes = 0


class KeptResponses:
    """The store itself. Where there is no room the oldest of the account that has most gives way, so that no account can crowd
    out the others."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._accounts: dict[str, _Account] = {}

    @property
    def count(self) -> int:
        return sum(len(account.entries) for account in self._accounts.values())

    @property
    def size_bytes(self) -> int:
        return sum(account.size_bytes for account in self._accounts.values())

    def put(self, owner: str, name: str, previous: str | None, body: bytes, turn: StoredTurn, bounds: Bounds) -> bool:
        """False: it is larger than all that may be kept, or what it goes on from has gone. bounds: hold from now on."""
        self._expire()
        account = self._accounts.get(owner, _Account())
        before = None
        if previous is not None:
            if (entry := account.entries.get(previous)) is None:
                return False
            before = entry.told
        if bounds.count < 1 or _conversation_bytes(before) + turn.size_bytes + len(body) + ENTRY_BYTES > bounds.size_bytes:
            return False
        if before is not None:
            before.users += 1
        self._accounts[owner] = account
        account.entries[name] = _Entry(body, _Told(turn, before), self._clock() + bounds.age_s)
        account.size_bytes += turn.size_bytes + len(body) + ENTRY_BYTES
        while self.count > bounds.count:
            self._evict(max(self._accounts, key=lambda owner: len(self._accounts[owner].entries)))
        while self.size_bytes > bounds.size_bytes:
            self._evict(max(self._accounts, key=lambda owner: self._accounts[owner].size_bytes))
        return name in account.entries

    def body(self, owner: str, name: str) -> bytes | None:
        entry = self._entry(owner, name)
        return None if entry is None else entry.body

    def turns(self, owner: str, name: str) -> list[StoredTurn] | None:
        if (entry := self._entry(owner, name)) is None:
            return None
        turns: list[StoredTurn] = []
        told: _Told | None = entry.told
        while told is not None:
            turns.append(told.turn)
            told = told.before
        return turns[::-1]

    def delete(self, owner: str, name: str) -> bool:
        """Its words stay in the responses that go on from it."""
        if self._entry(owner, name) is None:
            return False
        self._remove(owner, name)
        return True

    def _entry(self, owner: str, name: str) -> _Entry | None:
        self._expire()
        account = self._accounts.get(owner)
        return None if account is None else account.entries.get(name)

    def _expire(self) -> None:
        now_s = self._clock()
        for owner, account in [*self._accounts.items()]:
            while account.entries and (name := next(iter(account.entries))) and account.entries[name].until_s <= now_s:
                self._remove(owner, name)

    def _evict(self, owner: str) -> None:
        self._remove(owner, next(iter(self._accounts[owner].entries)))

    def _remove(self, owner: str, name: str) -> None:
        account = self._accounts[owner]
        entry = account.entries.pop(name)
        account.size_bytes -= len(entry.body) + ENTRY_BYTES
        told: _Told | None = entry.told
        while told is not None:
            told.users -= 1
            if told.users:
                break
            account.size_bytes -= told.turn.size_bytes
            told.before, told = None, told.before
        if not account.entries:
            del self._accounts[owner]


def _conversation_bytes(told: _Told | None) -> int:
    size = 0
    while told is not None:
        size, told = size + told.turn.size_bytes, told.before
    return size


class OwnResponses:
    """A `ResponseStore` in this process, for an endpoint that is one process."""

    def __init__(self, bounds: Bounds, clock: Callable[[], float] = time.monotonic) -> None:
        self._bounds = bounds
        self._kept = KeptResponses(clock)

    async def put(self, owner: str, name: str, previous: str | None, body: bytes, turn: StoredTurn) -> bool:
        return self._kept.put(owner, name, previous, body, turn, self._bounds)

    async def body(self, owner: str, name: str) -> bytes | None:
        return self._kept.body(owner, name)

    async def turns(self, owner: str, name: str) -> list[StoredTurn] | None:
        return self._kept.turns(owner, name)

    async def delete(self, owner: str, name: str) -> bool:
        return self._kept.delete(owner, name)
