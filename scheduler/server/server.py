"""The core behind a socket: leaders and front ends connect, calls go in, what the core decides goes out. One event loop.

Every call into the core is synchronous, so the loop makes it atomic. Imports the core, `wire` and asyncio; no Ray.
"""

import asyncio
import hmac
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import msgspec

from kvcache.ids import GroupId
from scheduler.core import SchedulerCore
from scheduler.invariants import check
from scheduler.protocol.messages import (
    Abort,
    Connect,
    End,
    FromFrontEnd,
    FromLeader,
    Hello,
    Moved,
    Opening,
    Submit,
    Tally,
    Welcome,
)
from scheduler.protocol.wire import read_frame, write_frame
from scheduler.queue.limits import RequestRefused
from scheduler.running.resident import ProtocolError
from scheduler.server.delivery import refuse
from scheduler.server.stats import ClusterStatus, pool_maps, snapshot
from scheduler.server.tallies import Tallies

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_UNSENT_BYTES = 64 << 20
"""A front end that leaves so much unread is cut off: its requests end, and the others go on."""


class SchedulerServer:
    """token: the secret that every connection must open with. check_invariants: after every event."""

    def __init__(self, core: SchedulerCore, token: str, *, check_invariants: bool = False) -> None:
        self.core = core
        self.tallies = Tallies()
        self._token = token
        self._check = check_invariants
        self._server: asyncio.Server | None = None
        self._leaders: dict[GroupId, asyncio.StreamWriter] = {}
        self._front_ends: dict[int, asyncio.StreamWriter] = {}
        self._front_end_count = 0
        self._started_s = time.monotonic()
        self._busy_s = 0.0
        self._openings = msgspec.msgpack.Decoder(Opening)
        self._from_leaders = msgspec.msgpack.Decoder(FromLeader)
        self._requests = msgspec.msgpack.Decoder(FromFrontEnd)

    async def listen(self, host: str) -> int:
        """Returns the port."""
        self._server = await asyncio.start_server(self._serve, host, 0, limit=1 << 20)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    def call(self, change: Callable[[SchedulerCore], T]) -> T:
        """Runs one call into the core and delivers what follows from it."""
        began_s = self.core.now_s = time.monotonic()
        try:
            return change(self.core)
        finally:  # what was committed before an error is told all the same
            self._deliver()
            self._busy_s += time.monotonic() - began_s

    def group_lost(self, group: GroupId, reason: str) -> None:
        """The group will not come back. Its leader may not have heard yet that it ended: what it says counts no more."""
        leader = self._leaders.pop(group, None)
        if leader is not None:
            leader.close()
        self.call(lambda core: core.group_down(group, reason))

    def status(self, *, maps: bool) -> ClusterStatus:
        """What the scheduler knows of the cluster. maps: with the state of every block."""
        self.core.now_s = time.monotonic()
        return ClusterStatus(
            phase="ready" if self.core.groups else "degraded",
            block_size=self.core.config.block_size,
            engine=snapshot(self.core),
            maps=pool_maps(self.core) if maps else (),
            tallies=self.tallies.snapshot(),
            uptime_s=self.core.now_s - self._started_s,
            busy_s=self._busy_s,
            front_ends=len(self._front_ends),
        )

    async def close(self) -> None:
        """Closes every group's log, then every connection."""
        for group in self.core.groups.values():
            group.issue(End("the scheduler was shut down"))
        self._deliver()
        if self._server is not None:
            self._server.close()
        for writer in [*self._leaders.values(), *self._front_ends.values()]:
            writer.close()

    # ---- connections

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            payload = await read_frame(reader)
            opening = self._openings.decode(payload) if payload is not None else None
            if opening is None or not hmac.compare_digest(opening.token, self._token):
                logger.warning("refused a connection from %s without the cluster's token", writer.get_extra_info("peername"))
            elif isinstance(opening, Hello):
                await self._serve_leader(opening, reader, writer)
            elif isinstance(opening, Connect):
                await self._serve_front_end(reader, writer)
        except (ProtocolError, msgspec.DecodeError) as error:
            logger.error("a connection sent what is not the protocol: %s", error)
        finally:
            writer.close()

    async def _serve_leader(self, hello: Hello, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One (group, epoch). When its stream ends, the group is down until a newer epoch comes or `group_lost` is said."""
        group, why = GroupId(hello.group), "its leader has gone"
        try:
            self.call(lambda core: self._greet(core, hello, writer))
            while (payload := await read_frame(reader)) is not None:
                self.call(partial(_hear, group=group, message=self._from_leaders.decode(payload)))
        except (ProtocolError, msgspec.DecodeError) as error:
            why = str(error)
            logger.error("fencing group %d, epoch %d: %s", group, hello.epoch, error)
        finally:
            if self._leaders.get(group) is writer:  # else a newer epoch has taken over, or it is lost
                del self._leaders[group]
                self.call(lambda core: core.group_down(group, why, returning=True))

    def _greet(self, core: SchedulerCore, hello: Hello, writer: asyncio.StreamWriter) -> None:
        """Only an epoch that the core accepts gets the group's log."""
        core.group_up(
            GroupId(hello.group), hello.epoch, hello.blocks, hello.max_num_seqs, host_blocks=hello.host_blocks,
            ports=hello.ports,
        )  # fmt: skip
        self._leaders[GroupId(hello.group)] = writer

    async def _serve_front_end(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        front_end = self._front_end_count
        self._front_end_count += 1
        self._front_ends[front_end] = writer
        write_frame(writer, Welcome(self.core.config.block_size))
        try:
            while (payload := await read_frame(reader)) is not None:
                message = self._requests.decode(payload)
                self.call(partial(self._take, front_end=front_end, message=message))
        finally:
            del self._front_ends[front_end]
            self.call(lambda core: core.front_end_down(front_end))

    def _take(self, core: SchedulerCore, front_end: int, message: FromFrontEnd) -> None:
        if isinstance(message, Submit):
            for request in message.requests:
                try:
                    core.submit(front_end, request)
                except RequestRefused as refusal:
                    write_frame(self._front_ends[front_end], refuse(request, refusal))
        elif isinstance(message, Abort):
            for stream in message.streams:
                core.abort(front_end, stream)
        elif isinstance(message, Tally):
            self.tallies.add(message.metrics)
        else:
            core.end(front_end, message.stream, message.keep_tokens)

    # ---- what goes out

    def _deliver(self) -> None:
        """Logs before deltas: a block is never promised to a client before its group was told.

        What is taken out here is told to each, whatever becomes of the others: nobody would say it again.
        """
        if self._check:
            check(self.core)
        for name, commands in self.core.take_logs():
            if (leader := self._leaders.get(name)) is not None:
                write_frame(leader, commands)
        for front_end, deltas in self.core.outbox.drain():
            writer = self._front_ends.get(front_end)
            if writer is None:
                continue
            write_frame(writer, deltas)
            if writer.transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
                logger.error("front end %d does not read its tokens: cut off", front_end)
                writer.transport.abort()


def _hear(core: SchedulerCore, group: GroupId, message: FromLeader) -> None:
    if isinstance(message, Moved):
        core.moved(group, message)
    else:
        core.report(group, message)
