"""How much of a prompt some earlier sequence has begun with, to the token, and what a block size makes of it.

A model of an index that never evicts: what block granularity costs shows without what a small pool costs. Imports NumPy and
the streams.
"""

from dataclasses import dataclass, field

import numpy as np

from benchmarks.study.models.streams import Workload
from simulator.traces import Names

STEP = np.uint64(0x9E3779B97F4A7C15)
MIX = np.uint64(0xBF58476D1CE4E5B9)


@dataclass(slots=True)
class _Node:
    edge: Names
    children: "dict[int, _Node]" = field(default_factory=dict)


class PrefixTree:
    """A radix tree of names, as SGLang's RadixAttention has one of tokens."""

    def __init__(self) -> None:
        self._root = _Node(np.empty(0, np.uint64))

    def match(self, names: Names) -> int:
        """Leading names that some sequence in the tree begins with."""
        node, at = self._root, 0
        while at < len(names) and (child := node.children.get(int(names[at]))) is not None:
            same = common(child.edge, names[at:])
            at += same
            if same < len(child.edge):
                break
            node = child
        return at

    def add(self, names: Names) -> None:
        node, at = self._root, 0
        while at < len(names):
            child = node.children.get(int(names[at]))
            if child is None:
                node.children[int(names[at])] = _Node(names[at:])
                return
            same = common(child.edge, names[at:])
            at += same
            if same < len(child.edge):  # the edge splits where they part
                rest = _Node(child.edge[same:], child.children)
                child.edge, child.children = child.edge[:same], {int(rest.edge[0]): rest}
            node = child


def common(a: Names, b: Names) -> int:
    """Length of the common prefix."""
    size = min(len(a), len(b))
    differ = a[:size] != b[:size]
    first = int(differ.argmax()) if size else 0
    return first if size and differ[first] else size


def longest_prefixes(workload: Workload, *, answers: bool = True) -> list[int]:
    """[requests] prompt tokens that some earlier request's prompt and answer begin with, at most all but the last one.

    answers: false for prompts alone. A trace's names are of many tokens: what two blocks of different names begin with is
    not seen, nor are answers.
    """
    tree = PrefixTree()
    result: list[int] = []
    for request in workload.requests:
        matched = tree.match(request.asked.names) * workload.unit
        result.append(min(matched, request.asked.prompt_tokens - 1))
        tree.add(request.cached_names if answers else request.asked.names)
    return result


def hit_tokens(prefix: int, block: int, stride: int | None = None) -> int:
    """What a cache of blocks of `block` tokens finds of a known prefix of `prefix` tokens.

    stride: with reuse inside a block, the tokens that must match there before any does; None: only full blocks match.
    """
    inside = prefix % block
    return prefix if stride is not None and inside >= stride else prefix - inside


def prefix_keys(names: Names) -> Names:
    """[names] a number for each prefix: equal prefixes, equal numbers, and others with a chance of 2^-64 a pair."""
    mixed: Names = names + np.arange(1, len(names) + 1, dtype=np.uint64) * STEP
    mixed ^= mixed >> np.uint64(31)
    mixed *= MIX
    mixed ^= mixed >> np.uint64(29)
    mixed *= STEP
    mixed ^= mixed >> np.uint64(32)
    return np.add.accumulate(mixed)


def block_keys(names: Names, unit: int, tokens: int, block: int) -> list[int]:
    """[tokens // block] a number for each full block that the names cover, after all before it.

    unit: tokens a name. A name that covers part of a block, or several, counts whole.
    """
    ends = np.arange(block, min(tokens, len(names) * unit) + 1, block, dtype=np.uint64)
    if not len(ends):
        return []
    keys: Names = prefix_keys(names)[(ends + np.uint64(unit - 1)) // np.uint64(unit) - np.uint64(1)] ^ (ends * STEP)
    result: list[int] = keys.tolist()
    return result
