"""Random walks over the block table, with a model of what each block contains and an audit after every step.

The alphabet is tiny (four kinds of blocks that begin alike, three groups of eight blocks), so that hits, parts of blocks, twins
and evictions happen all the time; `test_the_walks_go_where_the_bugs_are` counts them. The idea is that of the radix tree tests
in TGI.
"""

import random
from collections import Counter

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvcache.audit import audit
from kvcache.hashing import hash_blocks
from kvcache.ids import BlockId, GroupId, is_narrow, narrow_of
from kvcache.index import MAX_CANDIDATES
from kvcache.standing import Standing
from kvcache.table import BlockTable, SequenceBlocks
from tests.kvcache.usage import usage
from tests.shared.examples import examples

BLOCK, STRIDE = 16, 4
GROUPS = [GroupId(0), GroupId(1), GroupId(2)]
BLOCKS, NARROW_BLOCKS = 8, 6
ZEROS = [BLOCK, 0, 6, 10]
"""Leading zeros of each kind of block; ones follow."""
Content = tuple[str, tuple[int, ...]]
"""What a block's KV depends on: the salt and all tokens up to the last one that is computed in it."""

groups = st.sampled_from([*GROUPS, GroupId(0), GroupId(0)])
kinds = st.integers(0, len(ZEROS) - 1)
prompts = st.lists(kinds, min_size=1, max_size=5)
salts = st.sampled_from(["", "", "", "tenant"])
which = st.integers(0, 99)


def block(kind: int) -> list[int]:
    return [0] * ZEROS[kind] + [1] * (BLOCK - ZEROS[kind])


def agree(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


class Running:
    """A sequence and its tokens; `computed` of them have KV. Tokens beyond the prompt are chosen as they are computed."""

    def __init__(self, seq: SequenceBlocks, tokens: list[int], computed: int, beside: SequenceBlocks | None = None) -> None:
        """beside: its narrow layers' blocks, where there are any."""
        self.seq = seq
        self.kinds = [seq] if beside is None else [seq, beside]
        self.tokens = tokens
        self.computed = computed

    def array(self, start: int = 0, end: int | None = None) -> npt.NDArray[np.int32]:
        return np.array(self.tokens[start:end], np.int32)


class BlockTableMachine(RuleBasedStateMachine):
    window: int | None = None
    """Blocks before the end of a hit that are needed; None: all."""
    narrow: int | None = None
    """The same of narrow layers; None: there are none."""

    def __init__(self) -> None:
        super().__init__()
        self.table = BlockTable(BLOCK, STRIDE, self.window, self.narrow)
        self.live: list[Running] = []
        self.written: dict[tuple[GroupId, BlockId], Content] = {}
        """The model's GPU memory: what was last written to each block."""
        self.events: Counter[str] = Counter()

    @initialize()
    def add_groups(self) -> None:
        for group in GROUPS:
            self.add(group)

    def add(self, group: GroupId) -> None:
        self.table.add_group(group, BLOCKS)
        if self.narrow is not None:
            self.table.add_group(narrow_of(group), NARROW_BLOCKS)

    def remove(self, group: GroupId) -> None:
        self.live = [run for run in self.live if run.seq.group != group]
        for pool in (group, *([narrow_of(group)] if self.narrow is not None else [])):
            self.table.remove_group(pool)
            self.written = {at: content for at, content in self.written.items() if at[0] != pool}

    @property
    def bases(self) -> list[GroupId]:
        return [pool for pool in self.table.pools if not is_narrow(pool)]

    def published(self, group: GroupId) -> list[Content]:
        """What the group could serve: the memory of its published blocks as far as it is published, from the model."""
        pool, contents = self.table.pools[group], self.table.index.contents
        shown = []
        for block, node in enumerate(pool.nodes):
            if node:
                salt, tokens = self.written[group, BlockId(block)]
                start = (len(tokens) - 1) // BLOCK * BLOCK
                shown.append((salt, tokens[: start + len(contents[node]) // 4]))
        return shown

    def best_part(self, group: GroupId, salt: str, tokens: tuple[int, ...], depth: int) -> int:
        """Tokens of the block after `depth` that some published block of the group begins with."""
        start = depth * BLOCK
        prefix = tokens[:start]
        commons = [
            agree(known[start : start + BLOCK], tokens[start:])
            for other, known in self.published(group)
            if other == salt and len(known) > start and known[:start] == prefix and (len(known) - 1) // BLOCK == depth
        ]
        return max([common for common in commons if common >= STRIDE], default=0)

    @rule(group=groups, values=prompts, rest=st.integers(0, BLOCK - 1), salt=salts, extra=st.integers(0, 2),
          skip=st.sampled_from([0, 0, 0, 1]))  # fmt: skip
    def reserve(self, group: GroupId, values: list[int], rest: int, salt: str, extra: int, skip: int) -> None:
        """Starts a sequence on what the group holds of `values`, the last block but for `rest` tokens, less `skip` blocks."""
        if group not in self.table.pools:
            return
        tokens = [token for value in values for token in block(value)]
        tokens = tokens[: len(tokens) - rest]
        array, limit = np.array(tokens, np.int32), len(tokens) - 1
        match = self.table.index.match(array, hash_blocks(array, BLOCK, salt), salt, limit // BLOCK)
        parts = self.table.index.parts(match, array, salt, limit)
        for other in self.bases:
            pools = [other] if self.narrow is None else [other, narrow_of(other)]
            there = {pool: self.there(pool, salt, tokens, limit) for pool in pools}
            depth = max(
                end for end in range(limit // BLOCK + 1)
                if all(all(held[self.first_seen(pool, end) : end]) for pool, held in there.items())
            )  # fmt: skip
            assert match.depth(other) == depth
            self.events["hit in the midst"] += not all(all(held[:depth]) for held in there.values())
            cut = self.narrow is not None and depth < len(there[other]) and all(there[other][: depth + 1])
            self.events["hit cut back"] += cut
            best = min(self.best_part(pool, salt, tuple(tokens[:limit]), depth) for pool in pools)
            for pool in pools:
                found = parts[pool].tokens if pool in parts else 0
                assert found == best or len(self.table.index.heads.newest) > MAX_CANDIDATES > found
        assert len(match.nodes) == max(match.depths.values(), default=0)
        depth = max(0, match.depth(group) - (skip if self.window is None and self.narrow is None else 0))
        part = parts.get(group) if depth == match.depth(group) else None
        new = len(values) - depth + extra
        before, cached = usage(self.table, group), self.table.cached_in_match(group, match, depth)
        first = self.first_seen(group, depth)
        assert cached == sum(self.holders(group, match.nodes[at]) == 0 for at in range(first, depth))
        sources: list[BlockId] = []
        seq = self.table.reserve(group, match, depth, new, salt, part, lambda source, *_: sources.append(source))
        assert (seq is None) == (new + cached > before.free + before.cached)
        self.events["hit"] += depth > 0
        self.events["hit on a cached block"] += cached > 0
        self.events["refused"] += seq is None
        self.events["refused for its own hit"] += seq is None and new <= before.free + before.cached
        if seq is None:
            assert usage(self.table, group) == before
            return
        self.events["evicted"] += before.free < new
        assert len(seq.blocks) == depth + new
        assert seq.first == first
        for at in range(first, depth):  # the safety of prefix caching: a hit is what computing would have written
            assert self.written[group, seq.blocks[at]] == (salt, tuple(tokens[: (at + 1) * BLOCK]))
        beside = None
        if self.narrow is not None:
            inherited, narrow_sources = seq.inherited, list[BlockId]()
            beside = self.table.reserve_beside(
                seq, match, min(new, 3), parts.get(narrow_of(group)), lambda source, *_: narrow_sources.append(source)
            )
            self.events["narrow refused"] += beside is None
            if beside is None:
                assert not seq.inherited
                self.table.release(seq)
                return
            self.events["part given up"] += inherited > seq.inherited
            assert beside.inherited == seq.inherited
            assert (beside.nodes, beside.first) == (seq.nodes, self.first_seen(narrow_of(group), depth))
            for at in range(beside.first, depth):
                assert self.written[beside.group, beside.blocks[at]] == (salt, tuple(tokens[: (at + 1) * BLOCK]))
            if inherited > seq.inherited:
                part = None
            elif part is not None:
                self.use_part(beside, salt, tokens, depth, part.tokens, narrow_sources)
        if part is not None:
            self.use_part(seq, salt, tokens, depth, part.tokens, sources)
        self.live.append(Running(seq, tokens, depth * BLOCK + seq.inherited, beside))

    def there(self, pool: GroupId, salt: str, tokens: list[int], limit: int) -> list[bool]:
        """Of each full block of a prompt, whether the pool has it."""
        known = {content for content in self.published(pool) if not len(content[1]) % BLOCK}
        return [(salt, tuple(tokens[:end])) in known for end in range(BLOCK, limit + 1, BLOCK)]

    def use_part(
        self, seq: SequenceBlocks, salt: str, tokens: list[int], depth: int, expected: int, sources: list[BlockId]
    ) -> None:
        """The sequence's first private block begins with tokens that are in the group's memory: in it, or in another."""
        assert len(sources) == seq.copied
        assert seq.inherited in (0, expected)
        self.events["part without room"] += not seq.inherited
        if not seq.inherited:
            return
        target = seq.blocks[depth]
        known = self.written[seq.group, sources[0] if seq.copied else target]
        end = depth * BLOCK + seq.inherited
        assert (known[0], known[1][:end]) == (salt, tuple(tokens[:end]))
        if not seq.copied:
            self.events["part of a tail taken over" if seq.tail else "part of a block taken over"] += 1
        else:
            assert target != sources[0]
            self.events["part copied"] += 1
        self.written[seq.group, target] = (salt, tuple(tokens[:end]))

    def first_seen(self, pool: GroupId, depth: int) -> int:
        window = self.narrow if is_narrow(pool) else self.window
        return 0 if window is None else max(0, depth - window)

    def holders(self, group: GroupId, node: int) -> int:
        return sum(run.seq.group == group and node in run.seq.nodes[run.seq.first :] for run in self.live)

    @precondition(lambda self: self.live)
    @rule(at=which)
    def trim(self, at: int) -> None:
        """Gives back what is before the window, if there is one: as many blocks have no holder more as nobody else holds."""
        seq = self.live[at % len(self.live)].kinds[-1]
        first, before = self.first_seen(seq.group, len(seq.nodes)), usage(self.table, seq.group)
        leaving, former = seq.blocks[seq.first : first], seq.first
        alone = sum(self.table.pools[seq.group].refs[block] == 1 for block in leaving)
        assert self.table.trim(seq, len(seq.nodes)) == max(0, first - former)
        assert usage(self.table, seq.group).held == before.held - alone
        assert usage(self.table, seq.group).cached == before.cached + alone
        self.events["gave back"] += bool(leaving)
        self.events["gave back what others hold"] += alone < len(leaving)

    @precondition(lambda self: self.live)
    @rule(at=which, count=st.integers(0, 3))
    def grow(self, at: int, count: int) -> None:
        for seq in self.live[at % len(self.live)].kinds:
            self.grow_kind(seq, count)

    def grow_kind(self, seq: SequenceBlocks, count: int) -> None:
        before, blocks = usage(self.table, seq.group), list(seq.blocks)
        grown = self.table.grow(seq, count)
        there = self.table.index.blocks[seq.group]
        self.events["beginning evicted under its end"] += any(node not in there for node in seq.nodes)
        assert (grown is None) == (count > before.free + before.cached)
        if grown is None:
            assert usage(self.table, seq.group) == before
        assert seq.blocks == blocks + (grown or [])

    @precondition(lambda self: self.live)
    @rule(at=which, count=st.integers(1, 40), kind=kinds, show=st.booleans())
    def compute(self, at: int, count: int, kind: int, show: bool) -> None:
        """Computes up to `count` tokens, of a block of `kind` where the prompt does not say, and publishes the full blocks.

        show: what the last block is filled with so far, too.
        """
        run = self.live[at % len(self.live)]
        for _ in range(count):
            if run.computed == min(len(seq.blocks) for seq in run.kinds) * BLOCK:
                break
            if run.computed == len(run.tokens):
                run.tokens.append(block(kind)[run.computed % BLOCK])
            run.computed += 1
            content = (run.seq.salt, tuple(run.tokens[: run.computed]))
            for seq in run.kinds:
                self.written[seq.group, seq.blocks[(run.computed - 1) // BLOCK]] = content
            if run.computed % BLOCK == 0:
                for seq in run.kinds:
                    self.publish_block(run, seq)
        if show:
            self.publish_tail(run)

    def publish_block(self, run: Running, seq: SequenceBlocks) -> None:
        at = len(seq.nodes)
        content = (seq.salt, tuple(run.tokens[: run.computed]))
        twin = any(
            self.written[seq.group, BlockId(block)] == content and len(self.table.index.contents[node]) == 4 * BLOCK
            for block, node in enumerate(self.table.pools[seq.group].nodes)
            if node
        )
        private = seq.blocks[at]
        grown = bool(seq.tail)
        hashes = hash_blocks(run.array(), BLOCK, seq.salt)
        adopted = self.table.publish(seq, run.array(at * BLOCK, run.computed).tobytes(), hashes[at])
        assert (adopted is not None) == twin
        assert seq.blocks[at] == (private if adopted is None else adopted)
        assert self.written[seq.group, seq.blocks[at]] == content
        self.events["published"] += 1
        self.events["adopted"] += twin
        self.events["a tail became full"] += grown

    def publish_tail(self, run: Running) -> None:
        start = len(run.seq.nodes) * BLOCK
        for seq in run.kinds if run.computed - start >= STRIDE else ():
            known = seq.tail
            self.table.publish_tail(seq, run.array(start, run.computed).tobytes())
            self.events["published a tail" if not known else "a tail grew"] += bool(seq.tail)
            self.events["a tail was known"] += not seq.tail

    @precondition(lambda self: self.live)
    @rule(at=which, show=st.booleans())
    def release(self, at: int, show: bool) -> None:
        run = self.live.pop(at % len(self.live))
        if show:
            self.publish_tail(run)
        self.events["released among others"] += bool(self.live)
        for seq in run.kinds:
            self.table.release(seq)
            assert not seq.blocks
            assert not seq.nodes
            assert not seq.tail

    @precondition(lambda self: len(self.bases) == len(GROUPS))
    @rule(group=st.sampled_from(GROUPS), sure=st.integers(0, 3))
    def replace_group(self, group: GroupId, sure: int) -> None:
        """A group goes, perhaps to come back under its id later; rarely, or little would ever be cached."""
        if sure == 0:
            self.remove(group)
            self.events["removed a group"] += 1

    @precondition(lambda self: len(self.bases) == len(GROUPS))
    @rule(group=st.sampled_from(GROUPS), forget=st.integers(0, 1 << BLOCKS))
    def restore_group(self, group: GroupId, forget: int) -> None:
        """A group goes and comes back with what stood in its blocks, but for some that nobody remembers, and what followed
        those. What was never published is told as well, and twins are."""
        told, beside, written = self.standing(group, forget), self.standing_beside(group, forget), dict(self.written)
        before = self.published(group)
        whole = {self.written[group, each.block] for each in told if len(each.content) == 4 * BLOCK}
        self.remove(group)
        self.add(group)
        self.written = written
        self.table.restore(group, told)
        pool = self.table.pools[group]
        if self.narrow is not None:
            self.table.restore_beside(group, beside)
            theirs = self.table.pools[narrow_of(group)]
            for narrow, other in beside:
                named = theirs.nodes[narrow] == pool.nodes[other] != 0
                assert named or not theirs.nodes[narrow], "it has another name than what it stands beside"
            beside_it = narrow_of(group)
            self.written = {at: of for at, of in self.written.items() if at[0] != beside_it or theirs.nodes[at[1]]}
            self.events["restored beside"] += theirs.cached
        assert pool.held == 0
        assert pool.cached <= len(told)
        self.written = {at: content for at, content in self.written.items() if at[0] != group or pool.nodes[at[1]]}
        after = {content for content in self.published(group) if len(content[1]) % BLOCK == 0}
        assert after == whole
        self.events["restored"] += bool(told)
        self.events["restored all"] += bool(before) and set(before) <= set(self.published(group))
        self.events["restored a twin"] += pool.cached < len(told)

    def standing_beside(self, group: GroupId, forget: int) -> list[tuple[BlockId, BlockId]]:
        """Of the narrow layers' blocks, but for those that nobody remembers, those that stand beside a full one."""
        full = {of: at for (owner, at), of in self.written.items() if owner == group and len(of[1]) % BLOCK == 0}
        return [
            (at, full[of]) for (owner, at), of in self.written.items()
            if self.narrow is not None and owner == narrow_of(group) and of in full and not forget >> at & 1
        ]  # fmt: skip

    def standing(self, group: GroupId, forget: int) -> list[Standing]:
        """What was written to the group's blocks, the first blocks of prompts first."""
        blocks = {at: content for (owner, at), content in self.written.items() if owner == group and not forget >> at & 1}
        known: dict[Content, BlockId] = {}
        told = []
        for at, (salt, tokens) in sorted(blocks.items(), key=lambda each: len(each[1][1])):
            start = (len(tokens) - 1) // BLOCK * BLOCK
            before = known.get((salt, tokens[:start]))
            if start and before is None:
                continue
            told.append(Standing(at, before, salt if before is None else "", np.array(tokens[start:], np.int32).tobytes()))
            known.setdefault((salt, tokens), at)
        return told

    @precondition(lambda self: len(self.bases) < len(GROUPS))
    @rule()
    def add_group(self) -> None:
        for group in GROUPS:
            if group not in self.table.pools:
                self.add(group)

    @invariant()
    def audited(self) -> None:
        audit(self.table, [seq for run in self.live for seq in run.kinds])

    @invariant()
    def nothing_leaks(self) -> None:
        if not self.live:
            assert all(pool.held == 0 for pool in self.table.pools.values())


class WindowedMachine(BlockTableMachine):
    """Beginnings of chains are given back and evicted while their ends are held."""

    window = 2


class NarrowMachine(BlockTableMachine):
    """Layers that see all, and narrow ones beside them in pools of their own."""

    narrow = 2


TestBlockTable = BlockTableMachine.TestCase
TestBlockTable.settings = settings(max_examples=examples(50), stateful_step_count=40)
TestWindowed = WindowedMachine.TestCase
TestWindowed.settings = settings(max_examples=examples(50), stateful_step_count=40)
TestNarrow = NarrowMachine.TestCase
TestNarrow.settings = settings(max_examples=examples(50), stateful_step_count=40)

OF_A_WINDOW = {"hit in the midst", "gave back", "gave back what others hold", "beginning evicted under its end"}
OF_BOTH_KINDS = {"hit cut back", "narrow refused", "part given up", "restored beside"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "impossible"),
    [(BlockTableMachine, OF_A_WINDOW | OF_BOTH_KINDS), (WindowedMachine, OF_BOTH_KINDS), (NarrowMachine, set())],
)
def test_the_walks_go_where_the_bugs_are(kind: type[BlockTableMachine], impossible: set[str]) -> None:
    """One long walk with a fixed seed, which hypothesis' short ones cannot be relied on to be: everything happens."""
    draw = random.Random(1)
    machine = kind()
    machine.add_groups()
    whole = machine.window is None and machine.narrow is None
    likely, longest = ([0, 0, 1, 2, 3], 4) if whole else ([0, 0, 0, 0, 0, 1, 2, 3], 6)
    for _ in range(2_000):
        machine.reserve(
            draw.choice([GROUPS[0], *GROUPS]),
            [draw.choice(likely) for _ in range(draw.randint(1, longest))],
            draw.choice([0, 0, 3, 9]),
            draw.choice(["", "", "", "tenant"]),
            draw.randint(0, 2),
            draw.choice([0, 0, 1]),
        )
        machine.audited()
        steps = ["compute", "grow", "release", "replace", "restore", *(["trim"] if machine.window or machine.narrow else [])]
        for step in draw.choices(steps, [6, 1, 4, 0.2, 0.2, 6][: len(steps)], k=3):
            if step == "replace":
                machine.replace_group(draw.choice(GROUPS), 0)
                machine.audited()
                machine.add_group()
            elif step == "restore":
                machine.restore_group(draw.choice(GROUPS), draw.choice([0, 0, 1, 1 << draw.randrange(BLOCKS)]))
            elif machine.live:
                if step == "compute":
                    machine.compute(draw.randrange(100), draw.randint(1, 40), draw.randrange(4), draw.random() < 0.5)
                elif step == "grow":
                    machine.grow(draw.randrange(100), draw.randint(0, 3))
                elif step == "trim":
                    machine.trim(draw.randrange(100))
                else:
                    machine.release(draw.randrange(100), draw.random() < 0.7)
            machine.audited()
            machine.nothing_leaks()
    rare = {name: count for name, count in machine.events.items() if count < 5 and name not in impossible}
    assert not rare
    assert len(+machine.events) == 28 - len(impossible)
    assert not impossible & (+machine.events).keys()
