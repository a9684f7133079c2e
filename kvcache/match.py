"""What is found in the prefix index for one prompt: a chain of full blocks, and where it goes on inside one.

Imports NumPy and the ids.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import chain
from typing import NamedTuple

import numpy as np

from kvcache.hashing import TOKEN_DTYPE
from kvcache.ids import GroupId, NodeId

EVERYWHERE = -1
"""The mask of all groups."""


@lru_cache(maxsize=1024)
def groups_of(mask: int) -> tuple[GroupId, ...]:
    """The groups of a holder mask, ascending. Remembered: a cluster has few distinct masks at a time."""
    groups = []
    while mask:
        lowest = mask & -mask
        groups.append(GroupId(lowest.bit_length() - 1))
        mask ^= lowest
    return tuple(groups)


def deepest(masks: Iterable[int], window_blocks: int) -> dict[GroupId, int]:
    """By group, after how many blocks of a chain it could go on there at most: it holds the `window_blocks` before that place,
    or all, if those are fewer. A group that could go on nowhere is absent. masks: of each block its holders.
    """
    depths, began, there = dict[GroupId, int](), dict[GroupId, int](), 0
    for depth, mask in enumerate(chain(masks, (0,))):
        if mask == there:
            continue
        for group in groups_of(there & ~mask):
            if not began[group] or depth - began[group] >= window_blocks:
                depths[group] = depth
        began.update(dict.fromkeys(groups_of(mask & ~there), depth))
        there = mask
    return depths


def deepest_seen(there: Sequence[bool], end: int, window_blocks: int) -> int:
    """The deepest place, `end` at most, before which `window_blocks` are there, or all, if those are fewer."""
    seen = 0
    for at in range(end - 1, -1, -1):
        seen = seen + 1 if there[at] else 0
        if not seen:
            end = at
        elif seen == window_blocks:
            return end
    return end


class Match(NamedTuple):
    """The longest chain of full blocks known anywhere in the cluster for one prompt, and how much each group has of it.

    nodes: the chain, from the first block on. Its length is the greatest of all depths.
    depths: by group, the blocks of the chain that it holds, contiguous from the first block; a group with none is absent.
    Where a model sees a window only, the deepest place before which it holds all that is seen: see `deepest`. Where some of its
    layers do, the deepest before which it holds all of the others and what is seen of theirs; pools of these are absent.
    generation: the index's at the time of the match.
    Invariant: valid until the next mutation of the table. Node ids are reused, so a match that an eviction has
    overtaken might name other blocks; the table refuses it by its generation.
    """

    nodes: list[NodeId]
    depths: dict[GroupId, int]
    generation: int

    def depth(self, group: GroupId) -> int:
        """Full blocks of the chain after which `group` could go on."""
        return self.depths.get(group, 0)


class Part(NamedTuple):
    """Where a match ends inside a block: the first `tokens` of the block `node` are what the prompt goes on with."""

    node: NodeId
    tokens: int


def common_prefix(one: bytes, other: bytes) -> int:
    """How many leading tokens, int32, both have in common: one by one only where neither begins with the other."""
    if one.startswith(other):
        return len(other) // TOKEN_DTYPE.itemsize
    if other.startswith(one):
        return len(one) // TOKEN_DTYPE.itemsize
    length = min(len(one), len(other)) // TOKEN_DTYPE.itemsize
    return int((np.frombuffer(one, TOKEN_DTYPE, length) != np.frombuffer(other, TOKEN_DTYPE, length)).argmax())
