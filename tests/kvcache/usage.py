"""A group's blocks by state, at one moment."""

from typing import NamedTuple

from kvcache.ids import GroupId
from kvcache.table import BlockTable


class Usage(NamedTuple):
    total: int
    free: int
    held: int
    cached: int


def usage(table: BlockTable, group: GroupId) -> Usage:
    pool = table.pools[group]
    return Usage(pool.total, pool.free, pool.held, pool.cached)
