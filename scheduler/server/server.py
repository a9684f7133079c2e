"""The core behind a socket: leaders and front ends connect, calls go in, what the core decides goes out. One event loop.

Every call into the core is synchronous, so the loop makes it atomic. Imports `shell`, `wire` and asyncio; no Ray.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import TypeVar

import msgspec

from kvcache.ids import GroupId
from scheduler.core import SchedulerCore
from scheduler.protocol.handshake import Stranger, identify_stream
from scheduler.protocol.inventory import beside_of, blocks_of
from scheduler.protocol.leaders import Beat, Commands, FromLeader, Hello, Inventory
from scheduler.protocol.messages import Alive, Connect, Deltas, FromFrontEnd, Welcome
from scheduler.protocol.silence import BEAT_S, LOOK_S, Silence
from scheduler.protocol.wire import read_frame, write_frame
from scheduler.server.shell import Shell
from scheduler.server.stats import ClusterStatus, pool_maps, snapshot
from scheduler.server.vitals import Fenced, Vitals
from scheduler.state.resident import ProtocolError

logger = logging.getLogger(__name__)

T = TypeVar("T")
OPENING: type[Hello | Connect] = Hello | Connect  # type: ignore[assignment]  # a union is not a type to mypy

MAX_UNSENT_BYTES = 64 << 20
"""A front end that leaves so much unread is cut off: its requests end, and the others go on."""

FRONT_END_PATIENCE = 5.0
"""Times `hung_after_s`, that a front end may say nothing: somebody's own program may keep its threads from running."""


class SchedulerServer:
    """token: the secret that whoever connects must prove to know. check_invariants: after every event. used: called again and
    again while it has front ends and groups."""

    def __init__(
        self, core: SchedulerCore, token: str, *, check_invariants: bool = False, used: Callable[[], None] = lambda: None
    ) -> None:
        self.core = core
        self._shell = Shell(core, self._tell_leader, self._tell_front_end, check_invariants=check_invariants)
        self._token = token
        self._server: asyncio.Server | None = None
        self._leaders: dict[GroupId, asyncio.StreamWriter] = {}
        self._front_ends: dict[int, asyncio.StreamWriter] = {}
        self._front_end_count = 0
        self._started_s = time.monotonic()
        self._used = used
        self._vitals = Vitals(self._started_s, core.config.hung_after_s)
        self._silence = Silence(self._started_s)  # of the front ends
        self._looking: asyncio.Task[None] | None = None
        self.fenced: dict[GroupId, Fenced] = {}
        """The last epoch of each group that was not listened to any more while its ranks might run on."""
        self._from_leaders = msgspec.msgpack.Decoder(FromLeader)
        self._inventories = msgspec.msgpack.Decoder(Inventory)
        self._requests = msgspec.msgpack.Decoder(FromFrontEnd)

    async def listen(self, host: str) -> int:
        """Returns the port."""
        self._server = await asyncio.start_server(self._serve, host, 0, limit=1 << 20)
        self._looking = asyncio.create_task(self._look())
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    def call(self, change: Callable[[SchedulerCore], T]) -> T:
        """One call into the core, see `Shell.call`."""
        return self._shell.call(change)

    def group_lost(self, group: GroupId, reason: str, back_s: float | None = None) -> None:
        """The group is tried again only in `back_s`; None: it will not come back. Its leader may not have heard yet
        that it ended: what it says counts no more."""
        leader = self._leaders.pop(group, None)
        if leader is not None:
            leader.close()
        self._vitals.gone(group)
        self.call(lambda core: core.group_down(group, reason, back_s=back_s))

    def status(self, *, maps: bool) -> ClusterStatus:
        """What the scheduler knows of the cluster. maps: with the state of every block."""
        self.core.now_s = time.monotonic()
        return ClusterStatus(
            phase="ready" if self.core.groups else "degraded",
            block_size=self.core.config.block_size,
            engine=snapshot(self.core),
            maps=pool_maps(self.core) if maps else (),
            tallies=self._shell.tallies.snapshot(),
            uptime_s=self.core.now_s - self._started_s,
            busy_s=self._shell.busy_s,
            front_ends=len(self._front_ends),
        )

    async def close(self) -> None:
        """Ends every request and every group's log, then every connection."""
        self.call(lambda core: core.shut_down("the scheduler was shut down"))
        if self._looking is not None:
            self._looking.cancel()
        if self._server is not None:
            self._server.close()
        for writer in [*self._leaders.values(), *self._front_ends.values()]:
            writer.close()

    # ---- connections

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            opening = await identify_stream(reader, writer, self._token, OPENING)
            if isinstance(opening, Hello):
                await self._serve_leader(opening, reader, writer)
            else:
                await self._serve_front_end(reader, writer)
        except Stranger as error:
            logger.warning("refused a connection from %s: %s", writer.get_extra_info("peername"), error)
        except (ProtocolError, msgspec.DecodeError) as error:
            logger.error("a connection sent what is not the protocol: %s", error)
        finally:
            writer.close()

    async def _serve_leader(self, hello: Hello, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One (group, epoch). When its stream ends, the group is down until a newer epoch comes or `group_lost` is said."""
        group, why = GroupId(hello.group), ""
        try:
            await self._take_in(hello, reader, writer)
        except (ProtocolError, msgspec.DecodeError) as error:
            self._refuse(hello, str(error))
            return
        try:
            while (payload := await read_frame(reader)) is not None:
                self._hear(group, hello.epoch, self._from_leaders.decode(payload))
        except (ProtocolError, msgspec.DecodeError) as error:
            why = str(error)
            logger.error("fencing group %d, epoch %d: %s", group, hello.epoch, error)
        finally:
            if self._leaders.get(group) is writer:  # else a newer epoch has taken over, or it is lost
                reason = f"group {group} ended: {why or 'its leader has gone'}"
                self._fence(Fenced(group, hello.epoch, reason, cut=not why))

    async def _take_in(self, hello: Hello, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """What it has told of its pool, the tokens of every block, is kept no longer than this takes. Errors: ProtocolError."""
        told = await self._read_inventories(hello, reader)
        self.call(lambda core: self._greet(core, hello, told, writer))

    async def _read_inventories(self, hello: Hello, reader: asyncio.StreamReader) -> list[Inventory]:
        """What its pool holds, in parts. Errors: ProtocolError if it goes before it has said all, or says too much."""
        told: list[Inventory] = []
        most = hello.blocks + hello.host_blocks + hello.narrow_blocks  # each part has one block at least
        for _ in range(hello.inventories):
            payload = await read_frame(reader)
            if payload is None or len(told) == most:
                raise ProtocolError(f"group {hello.group} has not said what stands in its pool")
            told.append(self._inventories.decode(payload))
        return told

    def _hear(self, group: GroupId, epoch: int, message: FromLeader) -> None:
        """Errors: ProtocolError."""
        now_s, beat = time.monotonic(), message if isinstance(message, Beat) else None
        self._vitals.heard(group, epoch, now_s, beat)
        if beat is None:
            self._shell.leader_says(group, message)
        else:
            whole_s = now_s - max(beat.silent_s, beat.busy_s)
            self.call(lambda core: core.lives(group, epoch, whole_s))

    async def _look(self) -> None:
        """Nothing that hangs may keep what others could do."""
        said_s = 0.0
        while True:
            await asyncio.sleep(LOOK_S)
            now_s = time.monotonic()
            if now_s - said_s >= BEAT_S:
                said_s = now_s
                self._beat()
            for fenced in self._vitals.look(now_s):
                logger.error("fencing epoch %d: %s", fenced.epoch, fenced.reason)
                try:
                    self._fence(fenced)
                except Exception:  # the others are looked after all the same
                    logger.exception("group %d could not be fenced", fenced.group)
            self._leave_silent(now_s)
            if self._front_ends and self.core.groups:
                self._used()

    def _beat(self) -> None:
        """Apart from the loop that looks: a name in that would keep the last of the connections when all have ended."""
        for writer in [*self._leaders.values(), *self._front_ends.values()]:
            write_frame(writer, Alive())

    def _leave_silent(self, now_s: float) -> None:
        """Front ends that say nothing, though they may live: they ask for the same again once they can."""
        for front_end, silent_s in self._silence.look(now_s).items():
            writer = self._front_ends.get(front_end)
            if silent_s > FRONT_END_PATIENCE * self.core.config.hung_after_s and writer is not None:
                logger.error("front end %d has said nothing for %.1f s: its connection ends", front_end, silent_s)
                writer.transport.abort()

    def _fence(self, fenced: Fenced) -> None:
        """What the epoch says counts no more, and its sequences go on elsewhere. Whoever has started it ends it, see
        `SchedulerActor.beat`."""
        group = GroupId(fenced.group)
        self._vitals.gone(group)
        self.fenced[group] = fenced
        leader = self._leaders.pop(group, None)
        if leader is not None:
            leader.transport.abort()
        self.call(lambda core: core.group_down(group, fenced.reason, returning=True))

    def _refuse(self, hello: Hello, why: str) -> None:
        """A greeting that cannot be taken: whoever has started the group ends it, unless a newer epoch has come meanwhile."""
        group, last = GroupId(hello.group), self.fenced.get(GroupId(hello.group))
        logger.error("refused group %d, epoch %d: %s", group, hello.epoch, why)
        if group not in self._leaders and (last is None or last.epoch < hello.epoch):
            self.fenced[group] = Fenced(group, hello.epoch, f"group {group} was refused: {why}")

    def _greet(self, core: SchedulerCore, hello: Hello, told: list[Inventory], writer: asyncio.StreamWriter) -> None:
        """Only an epoch that the core accepts gets the group's log."""
        core.group_up(
            GroupId(hello.group), hello.epoch, hello.blocks, hello.max_num_seqs, host_blocks=hello.host_blocks,
            ports=hello.ports, standing=blocks_of(told), host_standing=blocks_of(told, host=True), life=hello.life,
            narrow_blocks=hello.narrow_blocks, host_narrow_blocks=hello.host_narrow_blocks, narrow_standing=beside_of(told),
            beats=True,
        )  # fmt: skip
        self._leaders[GroupId(hello.group)] = writer
        self._vitals.up(GroupId(hello.group), hello.epoch, time.monotonic())

    async def _serve_front_end(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        front_end = self._front_end_count
        self._front_end_count += 1
        self._front_ends[front_end] = writer
        self._silence.heard(front_end, time.monotonic())
        write_frame(writer, Welcome(self.core.config.block_size, self.core.config.hung_after_s))
        try:
            while (payload := await read_frame(reader)) is not None:
                self._silence.heard(front_end, time.monotonic())
                self._shell.front_end_says(front_end, self._requests.decode(payload))
        finally:
            del self._front_ends[front_end]
            self._silence.forget(front_end)
            self.call(lambda core: core.front_end_down(front_end))

    # ---- what goes out

    def _tell_leader(self, group: GroupId, commands: Commands) -> None:
        if (leader := self._leaders.get(group)) is not None:
            write_frame(leader, commands)

    def _tell_front_end(self, front_end: int, deltas: Deltas) -> None:
        writer = self._front_ends.get(front_end)
        if writer is None:
            return
        write_frame(writer, deltas)
        if writer.transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            logger.error("front end %d does not read its tokens: cut off", front_end)
            writer.transport.abort()
