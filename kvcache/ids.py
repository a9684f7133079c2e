"""Names of the things that the KV cache counts. Plain integers at run time, distinct types to the checker.

Imports nothing of Manta.
"""

from typing import NewType

BlockId = NewType("BlockId", int)
"""A block of one group's pool, 0 <= id < the pool's size. Every rank of the group uses the same id for its shard."""

GroupId = NewType("GroupId", int)
"""One tensor-parallel group of workers, below `HOST`; also its bit in a holder mask, so small numbers, reused later."""

NodeId = NewType("NodeId", int)
"""A node of the cluster-wide prefix index: a block of tokens under one parent, or a part of one that a sequence ends with."""

HOST = 1 << 10
"""More than there are groups: the host memory of group g is pool HOST + g of the table, in everything a pool like others."""


def host_of(group: GroupId) -> GroupId:
    """The pool of the blocks that a group keeps in host memory."""
    return GroupId(HOST + group)


def group_of(host: GroupId) -> GroupId:
    """Whose host memory it is."""
    return GroupId(host - HOST)


def is_host(pool: GroupId) -> bool:
    return pool >= HOST
