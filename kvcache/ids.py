"""Names of the things that the KV cache counts. Plain integers at run time, distinct types to the checker.

Imports nothing of Manta.
"""

from typing import NewType

BlockId = NewType("BlockId", int)
"""A page of one group's pool, 0 <= id < the pool's size. Every rank of the group uses the same id for its shard."""

GroupId = NewType("GroupId", int)
"""One tensor-parallel group of workers; also its bit in a holder mask, so small numbers, reused after a group has gone."""

NodeId = NewType("NodeId", int)
"""A node of the cluster-wide prefix index: one full page of tokens under one parent."""
