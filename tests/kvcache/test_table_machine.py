"""Random walks over the block table, with a model of what each block contains and an audit after every step.

The alphabet is tiny (pages of all 0 or all 1, three groups of eight blocks), so that hits, twins and evictions happen
all the time; `test_the_walks_go_where_the_bugs_are` counts them. The idea is that of the radix tree tests in TGI.
"""

import random
from collections import Counter

import numpy as np
import numpy.typing as npt
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvcache import BlockId, BlockTable, GroupId, SequenceBlocks, audit, hash_pages

PAGE = 16
GROUPS = [GroupId(0), GroupId(1), GroupId(2)]
BLOCKS = 8
Prefix = tuple[str, tuple[int, ...]]
"""What a page's KV depends on: the salt and all pages up to and with itself."""

groups = st.sampled_from([*GROUPS, GroupId(0), GroupId(0)])
prompts = st.lists(st.integers(0, 1), min_size=1, max_size=5)
salts = st.sampled_from(["", "", "", "tenant"])
which = st.integers(0, 99)


def pages(values: list[int]) -> npt.NDArray[np.int32]:
    return np.repeat(np.array(values, np.int32), PAGE)


class Running:
    """A sequence, with the pages that its tokens fill; later pages are chosen as they are published."""

    def __init__(self, seq: SequenceBlocks, values: list[int]) -> None:
        self.seq = seq
        self.values = values


class BlockTableMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.table = BlockTable(PAGE)
        self.live: list[Running] = []
        self.written: dict[tuple[GroupId, BlockId], Prefix] = {}
        """The model's GPU memory: what was last written to each block."""
        self.events: Counter[str] = Counter()

    @initialize()
    def add_groups(self) -> None:
        for group in GROUPS:
            self.table.add_group(group, BLOCKS)

    def published(self, group: GroupId) -> set[Prefix]:
        """What the group could serve: the memory of its published blocks, from the model."""
        pool = self.table.pools[group]
        return {self.written[group, BlockId(block)] for block, node in enumerate(pool.nodes) if node}

    @rule(group=groups, values=prompts, salt=salts, extra=st.integers(0, 2), skip=st.sampled_from([0, 0, 1]))
    def reserve(self, group: GroupId, values: list[int], salt: str, extra: int, skip: int) -> None:
        """Starts a sequence on what the group holds of `values` less `skip` pages, with room for `extra` more pages."""
        if group not in self.table.pools:
            return
        tokens = pages(values)
        match = self.table.match(tokens, hash_pages(tokens, PAGE, salt), salt, len(values))
        for other in self.table.pools:
            known = self.published(other)
            depth = 0
            while depth < len(values) and (salt, tuple(values[: depth + 1])) in known:
                depth += 1
            assert match.depth(other) == depth
        assert len(match.nodes) == max(match.depths.values(), default=0)
        depth = max(0, match.depth(group) - skip)
        new = len(values) - depth + extra
        before, cached = self.table.usage(group), self.table.cached_in_match(group, match, depth)
        assert cached == sum(self.holders(group, match.nodes[at]) == 0 for at in range(depth))
        seq = self.table.reserve(group, match, depth, new, salt)
        assert (seq is None) == (new + cached > before.free + before.cached)
        self.events["hit"] += depth > 0
        self.events["hit on a cached page"] += cached > 0
        self.events["refused"] += seq is None
        self.events["refused for its own hit"] += seq is None and new <= before.free + before.cached
        if seq is None:
            assert self.table.usage(group) == before
            return
        self.events["evicted"] += before.free < new
        assert len(seq.blocks) == depth + new
        for at in range(depth):  # the safety of prefix caching: a hit is what computing would have written
            assert self.written[group, seq.blocks[at]] == (salt, tuple(values[: at + 1]))
        self.live.append(Running(seq, values))

    def holders(self, group: GroupId, node: int) -> int:
        return sum(run.seq.group == group and node in run.seq.nodes for run in self.live)

    @precondition(lambda self: self.live)
    @rule(at=which, count=st.integers(0, 3))
    def grow(self, at: int, count: int) -> None:
        seq = self.live[at % len(self.live)].seq
        before, blocks = self.table.usage(seq.group), list(seq.blocks)
        grown = self.table.grow(seq, count)
        assert (grown is None) == (count > before.free + before.cached)
        if grown is None:
            assert self.table.usage(seq.group) == before
        assert seq.blocks == blocks + (grown or [])

    @precondition(lambda self: self.live)
    @rule(at=which, count=st.integers(1, 4), value=st.integers(0, 1))
    def publish(self, at: int, count: int, value: int) -> None:
        """Computes up to `count` pages, of `value` where the prompt does not say."""
        run = self.live[at % len(self.live)]
        for _ in range(min(count, len(run.seq.blocks) - len(run.seq.nodes))):
            self.publish_next(run, value)

    def publish_next(self, run: Running, value: int) -> None:
        seq, at = run.seq, len(run.seq.nodes)
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
        self.events["published"] += 1
        self.events["adopted"] += twin

    @precondition(lambda self: self.live)
    @rule(at=which)
    def release(self, at: int) -> None:
        run = self.live.pop(at % len(self.live))
        self.events["released among others"] += bool(self.live)
        self.table.release(run.seq)
        assert not run.seq.blocks
        assert not run.seq.nodes

    @precondition(lambda self: len(self.table.pools) == len(GROUPS))
    @rule(group=st.sampled_from(GROUPS), sure=st.integers(0, 3))
    def replace_group(self, group: GroupId, sure: int) -> None:
        """A group goes, perhaps to come back under its id later; rarely, or little would ever be cached."""
        if sure == 0:
            self.table.remove_group(group)
            self.live = [run for run in self.live if run.seq.group != group]
            self.written = {at: content for at, content in self.written.items() if at[0] != group}
            self.events["removed a group"] += 1

    @precondition(lambda self: len(self.table.pools) < len(GROUPS))
    @rule()
    def add_group(self) -> None:
        for group in GROUPS:
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


def test_the_walks_go_where_the_bugs_are() -> None:
    """One long walk with a fixed seed, which hypothesis' short ones cannot be relied on to be: everything happens."""
    draw = random.Random(1)
    machine = BlockTableMachine()
    machine.add_groups()
    for _ in range(2_000):
        machine.reserve(
            draw.choice([GROUPS[0], *GROUPS]),
            [draw.randrange(2) for _ in range(draw.randint(1, 5))],
            draw.choice(["", "", "", "tenant"]),
            draw.randint(0, 2),
            draw.choice([0, 0, 1]),
        )
        machine.audited()
        for step in draw.choices(["publish", "grow", "release", "replace"], [6, 1, 4, 0.2], k=3):
            if step == "replace":
                machine.replace_group(draw.choice(GROUPS), 0)
                machine.audited()
                machine.add_group()
            elif machine.live:
                if step == "publish":
                    machine.publish(draw.randrange(100), draw.randint(1, 4), draw.randrange(2))
                elif step == "grow":
                    machine.grow(draw.randrange(100), draw.randint(0, 3))
                else:
                    machine.release(draw.randrange(100))
            machine.audited()
            machine.nothing_leaks()
    rare = {name: count for name, count in machine.events.items() if count < 20}
    assert not rare
    assert len(machine.events) == 9
