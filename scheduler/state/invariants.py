"""The rules that must hold between any two calls of the core, checked from scratch. Costs time linear in the whole state.

Runs after every step in tests and on demand in production. Imports the data that it checks and the table's own audit.
"""

from collections import Counter

import numpy as np
from msgspec.structs import astuple

from kvcache.audit import audit
from kvcache.hashing import hash_run, salt_seed
from kvcache.ids import group_of, narrow_of
from kvcache.table import SequenceBlocks
from scheduler.state.cluster import ClusterState
from scheduler.state.resident import ResidentGroup
from scheduler.state.sequence import Sequence, State
from scheduler.state.window import Window


def check(state: ClusterState) -> None:
    """Errors: AssertionError that names the rule, the group and the sequence."""
    running: list[Sequence] = []
    names = [*state.groups, *state.expected, *state.resting]
    assert len(names) == len(set(names)), f"a group is up, expected or rests, one of the three: {names}"
    for group in state.groups.values():
        _check_rows(state, group)
        _check_transfers(state, group)
        running += [*group.running, *group.fetching]
    audit(state.table, [*(held for sequence in running for held in sequence.tables), *state.transfers.holders()])
    _check_membership(state, running)
    for sequence in state.sequences.values():
        _check_sequence(state, sequence)
    _check_watch(state)
    _check_prefixes(state)


def _check_watch(state: ClusterState) -> None:
    """Nobody looks after groups that have gone."""
    for group in (*state.watch.told, *state.watch.touched):
        assert state.groups.get(group.group) is group, f"epoch {group.epoch} of group {group.group} has gone, and is kept"


def _check_prefixes(state: ClusterState) -> None:
    """Who runs, or will when its prefix has come, and nobody else, is found by the block that it fills."""
    found, config = state.prefixes.everyone(), state.config
    placed = {sequence for group in state.groups.values() for sequence in (*group.running, *group.fetching)}
    assert found.keys() == placed, "who has blocks is found by one, nobody else is"
    for sequence, key in found.items():
        if sequence.state is State.FETCHING:
            continue  # by the block that follows what comes
        assert sequence.blocks is not None, f"sequence {sequence.number} fills a block but has none"
        block = len(sequence.blocks.nodes)
        before = sequence.hashes[block - 1] if block else salt_seed(sequence.salt)
        start = block * config.block_size
        begins = hash_run(sequence.buffer[start : start + state.prefixes.stride].tobytes(), before)
        assert sequence.open_key == key in (before, begins), f"sequence {sequence.number} is found elsewhere than it is"


def _check_membership(state: ClusterState, running: list[Sequence]) -> None:
    """Each live sequence is in exactly one place; nothing ended is in any."""
    in_line = state.waiting.queued()
    assert all(sequence.state is State.WAITING for sequence in in_line), "who is queued waits"
    queued = [*in_line, *(sequence for sequence in state.waiting.parked if sequence.state is State.WAITING)]
    assert not any(sequence.apart for sequence in queued), "no suspect is queued, nor anyone wary"
    queued += state.waiting.apart
    assert all(sequence.apart for sequence in state.waiting.apart), "only suspects and the wary wait apart"
    waiters = [sequence for waiters in state.prefixes.waiters.values() for _, sequence in waiters]
    deferred = [sequence for sequence in waiters if sequence.state is State.DEFERRED]
    places = sorted(sequence.number for sequence in [*running, *queued, *deferred])
    live = sorted(sequence.number for sequence in state.sequences.values())
    assert places == live, f"each live sequence in exactly one of running, fetching, waiting, deferred: {places} against {live}"
    assert state.waiting.count == len(queued) + len(deferred), f"{state.waiting.count} are counted as waiting"
    tokens = sum(sequence.committed for sequence in [*queued, *deferred])
    assert state.waiting.tokens == tokens, f"{state.waiting.tokens} tokens are counted as waiting, not {tokens}"
    fair = state.waiting.fair
    tenants = {sequence.tenant.name for sequence in state.sequences.values() if sequence.blocks is None}
    assert fair.tenants == len(tenants), f"{fair.tenants} tenants are counted as waiting, not {sorted(tenants)}"
    accounts = Counter(sequence.tenant for sequence in state.sequences.values())
    assert all(tenant.live == number for tenant, number in accounts.items()), "each lives on one tenant's account"
    assert sum(fair.waiting(tenant)[0] for tenant in tenants) == state.waiting.count, "each waits on one tenant's account"
    assert sum(fair.waiting(tenant)[1] for tenant in tenants) == tokens, "with its tokens"
    assert all(fair.served(tenant) >= fair.floor() for tenant in tenants), "nobody who waits is below the smallest counter"
    parts = state.counters
    misses = parts.miss_cold + parts.miss_evicted + parts.miss_routed + parts.miss_inside_block
    assert parts.cached_tokens + misses == parts.started_tokens, "hits and misses by reason sum up to what was started"
    authors = state.prefixes.waiters.keys()
    assert authors <= set(running), "a sequence waits for a prefix that nobody computes"


def _check_sequence(state: ClusterState, sequence: Sequence) -> None:
    name = f"sequence {sequence.number}"
    will_fit = state.largest_later is None or sequence.blocks_at_once <= state.largest_later
    assert will_fit, f"{name} waits for a group that will not come"
    assert sequence.state is not State.ENDED, f"{name} has ended but is still listed"
    assert (sequence.state is State.RUNNING) == (sequence.lease is not None), f"{name}: {sequence.state}, {sequence.lease}"
    placed = sequence.state in (State.RUNNING, State.FETCHING)
    assert placed == (sequence.blocks is not None), f"{name}: {sequence.state} with blocks {sequence.blocks}"
    narrow = placed and state.narrow is not None
    assert narrow == (sequence.narrow is not None), f"{name}: {sequence.state} with narrow blocks {sequence.narrow}"
    output = sequence.committed - sequence.prompt_tokens
    assert output < sequence.max_tokens or sequence.pooling is not None, f"{name} should have ended by length"
    if sequence.cached_tokens is not None:
        found = sequence.cached_tokens + sum(astuple(sequence.misses))
        assert found == sequence.prompt_tokens, f"{name} found {sequence.cached_tokens} tokens, and missed {sequence.misses}"
    assert len(sequence.hashes) <= sequence.committed // state.config.block_size, f"{name} hashed tokens that it has not"


def _check_rows(state: ClusterState, group: ResidentGroup) -> None:
    seated = {row for row, sequence in enumerate(group.sequences) if sequence is not None}
    assert seated.isdisjoint(group.free_rows), f"group {group.group}: a taken row is listed as free"
    assert len(seated) + len(group.free_rows) == len(group.sequences), f"group {group.group}: a row is lost"
    assert group.running == {s for s in group.sequences if s is not None}, f"group {group.group}: running set"
    assert group.closed == (group.draining or group.alone is not None), f"group {group.group}: it is closed without a reason"
    assert group.alone is None or group.running <= {group.alone}, f"group {group.group}: it is kept for one, others run there"
    assert all(s is group.alone for s in group.running if s.suspect), f"group {group.group}: a suspect has company"
    assert set(group.starved) <= group.running, f"group {group.group}: a starved sequence does not run"
    backlog = sum(int(group.pending[row]) - 1 for row in seated)
    assert group.backlog == backlog, f"group {group.group}: backlog {group.backlog}, rows say {backlog}"
    assert not np.any(group.lease[group.free_rows] != -1), f"group {group.group}: a free row has a lease"
    for sequence in group.running:
        _check_running(state, group, sequence)
    if group.running and group.starved and not (group.sending or group.receiving):  # a transfer ends, and its pins with it
        assert min(group.running) not in group.starved, f"group {group.group}: its oldest sequence starves"


def _check_transfers(state: ClusterState, group: ResidentGroup) -> None:
    """Who waits for blocks has them reserved and is waited for; nothing on its way is published where it goes."""
    name, block_size = f"group {group.group}", state.config.block_size
    under_way = state.transfers.under_way()
    here = [transfer for transfer in under_way if group_of(transfer.target) == group.group and transfer.awaited]
    awaited = [transfer.author for transfer in here]
    kinds = {(transfer.author, transfer.target) for transfer in here}
    assert len(awaited) == len(kinds), f"{name}: a sequence waits for two transfers of a kind"
    assert set(awaited) == group.fetching.keys(), f"{name}: its transfers and those who wait for one are not the same"
    assert group.rows_left >= 0, f"{name}: a sequence waits for its prefix and will find no row"
    for sequence in group.fetching:
        assert sequence.state is State.FETCHING, f"{name}: sequence {sequence.number} is {sequence.state}"
        assert sequence.blocks is not None, f"{name}: sequence {sequence.number} waits without blocks"
        assert sequence.blocks.group == group.group, f"{name}: sequence {sequence.number} holds blocks of another group"
    sending = receiving = 0
    pools = (group.group, narrow_of(group.group))
    for transfer in under_way:
        blocks = transfer.end - transfer.first
        if transfer.source in pools and transfer.held is not None:
            sending += blocks
            assert len(transfer.held.blocks) == transfer.end, f"{name}: transfer {transfer.number} sends what is not held"
        if transfer.target in pools and transfer.blocks is not None:
            receiving += blocks
            above = transfer.first if state.table.window_of(transfer.target) is None else 0
            assert len(transfer.blocks.nodes) == above, f"{name}: transfer {transfer.number} is half published"
            assert transfer.end <= len(transfer.blocks.blocks), f"{name}: transfer {transfer.number} brings more than it may"
            assert transfer.part < block_size, f"{name}: transfer {transfer.number} has a full block as its part"
    assert (group.sending, group.receiving) == (sending, receiving), f"{name}: counts {group.sending}, {group.receiving}"


def _check_running(state: ClusterState, group: ResidentGroup, sequence: Sequence) -> None:
    """Its row and its blocks are its own, what it has published of them is true, and it will be looked after in time."""
    name = f"group {group.group}, sequence {sequence.number}"
    block_size, row, blocks = state.config.block_size, sequence.row, sequence.blocks
    assert blocks is not None, f"{name}: runs without blocks"
    assert blocks.group == group.group, f"{name}: holds blocks of another group"
    assert group.lease[row] == sequence.lease, f"{name}: its row has another lease"
    length, computed, held = int(group.length[row]), group.computed(row), len(blocks.blocks)
    full, filled = computed // block_size, (computed // block_size + 1) * block_size + 1
    assert computed < length, f"{name}: the last token cannot have KV yet"
    assert length - sequence.committed < group.ring_size, f"{name}: the ring has overrun tokens not written back"
    assert computed <= held * block_size, f"{name}: computed {computed} tokens in {held} blocks"
    assert held <= sequence.blocks_at_most, f"{name}: holds more blocks than it can ever need"
    low = held < sequence.blocks_at_most and held * block_size - length < state.resolved.grant_ahead
    if sequence.narrow is not None:
        low = _check_narrow(state, group, sequence, sequence.narrow, full) or low
    if (window := Window.of(state.resolved, block_size)) is None:
        assert sequence.committed <= (held + 1) * block_size, f"{name}: tokens without blocks"
        assert blocks.first == 0, f"{name}: has given back what it sees"
    else:
        assert blocks.first == window.first(full), f"{name}: holds blocks from {blocks.first} on, with {full} full ones"
        assert held - blocks.first <= sequence.blocks_at_once, f"{name}: holds more than it ever should at once"
        low = low and held < blocks.first + window.most
    assert low == (sequence in group.starved), f"{name}: low is {low} at {length} tokens in {held} blocks"
    assert low or group.due[row] > computed, f"{name}: due at {group.due[row]} already, with {length} tokens"
    assert group.due[row] <= filled, f"{name}: due at {group.due[row]}, but a block is full at {filled}"
    published = full if state.config.enable_prefix_caching else 0
    assert len(blocks.nodes) == published, f"{name}: {full} blocks are full, {len(blocks.nodes)} are published"
    for each in sequence.tables:
        if not each.tail:
            continue
        shown = np.frombuffer(state.table.index.contents[each.tail], np.int32)
        start = len(blocks.nodes) * block_size
        end = start + len(shown)
        assert end <= min(computed, sequence.committed), f"{name}: its tail shows what is not computed"
        assert np.array_equal(sequence.buffer[start:end], shown), f"{name}: its tail shows other tokens than its own"


def _check_narrow(
    state: ClusterState, group: ResidentGroup, sequence: Sequence, narrow: SequenceBlocks, full: int
) -> bool:  # fmt: skip
    """The blocks of its narrow layers stand beside its others. full: how many are. Returns whether they run low."""
    name, block_size = f"group {group.group}, sequence {sequence.number}", state.config.block_size
    window, blocks, held = Window.of_narrow(state.resolved, block_size), sequence.blocks, len(narrow.blocks)
    assert window is not None, f"{name}: has blocks of narrow layers, the model has none"
    assert blocks is not None, f"{name}: has blocks of narrow layers alone"
    assert narrow.group == narrow_of(group.group), f"{name}: holds narrow blocks of another group"
    assert narrow.nodes == blocks.nodes, f"{name}: its kinds of layers have published other blocks"
    assert narrow.inherited == blocks.inherited, f"{name}: its kinds of layers have inherited other parts"
    assert narrow.first == window.first(full), f"{name}: holds narrow blocks from {narrow.first} on, with {full} full ones"
    assert held - narrow.first <= window.most, f"{name}: holds more narrow blocks than it ever should at once"
    assert held <= sequence.blocks_at_most, f"{name}: holds more narrow blocks than it can ever need"
    assert group.computed(sequence.row) <= held * block_size, f"{name}: computed more than {held} narrow blocks hold"
    short = held * block_size - int(group.length[sequence.row]) < state.resolved.grant_ahead
    return short and held < min(sequence.blocks_at_most, narrow.first + window.most)
