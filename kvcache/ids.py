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

NARROW = 1 << 11
"""Of a model some of whose layers see a window and others all: the narrow ones' part of what stands in the blocks of pool p has
blocks of its own, in pool NARROW + p of the table."""


def host_of(group: GroupId) -> GroupId:
    """The pool of the blocks that a group keeps in host memory."""
    return GroupId(HOST + group)


def narrow_of(pool: GroupId) -> GroupId:
    """The pool of the narrow layers beside that one."""
    return GroupId(NARROW + pool)


def group_of(pool: GroupId) -> GroupId:
    """Whose it is."""
    return GroupId(pool & HOST - 1)


def is_host(pool: GroupId) -> bool:
    return pool & HOST != 0


def is_narrow(pool: GroupId) -> bool:
    return pool & NARROW != 0
