"""Which of several owners of one estate it belongs to: whoever came last, as Ray's GCS has it written down.

An owner that was stopped or cut off for long is replaced, and may go on afterwards: it must not act on what is another's. So
each writes down the next number when it comes, and looks whether there is a higher one before it acts. Imports ray.
"""

from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_list, _internal_kv_put

from scheduler.protocol.orphans import Estate

NAMESPACE = b"manta"


class OwnerClaim:
    """On one estate; made with its birth. number: of this owner, higher than those of all before it."""

    def __init__(self, estate: Estate) -> None:
        self._prefix = f"{estate.prefix}owner/"
        self.number = max(self._claimed(), default=0) + 1
        while _internal_kv_put(self._key(self.number), b"", overwrite=False, namespace=NAMESPACE):
            self.number += 1  # another came at the same time
        for number in self._claimed():
            if number < self.number:
                _internal_kv_del(self._key(number), namespace=NAMESPACE)

    @property
    def superseded(self) -> bool:
        """Whether another owner has come."""
        return max(self._claimed(), default=0) > self.number

    def _key(self, number: int) -> str:
        return f"{self._prefix}{number}"

    def _claimed(self) -> list[int]:
        return [int(key.rpartition(b"/")[2]) for key in _internal_kv_list(self._prefix, namespace=NAMESPACE)]
