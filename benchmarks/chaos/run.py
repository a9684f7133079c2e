"""One run: endpoints one after the other, clients, and faults at random moments; in the end, what is still held.

Imports the other files of this room and `shared`.
"""

import contextlib
import itertools
import json
import os
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path

from benchmarks.chaos.asks import ROUNDING, Answer, Ask, mixed
from benchmarks.chaos.clients import Clients, undisturbed
from benchmarks.chaos.faults import Fault, inflict, resume
from benchmarks.chaos.ledger import Incident, Ledger
from benchmarks.chaos.roles import census, holders
from benchmarks.shared.endpoint import Endpoint, ServingError, serving
from benchmarks.shared.processes import Process, births, held_by, still_there

FLAGS = ("--haproxy", "--kv-memory", "64MiB")
FLAGS_ON = {"cpu": ("--threads", "1", "--dtype", "float64"), "cuda": ("--dtype", "float32")}
"""By device. float64, so that an answer does not depend on what else was in its batches; on a GPU, which has no kernels for
it, float32, whose log-probabilities do."""

ROUNDING_ON = {"cpu": ROUNDING, "cuda": 1e-3}

POLL_S, ASK_TIMEOUT_S = 0.25, 5.0
STEADY_POLLS = 12
"""In a row, for which an endpoint must be whole."""

MOMENTS_S = (0.5, 4.0)
"""Between an endpoint that is whole and the next fault."""

LAST_WATCH_S = 30.0
"""After the death of what nothing brings back."""


@dataclass(frozen=True, slots=True)
class Shape:
    """How large an endpoint is, and on what. ranks: of a group. replicas: front ends."""

    groups: int = 2
    ranks: int = 2
    replicas: int = 2
    device: str = "cpu"

    @property
    def flags(self) -> list[str]:
        named = {"groups": self.groups, "tensor-parallel-size": self.ranks, "replicas": self.replicas}
        return ["--device", self.device, *(word for name, number in named.items() for word in (f"--{name}", str(number)))]


SHAPE = Shape()


@dataclass(slots=True)
class Held:
    """What an endpoint holds without a request. blocks: by state. processes: by the names of `roles.census`."""

    blocks: dict[str, int]
    processes: dict[str, list[Process]]

    @classmethod
    def by(cls, endpoint: Endpoint) -> "Held":
        """Errors: ServingError if it does not become idle."""
        blocks = endpoint.idle_blocks()
        found = census(endpoint.pid)
        held = held_by([endpoint.pid, *(pid for pids in found.values() for pid in pids)])
        named = {"driver": [endpoint.pid], **found}
        return cls(blocks, {name: [held[pid] for pid in pids if pid in held] for name, pids in named.items()})


@dataclass(slots=True)
class Result:
    """began, ended: what the last endpoint held before its first fault and after its last. not_held: why there is none."""

    incidents: list[Incident] = field(default_factory=list)
    samples: list[str] = field(default_factory=list)
    missing: Counter[str] = field(default_factory=Counter)
    began: Held | None = None
    ended: Held | None = None
    not_held: str = ""


class Chaos:
    """log: of the endpoints, which get a number each before its suffix. RAY_TMPDIR is where their Rays have their folders."""

    def __init__(
        self, model: Path, log: Path, *, streams: int, seed: int, patience_s: float, shape: Shape = SHAPE
    ) -> None:
        self._model = model
        self._shape = shape
        self._log = log
        self._streams = streams
        self._seed = seed
        self._patience_s = patience_s
        self._draw = random.Random(seed)
        self._lives = itertools.count(1)
        self._asks: list[Ask] = mixed(2 * streams, seed)
        self._expected: dict[int, Answer] = {}
        self.result = Result()

    def run(self, faults: Sequence[Fault], count: int) -> Result:
        """count: faults in all; each takes its turn, in an order that is drawn. Errors: ServingError if an endpoint does not
        come up."""
        plan = in_turns(faults, count, self._draw)
        while plan:
            log = self._log.with_suffix(f".{next(self._lives)}.log")
            with serving(self._model, [*FLAGS, *FLAGS_ON[self._shape.device], *self._shape.flags], log) as endpoint:
                self._one_life(endpoint, plan, log)
        return self.result

    def _one_life(self, endpoint: Endpoint, plan: list[Fault], log: Path) -> None:
        """As many of the plan's faults as this endpoint survives."""
        before = usual(endpoint)
        if not self._expected:
            self._expected = undisturbed(endpoint.address, self._asks, self._streams)
            _say(f"{len(self._asks)} answers as they are undisturbed")
        ledger = Ledger(self._expected, ROUNDING_ON[self._shape.device])
        whole = True
        self.result.began, self.result.ended = Held.by(endpoint), None
        try:
            with Clients(endpoint.address, self._asks, ledger, self._streams, self._draw.randint(0, 1 << 30)):
                _until(lambda: ledger.flowing(self._streams), self._patience_s)
                while plan and whole:
                    time.sleep(self._draw.uniform(*MOMENTS_S))
                    whole = self._strike(endpoint, plan.pop(0), ledger, before)
                time.sleep(MOMENTS_S[1])
                ledger.end()
        finally:  # also what there is when somebody interrupts it
            self.result.incidents += ledger.incidents
            self.result.samples += ledger.samples
        incident = ledger.incidents[-1]
        if whole:
            self._look_what_is_held(endpoint)
        else:
            self._end(endpoint, incident)
            keep_ray_logs(log)

    def _strike(self, endpoint: Endpoint, fault: Fault, ledger: Ledger, before: dict[str, int]) -> bool:
        """Makes the fault and waits until all is as it was; False if that does not come about."""
        victims = [] if fault.kind == "disk" else holders(fault.role, endpoint.pid, self._draw.choice)
        if not victims and fault.kind != "disk":
            self.result.missing[str(fault)] += 1
            _say(f"{fault}: nobody plays this role")
            return True
        incident = ledger.begin(fault)
        gone = births(victims) if fault.replaces else {}
        try:
            inflict(fault, victims, self._draw)
            patience_s = LAST_WATCH_S if fault.ends_all else self._patience_s
            whole_s = _until(lambda: missing(endpoint, self._shape, before, gone) is None, patience_s, STEADY_POLLS)
            if whole_s is not None:
                incident.whole_s = whole_s - incident.at_s
                whole_s = _until(lambda: ledger.flowing(self._streams), self._patience_s)
            if whole_s is None:
                incident.missing = missing(endpoint, self._shape, before, gone) or "output for every client"
        finally:
            resume(victims)
        ledger.end()
        _say(in_words(incident))
        return whole_s is not None

    def _end(self, endpoint: Endpoint, incident: Incident) -> None:
        """As its user would, by Ctrl-C."""
        ended = endpoint.interrupt()
        incident.ended_s, incident.left = ended.seconds, len(ended.left)
        _say(f"{incident.fault}: Ctrl-C took {ended.seconds:.1f} s, {len(ended.left)} processes had to be killed")

    def _look_what_is_held(self, endpoint: Endpoint) -> None:
        try:
            self.result.ended = Held.by(endpoint)
        except (ServingError, OSError) as error:
            self.result.not_held = str(error)


def in_turns(faults: Sequence[Fault], count: int, draw: random.Random) -> list[Fault]:
    """Each as often as the others, give or take one. What ends an endpoint comes last, so that few must be started."""
    plan: list[Fault] = []
    while len(plan) < count:
        plan += draw.sample(faults, len(faults))
    return sorted(plan[:count], key=lambda fault: fault.ends_all)


def keep_ray_logs(log: Path) -> None:
    """Beside an endpoint's own log: why it did not come back stands in those of its Ray, which go with their folder."""
    kept = log.with_suffix("")
    shutil.rmtree(kept, ignore_errors=True)
    with contextlib.suppress(shutil.Error, KeyError, OSError):
        shutil.copytree(Path(os.environ["RAY_TMPDIR"], "ray", "session_latest", "logs"), kept)
    _say(f"Ray's logs: {kept}")


def usual(endpoint: Endpoint) -> dict[str, int]:
    """How many processes play which role, while nothing has happened."""
    return {name: len(pids) for name, pids in census(endpoint.pid).items()}


def missing(endpoint: Endpoint, shape: Shape, before: dict[str, int], gone: dict[int, str]) -> str | None:
    """What of all that there was is not there yet, in words: processes, groups, front ends; or who was to be replaced and has
    not gone. gone: as `births` has them."""
    now = census(endpoint.pid)
    if left := still_there(gone):
        return f"the end of {sorted(left)}"
    if few := [name for name, count in before.items() if len(now[name]) < count]:
        return f"a process called {' and '.join(few)}"
    try:
        endpoint.get("/ready", ASK_TIMEOUT_S)
        status = json.loads(endpoint.get("/status.json?history=0", ASK_TIMEOUT_S))
    except (OSError, HTTPException, ValueError) as error:
        return f"an answer that it is ready ({error})"
    states = [group["state"] for group in status["groups"]]
    if states != ["up"] * shape.groups:
        return f"a group that is up: they are {', '.join(states)}"
    return None if status["front_ends"] == shape.replicas else f"a front end: the scheduler knows {status['front_ends']}"


def _until(true: Callable[[], bool], patience_s: float, polls: int = 1) -> float | None:
    """When it became true, by `time.monotonic`, for so many looks in a row; None if that took longer than patience allows."""
    deadline_s, since_s, seen = time.monotonic() + patience_s, 0.0, 0
    while time.monotonic() < deadline_s:
        if true():
            since_s, seen = since_s if seen else time.monotonic(), seen + 1
            if seen == polls:
                return since_s
        else:
            seen = 0
        time.sleep(POLL_S)
    return None


def in_words(incident: Incident) -> str:
    """One line."""
    lost, refused = dict(incident.lost), dict(incident.refused)
    came = f"whole after {incident.whole_s:.1f} s" if incident.whole_s is not None else f"without {incident.missing}"
    return (
        f"{incident.fault}: {incident.under_way} under way, lost {lost}, wrong {incident.wrong}, refused {refused}, taken up "
        f"{incident.taken_up}, silent {incident.silent_s:.1f} s, a stream paused {incident.paused_s:.1f} s, {came}"
        + "".join(f"\n  error event: {said}" for said in incident.said)
    )


def _say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)
