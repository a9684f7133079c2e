"""The batch on the device says what the host's batch says, with nothing sent where nothing has changed."""

import numpy as np
import numpy.typing as npt
import pytest
import torch
from msgspec import structs

from scheduler.protocol.leaders import Drop, Grant, Remap, Trim
from tests.workers.loop.test_batch import lease, start
from workers.execution.gpu import device_batch
from workers.execution.gpu.device_batch import DeviceBatch
from workers.kernels.attention.prefixes import SET_FIELDS, PrefixLimits
from workers.loop.batch import Launched, ResidentBatch

pytest.importorskip("triton")

Ints = npt.NDArray[np.int64]

ROWS, BLOCK, MODEL_LEN, SCRATCH, NARROW_SCRATCH = 5, 16, 160, 99, 33
LIMITS = PrefixLimits(rows=3, tokens=32)
WORDS = 16
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Pair:
    """A resident batch, and the device's picture of it after each step. narrow: narrow layers have tables of their own."""

    def __init__(self, *, narrow: bool = False) -> None:
        self.host = ResidentBatch(ROWS, BLOCK, 64, MODEL_LEN, narrow=narrow)
        self.device = DeviceBatch(
            max_num_seqs=ROWS, blocks=MODEL_LEN // BLOCK, block_size=BLOCK, most=8, scratch_block=SCRATCH, device=DEVICE,
            prefixes=LIMITS, narrow_scratch=NARROW_SCRATCH if narrow else None,
        )  # fmt: skip
        self.sent: list[int] = []
        self._send = self.device._send
        self.device._send = self._note  # type: ignore[method-assign]

    def _note(self, places: Ints, values: Ints) -> None:
        self.sent.append(len(places))
        self._send(places, values)

    def sets(self) -> list[tuple[list[int], int]]:
        """(rows of the step, common tokens) as the device is told; every row's tokens are those of its set."""
        prefixes = self.device.prefixes
        sets = [one for one in prefixes.sets.view(-1, SET_FIELDS).tolist() if one[2]]
        found = [(prefixes.members[begin : begin + count].tolist(), tokens) for begin, count, tokens in sets]
        told = {row: tokens for rows, tokens in found for row in rows}
        assert prefixes.tokens.tolist() == [told.get(row, 0) for row in range(8)]
        return found

    def step(self, padded: int) -> Launched:
        """Launches the next step, with the device's inputs of its decodes checked against the host's batch."""
        step = self.host.launch(self.host.plan())
        self.device.update(self.host, step, padded)
        self.host.forget_edits()
        if padded:
            self.device.gather(padded)
            self.check(step, padded)
        return step

    def check(self, step: Launched, padded: int) -> None:
        rows, first = step.plan.rows[: step.plan.decodes], step.first[: step.plan.decodes]
        n, device = len(rows), self.device
        tables = self.host.full.ids[rows]
        blocks = tables[np.arange(n), first // BLOCK].astype(np.int64)
        assert device.positions[:n].tolist() == first.tolist()
        assert device.contexts[:n].tolist() == (first + 1).tolist()
        assert device.slots[:n].tolist() == (blocks * BLOCK + first % BLOCK).tolist()
        for at, context in enumerate((first + 1).tolist()):
            held = -(-context // BLOCK)
            assert device.step_tables[at, :held].tolist() == tables[at, :held].tolist()
        assert device.slots[n:padded].tolist() == [SCRATCH * BLOCK] * (padded - n), "padding writes to the scratch block alone"
        assert device.contexts[n:padded].tolist() == [1] * (padded - n)
        if self.host.narrow is None or device.narrow is None:
            return
        slots = self.host.narrow.slots(rows, first, BLOCK)
        assert device.narrow.slots[:padded].tolist() == slots.tolist() + [NARROW_SCRATCH * BLOCK] * (padded - n)
        for at, (row, context) in enumerate(zip(rows, (first + 1).tolist(), strict=True)):
            seen = slice(int(self.host.narrow.first[row]), -(-context // BLOCK))
            assert device.narrow.step_tables[at, seen].tolist() == self.host.narrow.ids[row, seen].tolist()


def test_decodes_follow_the_log_and_send_nothing_while_it_is_silent() -> None:
    pair = Pair()
    record = np.arange(WORDS, dtype=np.int32)
    for row in range(3):
        pair.host.apply(start(lease(1, row), tokens=5 + row, cached=4 + row, blocks=(3 * row, 3 * row + 1), max_tokens=60))
        pair.device.admit(row, 70 + row, record + row)
    pair.step(4)
    assert pair.device.tokens[:3].tolist() == [70, 71, 72]
    assert pair.device.settings[2].tolist() == (record + 2).tolist()
    pair.sent.clear()
    for _ in range(5):
        pair.step(4)
    assert pair.sent == [], "a pure decode sends nothing"


def test_grants_remaps_drops_and_new_rows_arrive_before_the_step_that_needs_them() -> None:
    pair = Pair()
    for row in range(4):
        pair.host.apply(start(lease(1, row), tokens=16, cached=15, blocks=(row,), max_tokens=60))
        pair.device.admit(row, row, np.zeros(WORDS, np.int32))
    pair.step(8)
    assert pair.host.plan().rows.tolist() == [], "their block is full"
    for row in range(4):
        pair.host.apply(Grant(lease(1, row), (10 + row, 20 + row)))
    pair.step(4)
    pair.host.apply(Drop(lease(1, 1)))
    pair.host.apply(Remap(lease(1, 2), 0, 40))
    pair.step(4)
    pair.host.apply(start(lease(2, 1), tokens=30, cached=29, blocks=(50, 51), max_tokens=9))
    pair.device.admit(1, 7, np.ones(WORDS, np.int32))
    step = pair.step(8)
    assert step.plan.rows.tolist() == [0, 1, 2, 3]
    assert pair.device.tokens[1].item() == 7


def test_narrow_layers_have_tables_and_slots_of_their_own() -> None:
    pair = Pair(narrow=True)
    for row in range(3):
        begun = start(lease(1, row), tokens=30, cached=29, blocks=(2 * row, 2 * row + 1), max_tokens=60)
        ids = np.array([20 - row], np.int32).tobytes()
        pair.host.apply(structs.replace(begun, narrow=ids, narrow_first=1))
        pair.device.admit(row, row, np.zeros(WORDS, np.int32))
    for _ in range(3):
        pair.step(4)
    assert pair.host.plan().rows.tolist() == [], "their block is full"
    pair.host.apply(Grant(lease(1, 0), (40,), (11, 12)))
    assert pair.host.plan().rows.tolist() == [0]
    pair.host.apply(Grant(lease(1, 1), (41, 42), ()))
    assert pair.host.plan().rows.tolist() == [0], "the other kind is full"
    pair.host.apply(Trim(lease(1, 0), 2, narrow=True))
    pair.host.apply(Remap(lease(1, 0), 2, 13, narrow=True))
    assert pair.step(4).plan.rows.tolist() == [0]
    assert pair.host.granted[:2].tolist() == [48, 32]


def test_a_row_that_decodes_after_its_prefill_starts_at_the_right_place() -> None:
    pair = Pair()
    pair.host.apply(start(lease(1, 2), tokens=40, blocks=(4, 5, 6), max_tokens=60))
    pair.device.admit(2, 1, np.zeros(WORDS, np.int32))
    assert pair.step(0).plan.decodes == 0
    assert pair.step(1).first.tolist() == [40]
    assert pair.step(1).first.tolist() == [41]


def test_a_row_that_sat_out_goes_on_where_it_was() -> None:
    pair = Pair()
    for row, blocks in enumerate([(0,), (1, 2)]):
        pair.host.apply(start(lease(1, row), tokens=14, cached=13, blocks=blocks, max_tokens=60))
        pair.device.admit(row, row, np.zeros(WORDS, np.int32))
    lengths = [pair.step(2).plan.rows.tolist() for _ in range(4)]
    assert lengths == [[0, 1], [0, 1], [0, 1], [1]]
    pair.host.apply(Grant(lease(1, 0), (3,)))
    assert pair.step(2).first.tolist() == [16, 17]


def test_prefixes_follow_who_is_in_the_step_and_which_blocks_they_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_batch, "LEAST_SAVED_TOKENS", 32)
    pair = Pair()

    def enter(serial: int, row: int, blocks: tuple[int, ...]) -> None:
        last = len(blocks) * BLOCK - 10
        pair.host.apply(start(lease(serial, row), tokens=last, cached=last - 1, blocks=blocks, max_tokens=30))
        pair.device.admit(row, row, np.zeros(WORDS, np.int32))

    for row, blocks in enumerate([(1, 2, 3, 4), (5, 6, 7), (1, 2, 3, 8), (1, 2, 9)]):
        enter(1, row, blocks)
    pair.step(4)
    assert pair.sets() == [([0, 2, 3], 32)], "three blocks of two are no multiple of what is read at a time"
    pair.sent.clear()
    pair.step(4)
    assert pair.sent == [], "nobody came or went"
    enter(1, 4, (5, 6, 11))
    pair.step(8)
    assert pair.sets() == [([0, 2, 3], 32), ([1, 4], 32)]
    pair.host.apply(Drop(lease(1, 0)))
    pair.step(4)
    assert pair.sets() == [([1, 2], 32), ([0, 3], 32)], "the rows of the step have moved up"
    pair.host.apply(Drop(lease(1, 4)))
    pair.step(3)
    assert pair.sets() == [([1, 2], 32)], "the last row has left, and all others are where they were"
    enter(2, 4, (5, 6, 12))
    pair.step(4)
    assert pair.sets() == [([1, 2], 32), ([0, 3], 32)]
    pair.host.apply(Drop(lease(1, 2)))
    enter(2, 2, (20, 21, 22))
    pair.step(4)
    assert pair.sets() == [([0, 3], 32)], "the same rows, but another sequence in one of them"
    pair.host.apply(Remap(lease(1, 1), 0, 30))
    pair.step(4)
    assert pair.sets() == [], "a copy is as good, but each reads its own"


def test_what_has_been_given_back_is_no_prefix_of_anybody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its ids may be another's by now, as those of a row that began in the midst never were its own."""
    monkeypatch.setattr(device_batch, "LEAST_SAVED_TOKENS", 0)
    pair = Pair()
    for row, first in ((0, 0), (1, 0), (2, 0), (3, 2), (4, 2)):
        blocks = (5, 6, 10 + row)[first:]
        pair.host.apply(start(lease(1, row), 40, cached=39, blocks=blocks, first=first, max_tokens=64))
    pair.host.apply(Trim(lease(1, 2), 1))
    pair.step(5)
    assert pair.sets() == [([0, 1], 32)]
