"""Blocks that begin alike: from the hash of a block's first tokens to the nodes of all blocks that begin so, the newest first.

Imports the ids. Knows no tokens; the index says under which key a block belongs, and compares what it finds.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvcache.ids import NodeId


@dataclass(slots=True)
class HeadLists:
    """newest: by key, the first of the list. older, newer: the links of those that are not alone in their list, as most are:
    so a block costs an entry of `newest`, and links only where prompts part inside it."""

    newest: dict[int, NodeId] = field(default_factory=dict)
    older: dict[NodeId, NodeId] = field(default_factory=dict)
    newer: dict[NodeId, NodeId] = field(default_factory=dict)

    def add(self, key: int, node: NodeId) -> None:
        """The newest of its list."""
        before = self.newest.setdefault(key, node)
        if before != node:
            self.newest[key] = node
            self.older[node] = before
            self.newer[before] = node

    def remove(self, key: int, node: NodeId) -> None:
        """Out of the list of `key`, in which it is."""
        older, newer = self.older.pop(node, None), self.newer.pop(node, None)
        if newer is not None:
            if older is not None:
                self.older[newer], self.newer[older] = older, newer
            else:
                del self.older[newer]
        elif older is not None:
            self.newest[key] = older
            del self.newer[older]
        else:
            del self.newest[key]

    def has_others(self, node: NodeId) -> bool:
        """Whether it is not alone in its list."""
        return node in self.older or node in self.newer

    def listed(self, key: int, most: int) -> Sequence[NodeId]:
        """The nodes of this key, the newest first, no more than `most`."""
        node = self.newest.get(key)
        if node is None or node not in self.older:
            return () if node is None else (node,)
        nodes = [node]
        while len(nodes) < most and (node := self.older.get(node)) is not None:
            nodes.append(node)
        return nodes
