"""All groups side by side, as columns: who is worth a closer look when a sequence is to be placed, however many there are.

Kept up to date by the groups that something has happened to since the last look. Imports `policy`, `resident` and the table.
"""

from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

from kvcache.ids import GroupId
from kvcache.table import BlockTable
from scheduler import policy
from scheduler.running.resident import ResidentGroup, Watch

Ints = npt.NDArray[np.int64]


class GroupColumns:
    """groups: in the order in which they came up. backlog, running: as in `policy.GroupLoad`. room: blocks that a
    newcomer may take, below 0 where none may start. free, available, blocks: blocks of the pool. receiving: blocks on their way
    to it. senders: the groups, by id, that can exchange blocks with others.

    Invariant: a row says what its group does, unless the group is in `watch.touched`; so call `refresh` before you look.
    """

    def __init__(self, table: BlockTable, watch: Watch) -> None:
        self._table = table
        self._watch = watch
        self.replace(())

    def replace(self, groups: Iterable[ResidentGroup]) -> None:
        """A group has come or gone."""
        self.groups = list(groups)
        self._at = {group.group: at for at, group in enumerate(self.groups)}
        self._rows = np.zeros((6, len(self.groups)), np.int64)
        self.backlog, self.running, self.room, self.free, self.available, self.receiving = self._rows
        self.blocks = np.array([group.blocks for group in self.groups], np.int64)
        self.senders = {group.group: group for group in self.groups if group.ports}
        for group in self.groups:
            group.touch()

    def refresh(self) -> None:
        """Costs nothing for the groups that nothing has happened to."""
        for group in self._watch.touched:
            group.touched = False
            at = self._at.get(group.group)
            if at is not None and self.groups[at] is group:  # else it has gone
                self._rows[:, at] = self.row(group)
        self._watch.touched.clear()

    def row(self, group: ResidentGroup) -> tuple[int, int, int, int, int, int]:
        """(backlog, running, room, free, available, receiving) of one group, read from itself."""
        pool, running = self._table.pools[group.group], len(group.running) + len(group.fetching)
        available = pool.available
        takes = group.rows_left > 0 and not group.starved and not group.draining
        room = policy.room(available, group.blocks, running) if takes else -1
        return group.coming, running, room, pool.free, available, group.receiving

    def seen(self, at: int) -> tuple[int, ...]:
        """What `row` was at the last look."""
        return tuple(self._rows[:, at].tolist())

    def most_room(self) -> int:
        """Blocks that a newcomer could have at most, in the group that has most; below 0 if none takes any."""
        self.refresh()
        return int(self.room.max(initial=-1))

    def least_backlog(self) -> int | None:
        """Of the groups that take a newcomer; None if none does."""
        self.refresh()
        backlogs = self.backlog[self.room > 0]
        return int(backlogs.min()) if len(backlogs) else None

    def spread(self, values: Mapping[GroupId, int]) -> Ints:
        """[groups] of these, and 0 for the others. What belongs to no group, as host memory does, is left out."""
        column = np.zeros(len(self.groups), np.int64)
        places = [at for pool in values if (at := self._at.get(pool)) is not None]
        column[places] = [value for pool, value in values.items() if pool in self._at]
        return column
