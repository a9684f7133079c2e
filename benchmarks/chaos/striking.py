"""Faults by the clock, in a thread beside whatever else is done to an endpoint. Imports the faults, the roles and the run."""

import random
import threading
import time
from collections.abc import Sequence

from benchmarks.chaos.faults import Fault, inflict, resume
from benchmarks.chaos.roles import holders
from benchmarks.chaos.run import Shape, missing, usual
from benchmarks.shared.endpoint import Endpoint, ServingError
from benchmarks.shared.processes import births

SETTLE_S = 180.0
POLL_S = 0.5


class Striking(threading.Thread):
    """Until `settle`. made: what has been done so far, in order. between: held from each fault until all is as it was; whoever
    holds it finds everything there. Errors: ServingError if the groups do not all come up."""

    def __init__(self, endpoint: Endpoint, shape: Shape, faults: Sequence[Fault], every_s: float, seed: int) -> None:
        super().__init__(name="faults", daemon=True)
        self.made: list[str] = []
        self.between = threading.Lock()
        self._endpoint = endpoint
        self._shape = shape
        self._faults = faults
        self._every_s = every_s
        self._draw = random.Random(seed)
        self._over = threading.Event()
        self._usual: dict[str, int] = {}
        self._until_whole({})  # an endpoint is ready before all of its groups are
        self._usual = usual(endpoint)

    def run(self) -> None:
        while not self._over.wait(self._every_s):
            with self.between:
                self._strike(self._draw.choice(self._faults))

    def _strike(self, fault: Fault) -> None:
        victims = holders(fault.role, self._endpoint.pid, self._draw.choice)
        gone = births(victims) if fault.replaces else {}
        try:
            inflict(fault, victims, self._draw)
            self.made.append(str(fault) if victims else f"{fault} (nobody)")
            self._until_whole(gone)
        except ServingError:
            pass  # `settle` finds what is still missing
        finally:
            resume(victims)

    def settle(self) -> None:
        """Makes no more of them, and returns when all is as it was. Errors: ServingError if that does not come about."""
        self._over.set()
        self.join()
        self._until_whole({})

    def _until_whole(self, gone: dict[int, str]) -> None:
        deadline_s = time.monotonic() + SETTLE_S
        while (lacking := missing(self._endpoint, self._shape, self._usual, gone)) is not None:
            if time.monotonic() > deadline_s:
                raise ServingError(f"{SETTLE_S:g} s after {self.made[-1:]} there is still no {lacking}")
            time.sleep(POLL_S)
