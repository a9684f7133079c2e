"""Whether a rank lives, told by a thread beside its step loop: what the loop is in, how long that may take, who is silent.

A step is judged by its own kind: by how long others of as many tokens have taken lately. What is the first of its kind may
compile, capture or allocate, and is given time, less where only its size is new; one that is known is given ten times what its
like has taken, seconds at least.
What the thread itself has slept through (no core for this process, a machine that stands still) is left out, as whoever listens
leaves it out of others' silence. Imports `scheduler.protocol`.
"""

import threading
import time
from collections.abc import Callable, Sequence

from scheduler.protocol.leaders import Beat
from scheduler.protocol.silence import BEAT_S, LOOK_S, Silence
from workers.loop.batch import Launched

FIRST_S = 300.0
"""For a step that does what none has done: kernels are compiled, a CPU may take minutes for a large chunk."""

RESIZED_S = 30.0
"""At least, for one that does what others have done, with other numbers of tokens: a kernel or two are compiled for a size."""

FACTOR = 10.0
"""Times what steps of its kind have taken: contexts are longer, the machine is busier, caches are cold."""

FLOOR_S = 4.0
FORGETTING = 0.99
"""Of the slowest step of a kind, with each that follows."""

Kind = tuple[bool, bool, int]
"""Whether it has chunks, whether prompts are measured or pooled in it, and its tokens to the next power of two."""


def kind_of(step: Launched) -> Kind:
    return step.plan.decodes < len(step.plan.rows), bool(step.measured or step.pooled), int(step.plan.counts.sum()).bit_length()


class Pulse:
    """The turns of one rank's loop, which calls `begin` and `end`; any thread may ask."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._slowest: dict[Kind, float] = {}
        self._kind: Kind | None = None
        self._turn: tuple[float, float, float] | None = None  # when it began, how long it may take, what had been slept then
        self._slept_s = 0.0

    def begin(self, kinds: Sequence[Kind | None]) -> None:
        """A turn with steps of these kinds under way, the new one included; one that has begun and not ended goes on. None: one
        that may take any time."""
        self._kind = max((kind for kind in kinds if kind is not None), default=None)
        began_s, _, slept_s = self._turn or (self._clock(), 0.0, self._slept_s)
        self._turn = began_s, max(map(self._patience_s, kinds), default=FLOOR_S), slept_s

    def end(self, *, committed: bool) -> None:
        """committed: the oldest of the steps was waited for, so the turn took as long as a step does."""
        if committed and self._turn is not None and self._kind is not None:
            took_s = self._took_s(self._turn)
            self._slowest[self._kind] = max(took_s, FORGETTING * self._slowest.get(self._kind, 0.0))
        self._turn = None

    def busy(self) -> tuple[float, float]:
        """Seconds in the present turn, and how many it may take; (0, 0) between turns."""
        turn = self._turn
        return (0.0, 0.0) if turn is None else (self._took_s(turn), turn[1])

    def slept(self, seconds: float) -> None:
        """This process has not run for so long, as far as the one thread that calls this can tell."""
        self._slept_s += seconds

    def _took_s(self, turn: tuple[float, float, float]) -> float:
        began_s, _, slept_s = turn
        return max(0.0, self._clock() - began_s - (self._slept_s - slept_s))

    def _patience_s(self, kind: Kind | None) -> float:
        if kind is None:
            return FIRST_S
        if (slowest_s := self._slowest.get(kind)) is not None:
            return max(FLOOR_S, FACTOR * slowest_s)
        *does, size = kind
        like_s = [took_s * 2 ** max(0, size - seen) for (*did, seen), took_s in self._slowest.items() if did == does]
        return min(FIRST_S, max(RESIZED_S, FACTOR * min(like_s))) if like_s else FIRST_S


class Heart:
    """A thread that says that this rank lives until `close`, or until nobody listens.

    send: to the leader, or to the scheduler; may raise ConnectionError. pulse, peers: a leader's.
    """

    def __init__(
        self, epoch: int, send: Callable[[Beat], None], pulse: Pulse | None = None, peers: Silence | None = None
    ) -> None:
        self._epoch = epoch
        self._send = send
        self._pulse = pulse or Pulse()
        self._peers = peers
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="manta-heart", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closed.set()

    def _run(self) -> None:
        said_s, looked_s = -BEAT_S, time.monotonic()
        while not self._closed.wait(LOOK_S):
            now_s = time.monotonic()
            if (slept_s := now_s - looked_s - LOOK_S) > LOOK_S:
                self._pulse.slept(slept_s)
            looked_s = now_s
            silences = self._peers.look(now_s) if self._peers is not None else {}
            if now_s - said_s < BEAT_S:
                continue
            said_s = now_s
            rank, silent_s = max(silences.items(), key=lambda silence: silence[1], default=(0, 0.0))
            try:
                self._send(Beat(self._epoch, *self._pulse.busy(), rank, silent_s))
            except ConnectionError:  # the step loop hears of it as well
                return
