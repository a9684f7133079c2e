"""Random walks over the block table, with a model of what each block contains and an audit after every step.

The alphabet is tiny (pages of all 0 or all 1, three groups of eight blocks), so that hits, twins, evictions and
collisions of content happen all the time; the idea is that of the radix tree tests in TGI.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from kvcache import BlockId, BlockTable, GroupId, SequenceBlocks, audit, hash_pages

PAGE = 16
GROUPS = [GroupId(0), GroupId(1), GroupId(2)]
BLOCKS = 8
Prefix = tuple[str, tuple[int, ...]]
"""What a page's KV depends on: the salt and all pages up to and with itself."""

groups = st.sampled_from(GROUPS)
prompts = st.lists(st.integers(0, 1), max_size=5)
salts = st.sampled_from(["", "", "tenant"])


def pages(values: list[int]) -> npt.NDArray[np.int32]:
    return np.repeat(np.array(values, np.int32), PAGE)


class Running:
    """A sequence, with the pages that its tokens fill; later pages are drawn as they are published."""

    def __init__(self, seq: SequenceBlocks, values: list[int]) -> None:
        self.seq = seq
        self.values = values


class BlockTableMachine(RuleBasedStateMachine):
    running: Any = Bundle("running")

    def __init__(self) -> None:
        super().__init__()
        self.table = BlockTable(PAGE)
        self.live: list[Running] = []
        self.written: dict[tuple[GroupId, BlockId], Prefix] = {}
        """The model's GPU memory: what was last written to each block."""

    @initialize()
    def add_groups(self) -> None:
        for group in GROUPS:
            self.table.add_group(group, BLOCKS)

    def published(self, group: GroupId) -> set[Prefix]:
        """What the group could serve: the memory of its published blocks, from the model."""
        pool = self.table.pools[group]
        return {self.written[group, BlockId(block)] for block, node in enumerate(pool.nodes) if node}

    @rule(target=running, group=groups, values=prompts, salt=salts, new=st.integers(0, 4), keep=st.integers(0, 5))
    def reserve(self, group: GroupId, values: list[int], salt: str, new: int, keep: int) -> Any:
        if group not in self.table.pools:
            return multiple()
        tokens = pages(values)
        match = self.table.match(tokens, hash_pages(tokens, PAGE, salt), salt, len(values))
        for other in self.table.pools:
            known = self.published(other)
            depth = 0
            while depth < len(values) and (salt, tuple(values[: depth + 1])) in known:
                depth += 1
            assert match.depth(other) == depth
        assert len(match.nodes) == max(match.depths.values(), default=0)
        depth = min(keep, match.depth(group))
        before = self.table.usage(group)
        need = new + self.table.cached_in_match(group, match, depth)
        seq = self.table.reserve(group, match, depth, new, salt)
        assert (seq is None) == (need > before.free + before.cached)
        if seq is None:
            assert self.table.usage(group) == before
            return multiple()
        assert len(seq.blocks) == depth + new
        for at in range(depth):  # the safety of prefix caching: a hit is what computing would have written
            assert self.written[group, seq.blocks[at]] == (salt, tuple(values[: at + 1]))
        run = Running(seq, values)
        self.live.append(run)
        return run

    @rule(run=running, count=st.integers(0, 3))
    def grow(self, run: Running, count: int) -> None:
        if run not in self.live:
            return
        before, blocks = self.table.usage(run.seq.group), list(run.seq.blocks)
        grown = self.table.grow(run.seq, count)
        assert (grown is None) == (count > before.free + before.cached)
        if grown is None:
            assert self.table.usage(run.seq.group) == before
        assert run.seq.blocks == blocks + (grown or [])

    @rule(run=running, value=st.integers(0, 1))
    def publish(self, run: Running, value: int) -> None:
        seq, at = run.seq, len(run.seq.nodes)
        if run not in self.live or at >= len(seq.blocks):
            return
        if at == len(run.values):
            run.values = [*run.values, value]
        content = (seq.salt, tuple(run.values[: at + 1]))
        twin = content in self.published(seq.group)
        private = seq.blocks[at]
        self.written[seq.group, private] = content  # the step that computes the page, before the report of it
        tokens = pages(run.values[: at + 1])
        adopted = self.table.publish(seq, tokens[at * PAGE :], hash_pages(tokens, PAGE, seq.salt)[at])
        assert (adopted is not None) == twin
        assert seq.blocks[at] == (private if adopted is None else adopted)
        assert self.written[seq.group, seq.blocks[at]] == content

    @rule(run=consumes(running))
    def release(self, run: Running) -> None:
        if run in self.live:
            self.live.remove(run)
            self.table.release(run.seq)
            assert not run.seq.blocks
            assert not run.seq.nodes

    @rule(group=groups)
    @precondition(lambda self: len(self.table.pools) > 1)
    def remove_group(self, group: GroupId) -> None:
        if group in self.table.pools:
            self.table.remove_group(group)
            self.live = [run for run in self.live if run.seq.group != group]
            self.written = {at: content for at, content in self.written.items() if at[0] != group}

    @rule(group=groups)
    def add_group(self, group: GroupId) -> None:
        if group not in self.table.pools:
            self.table.add_group(group, BLOCKS)

    @invariant()
    def audited(self) -> None:
        audit(self.table, [run.seq for run in self.live])

    @invariant()
    def nothing_leaks(self) -> None:
        if not self.live:
            assert all(self.table.usage(group).held == 0 for group in self.table.pools)


TestBlockTable = BlockTableMachine.TestCase
TestBlockTable.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
