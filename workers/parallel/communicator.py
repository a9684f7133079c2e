"""What the ranks of one tensor-parallel group say to each other. Implementations live in `parallel`.

Imports torch only.
"""

from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from workers.kernels.rows.peers import Peers


class Communicator(Protocol):
    """Collectives over one group. Every rank calls the same sequence; results are bit-identical on every rank.

    Errors: `PeerLost` (workers.parallel.connect) when a peer has gone or `abort` was called from another thread.
    """

    rank: int
    size: int

    @property
    def peers(self) -> "Peers | None":
        """By what kernels meet the other ranks themselves; None where they cannot."""
        ...

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in rank order. May reuse `tensor`'s memory; use the returned tensor."""
        ...

    def all_gather(self, tensor: Tensor) -> Tensor:
        """[...] on each rank -> [size, ...] on every rank, rank order."""
        ...

    def abort(self, reason: str) -> None:
        """Make a blocked or later collective of this rank raise. Callable from any thread."""
        ...

    def check(self) -> None:
        """Errors: `PeerLost` once `abort` was called: what a device has computed since may be wrong, and it raises nothing."""
        ...

    def close(self) -> None: ...


class JoinedGroup(Communicator, Protocol):
    """Of ranks that may be stopped or cut off from each other."""

    def wait_at_most(self, seconds: float) -> None:
        """From now on, for another rank, in one collective. While ranks are built it is what the start may take."""
        ...
