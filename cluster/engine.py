"""A running cluster as a front end sees it: prompts in, streams of tokens out, everything by number.

`cluster.local.engine` and `cluster.launch` each build one. Imports the scheduler's wire types only.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from cluster.config import EngineConfig
from scheduler.protocol.messages import Deltas, Request, TalliedMetric
from scheduler.server.stats import EngineStats, GroupStats

__all__ = [
    "Connect", "Engine", "EngineError", "EngineLost", "EngineStats", "GroupStats", "OnDeltas", "OnFailure", "Progress",
    "RequestStream", "StartEngine",
]  # fmt: skip

OnDeltas = Callable[[Deltas], None]
"""Called from one thread of the engine, in commit order. Must return at once and must not call the engine."""

OnFailure = Callable[[str], None]
"""The way to the engine is lost, and why. Called at most once, after the last deltas; whoever wants what was under way asks for
the rest of it anew."""

Connect = Callable[[OnDeltas, OnFailure], "RequestStream"]
"""Opens a stream, and another each time one is lost. Errors: EngineLost if there will be none; EngineError, OSError while there
is none."""

Progress = Callable[[str], None]
"""What the start is doing at this moment, in words for the user."""


class EngineError(RuntimeError):
    """The engine could not start or was lost, for a reason that the user can read and act upon."""


class EngineLost(EngineError):
    """It will not come back."""


class RequestStream(Protocol):
    """A front end's way into a cluster. Every method may be called from any thread; once it is lost, `submit` and
    `tally` raise EngineError and the others do nothing."""

    block_size: int

    def submit(self, requests: Sequence[Request]) -> None:
        """Queues requests. Each stream ends with exactly one `Finished`, refusals included, unless the engine is
        lost: then its failure has been told, or will be."""

    def abort(self, streams: Sequence[int]) -> None:
        """The clients of these streams went away; streams that have ended are ignored."""

    def stop(self, stream: int, keep_tokens: int) -> None:
        """A stop string was found: the output ends after `keep_tokens` tokens, unless the stream has ended already."""

    def tally(self, metrics: Sequence[TalliedMetric]) -> None:
        """Adds what a front end has observed to the cluster's sums. Errors: EngineError once the engine is lost: keep them
        for the next one."""

    def leave(self) -> None:
        """It is lost, or of no use any more: what is under way on it is nobody's. A cluster of one's own stays."""

    def close(self) -> None:
        """Ends the stream, and the cluster if it is one's own, within seconds. A second call does nothing."""


class Engine(RequestStream, Protocol):
    """A cluster of one's own, running: its end is the end of every worker and process of it."""

    def reconnect(self, on_deltas: OnDeltas, on_failure: OnFailure) -> None:
        """Once its stream is lost: opens another to the scheduler that is up now, with nothing under way.
        Errors: EngineLost if there will be none; EngineError, OSError while there is none."""

    def stats(self) -> EngineStats: ...


class StartEngine(Protocol):
    """How an engine comes up: returns when every group is ready.

    Errors: ValueError or OSError for what the user asked for (checkpoint, sizes, resources), EngineError for the rest.
    Nothing is left running when it raises, KeyboardInterrupt included.
    """

    def __call__(
        self, config: EngineConfig, on_deltas: OnDeltas, on_failure: OnFailure, progress: Progress
    ) -> Engine: ...
