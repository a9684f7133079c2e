"""Which LoRA adapters are resident on the ranks of a group, and who waits for one. Every rank decides alike, from the same log.

    Start ─▶ has a slot?   yes ─▶ its row is in the steps, once the adapter is read
                           no  ─▶ the least recently used slot that nobody uses is read anew beside the steps, or the row waits

A row that waits is in no step, and all others go on. Reading is over when it is on all ranks: the leader says so with a turn
(`Adapted`). Nobody has to be told which adapters there are: each `Start` says where its own is. Imports `batch` and the wire
types; what reads comes from outside.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from scheduler.protocol.leaders import Adapted
from scheduler.protocol.messages import Adapter
from workers.loop.batch import NO_ADAPTER, ResidentBatch


class AdapterRead(msgspec.Struct, frozen=True, array_like=True, tag=6, gc=False):
    """What a rank says to its leader once it has read an adapter. load: as in `Adapted`. failure: why it could not, else ""."""

    load: int
    failure: str = ""


OnRead = Callable[[AdapterRead], None]


class AdapterStore(Protocol):
    """Where a rank has the weights of its adapters."""

    def begin(self, load: int, slot: int, adapter: Adapter, read: OnRead) -> None:
        """Reads the adapter into the slot beside the steps, over what is there, and says so from another thread. Must not
        wait."""
        ...

    def close(self) -> None:
        """Ends its thread, without waiting for what it reads."""
        ...


@dataclass(slots=True)
class AdapterSlot:
    """One adapter's place. load: number of its reading. ready: it is over on all ranks. rows: that have it."""

    adapter: Adapter
    load: int
    ready: bool = False
    rows: set[int] = field(default_factory=set)


class Residency:
    """Belongs to a rank's step loop. slots: adapters that are resident at once. on_read: told by the store's thread.

    Who finds its adapter resident joins it, but only while nobody waits for a slot: else a busy adapter would never leave. A
    slot that comes free goes to whoever has waited longest, and to all that wait for the same.

    Invariant: a row is in `batch.unready` if it has an adapter that has no slot or is not read; `batch.adapter` is its slot.
    """

    def __init__(self, batch: ResidentBatch, slots: int, store: AdapterStore, on_read: OnRead = lambda _: None) -> None:
        self.on_read = on_read
        self._batch = batch
        self._store = store
        self._free = list(range(slots - 1, -1, -1))
        self._slots: OrderedDict[int, AdapterSlot] = OrderedDict()  # the least recently used first
        self._waiting: dict[int, Adapter] = {}  # rows, the longest wait first
        self._loads = 0
        self._refused: list[tuple[tuple[int, ...], str]] = []
        self._late: set[int] = set()  # rows that have come, and wait for the first time
        self._waited: list[int] = []

    def admit(self, row: int, adapter: Adapter) -> None:
        """A sequence with an adapter has entered the batch."""
        self._batch.unready.add(row)
        self._waiting[row] = adapter
        if len(self._waiting) == 1:
            self._seat()
        if row in self._batch.unready:
            self._late.add(row)

    def release(self, row: int) -> None:
        """Whoever was there has left the batch; nothing for a row without an adapter."""
        waited = self._waiting.pop(row, None) is not None
        self._late.discard(row)
        number = int(self._batch.adapter[row])
        self._batch.adapter[row] = NO_ADAPTER
        self._batch.unready.discard(row)
        if number != NO_ADAPTER:
            self._slots[number].rows.discard(row)
            self._slots.move_to_end(number)
        if waited or number != NO_ADAPTER:
            self._seat()

    def read(self, adapted: Adapted) -> None:
        """What the leader says. Rows whose adapter could not be read stay as they are, until they are dropped."""
        number, slot = next((number, slot) for number, slot in self._slots.items() if slot.load == adapted.load)
        if not adapted.failure:
            slot.ready = True
            self._let_go_on(slot.rows)
            self._seat()  # if nobody wants it any more, another may
            return
        rows = sorted(slot.rows)
        self._batch.adapter[rows] = NO_ADAPTER  # they are not in any step
        leases = tuple(self._batch.lease[rows].tolist())
        if leases:
            self._refused.append((leases, f"the LoRA adapter {slot.adapter.name!r} cannot be read: {adapted.failure}"))
        del self._slots[number]
        self._free.append(number)
        self._seat()

    def give_way(self) -> bool:
        """No row can go on, and no step is under way. Whoever has a slot then waits for blocks, perhaps for those of a row that
        waits for the slot: it makes room for that one, and waits in its turn. False: there was nobody to make room for, or
        reading under way will let somebody go on."""
        if not self._waiting or not all(slot.ready for slot in self._slots.values()):
            return False
        slot = next(iter(self._slots.values()))
        rows = sorted(slot.rows)
        self._batch.adapter[rows] = NO_ADAPTER
        self._batch.unready.update(rows)
        self._waiting |= dict.fromkeys(rows, slot.adapter)
        slot.rows.clear()
        self._seat()
        return True

    def refusals(self) -> list[tuple[tuple[int, ...], str]]:
        """Leases that cannot be served, and why: each once."""
        refused, self._refused = self._refused, []
        return refused

    def waited(self) -> tuple[int, ...]:
        """Leases that have had to wait since they came, and go on: each once."""
        waited, self._waited = self._waited, []
        return tuple(waited)

    def close(self) -> None:
        self._store.close()

    def _let_go_on(self, rows: Iterable[int]) -> None:
        self._batch.unready.difference_update(rows)
        late = self._late.intersection(rows)
        self._late -= late
        self._waited += [int(self._batch.lease[row]) for row in sorted(late)]

    def _seat(self) -> None:
        """Whoever waits and can have a slot gets one, the first first; nobody goes before one that cannot."""
        while self._waiting:
            adapter = next(iter(self._waiting.values()))
            number = next((number for number, slot in self._slots.items() if slot.adapter == adapter), None)
            if number is None and (number := self._vacant()) is not None:
                self._loads += 1
                self._slots[number] = AdapterSlot(adapter, self._loads)
                self._store.begin(self._loads, number, adapter, lambda said: self.on_read(said))
            if number is None:
                return
            slot = self._slots[number]
            self._slots.move_to_end(number)
            for row in [row for row, wanted in self._waiting.items() if wanted == adapter]:
                del self._waiting[row]
                slot.rows.add(row)
                self._batch.adapter[row] = number
                if slot.ready:
                    self._let_go_on([row])

    def _vacant(self) -> int | None:
        """A slot that nobody uses: an empty one, else the least recently used. One that is being read stays until it is."""
        if self._free:
            return self._free.pop()
        number = next((number for number, slot in self._slots.items() if slot.ready and not slot.rows), None)
        if number is not None:
            del self._slots[number]
        return number


class GatheredReads:
    """The leader's: what the ranks say of each reading, one after another, becomes one `Adapted` once all have. From any
    thread.

    ranks: how many. wake: called when there is one to be told.
    """

    def __init__(self, ranks: int) -> None:
        self.wake: Callable[[], None] = lambda: None
        self._ranks = ranks
        self._lock = threading.Lock()
        self._said: dict[int, list[str]] = {}
        self._whole: list[Adapted] = []

    def add(self, said: AdapterRead) -> None:
        with self._lock:
            failures = self._said.setdefault(said.load, [])
            failures.append(said.failure)
            if len(failures) < self._ranks:
                return
            del self._said[said.load]
            self._whole.append(Adapted(said.load, "; ".join(dict.fromkeys(filter(None, failures)))))
        self.wake()

    def take(self) -> list[Adapted]:
        """Those that have not been told, for the next turn of all ranks."""
        if not self._whole:
            return []
        with self._lock:
            whole, self._whole = self._whole, []
        return whole
