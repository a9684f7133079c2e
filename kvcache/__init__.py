"""The KV cache's bookkeeping: hashes, blocks, the prefix index and the global block table.

The tensors themselves are in `kvcache.pool`, which needs torch and so is imported by its own name.
"""

from kvcache.audit import audit
from kvcache.hashing import hash_blocks
from kvcache.ids import BlockId, GroupId, NodeId
from kvcache.match import Match
from kvcache.table import BlockTable, GroupUsage, SequenceBlocks

__all__ = [
    "BlockId",
    "BlockTable",
    "GroupId",
    "GroupUsage",
    "Match",
    "NodeId",
    "SequenceBlocks",
    "audit",
    "hash_blocks",
]
