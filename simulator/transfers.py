"""Blocks on their way beside the steps, in virtual time: between groups, and between a group and its host memory.

Each group has four channels, to and from other groups, to and from its host memory. What uses a channel at the same time
shares it equally; what crosses two channels goes at the pace of the slower share. Imports the messages and kvcache ids.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from kvcache.ids import GroupId
from scheduler.protocol.leaders import Cut, Load, Moved, Movement, Offload, Receive, Send

Channel = tuple[Literal["out", "in", "offload", "load"], GroupId]

HANGS = float("inf")
"""Delay of a transfer whose other side is gone: it goes on for ever, until it is cut."""

DONE_TOKENS = 1e-3
"""What may be left of a transfer that is over, by rounding."""


@dataclass(frozen=True, slots=True)
class LinkModel:
    """Of each group, all its ranks together, per direction. latency_s: before the first token of any transfer.

    The defaults are one 200 Gb/s network card and one PCIe 5 link for every rank of four, with the KV of a dense 70B model
    (80 layers, 8 KV heads of 128, bf16: 320 KiB a token), both taken at a third of what the hardware promises.
    """

    fetch_tokens_per_s: float = 100_000.0
    host_tokens_per_s: float = 250_000.0
    latency_s: float = 0.002
    token_bytes: int = 327_680

    def __post_init__(self) -> None:
        if not (min(self.fetch_tokens_per_s, self.host_tokens_per_s) > 0 and self.latency_s >= 0 and self.token_bytes > 0):
            raise ValueError(f"{self}: rates and sizes must be above 0, and the latency not below")


@dataclass(slots=True)
class Flow:
    """One transfer under way. left: tokens. delay_s: of its latency, what is left. ends: who is told that it is over."""

    transfer: int
    tokens: int
    left: float
    delay_s: float
    began_s: float
    channels: tuple[Channel, ...]
    ends: tuple[GroupId, ...]
    rate: float = 0.0


class SimulatedTransfers:
    """Of one engine. A `Send` and its `Receive` start when both groups have come to them in their logs.

    Told what time it is by every call, in order. `finished` collects answers, `next_s` says when the next one is due.
    """

    def __init__(self, links: LinkModel, block_size: int, narrow_share: float = 0.0) -> None:
        """narrow_share: the part of a token's KV that narrow layers have in blocks of their own."""
        self._links = links
        self._narrow_share = narrow_share
        self._block_size = block_size
        self._now_s = 0.0
        self._flows: dict[int, Flow] = {}
        self._halves: dict[int, tuple[GroupId, Send | Receive]] = {}  # the other group has not come to it yet
        self._epochs: dict[GroupId, int] = {}
        self._moved: list[tuple[GroupId, Moved]] = []
        self.tokens: Counter[str] = Counter()  # that have arrived, by kind

    def group_up(self, group: GroupId, epoch: int) -> None:
        self._epochs[group] = epoch

    def group_down(self, group: GroupId, now_s: float) -> None:
        """Its side of everything is gone. The other side hangs until it is told by `Cut`."""
        self._advance(now_s)
        del self._epochs[group]
        for flow in [flow for flow in self._flows.values() if group in flow.ends]:
            flow.ends = tuple(end for end in flow.ends if end != group)
            if flow.ends:
                flow.delay_s = HANGS
            else:
                del self._flows[flow.transfer]
        self._halves = {number: half for number, half in self._halves.items() if half[0] != group}
        self._share()

    def begin(self, group: GroupId, movement: Movement, now_s: float) -> None:
        """The group has come to this command of its log."""
        self._advance(now_s)
        if isinstance(movement, Cut):
            self._cut(group, movement)
        elif isinstance(movement, Offload | Load):
            kind: Literal["offload", "load"] = "offload" if isinstance(movement, Offload) else "load"
            self._start(movement, ((kind, group),), (group,))
        elif (other := self._halves.pop(movement.transfer, None)) is None:
            self._halves[movement.transfer] = (group, movement)
        else:
            sender, receiver = (group, other[0]) if isinstance(movement, Send) else (other[0], group)
            self._start(movement, (("out", sender), ("in", receiver)), (sender, receiver))
        self._share()

    def finished(self, now_s: float) -> list[tuple[GroupId, Moved]]:
        """Answers that are due by now, each handed out once."""
        self._advance(now_s)
        over = [flow for flow in self._flows.values() if flow.delay_s <= 0 and flow.left <= DONE_TOKENS]
        for flow in over:
            del self._flows[flow.transfer]
            self.tokens[flow.channels[-1][0]] += flow.tokens
            for end in flow.ends:
                self._answer(end, flow.transfer, flow, ok=True)
        if over:
            self._share()
        moved, self._moved = self._moved, []
        return moved

    @property
    def next_s(self) -> float | None:
        """When something will be finished, if nothing else begins; None: nothing is under way that can end."""
        if self._moved:
            return self._now_s
        ends_s = [each.delay_s + max(0.0, each.left) / each.rate for each in self._flows.values() if each.delay_s < HANGS]
        return self._now_s + min(ends_s) if ends_s else None

    # ---- the parts

    def _start(
        self, movement: Send | Receive | Offload | Load, channels: tuple[Channel, ...], ends: tuple[GroupId, ...]
    ) -> None:  # fmt: skip
        tokens = len(movement.blocks) // 4 * self._block_size
        left = tokens * (self._narrow_share if movement.narrow else 1 - self._narrow_share)
        told, number = 0 if movement.narrow else tokens, movement.transfer  # they are those of the other layers
        self._flows[number] = Flow(number, told, left, self._links.latency_s, self._now_s, channels, ends)

    def _cut(self, group: GroupId, cut: Cut) -> None:
        """What this group has under way with that epoch of the other fails."""
        for number, (owner, half) in list(self._halves.items()):
            if owner == group and (half.group, half.epoch) == (cut.group, cut.epoch):
                del self._halves[number]
                self._answer(group, number, None, ok=False)
        for flow in [flow for flow in self._flows.values() if flow.ends == (group,) and flow.delay_s == HANGS]:
            if GroupId(cut.group) in {end for _, end in flow.channels}:
                del self._flows[flow.transfer]
                self._answer(group, flow.transfer, flow, ok=False)

    def _answer(self, group: GroupId, transfer: int, flow: Flow | None, *, ok: bool) -> None:
        elapsed_s = self._now_s - flow.began_s if flow is not None else 0.0
        size = flow.tokens * self._links.token_bytes if flow is not None and ok else 0
        message = "" if ok else "the other group has gone"
        self._moved.append((group, Moved(self._epochs[group], transfer, ok, elapsed_s, size, message)))

    def _advance(self, now_s: float) -> None:
        elapsed_s, self._now_s = now_s - self._now_s, now_s
        for flow in self._flows.values():
            flow.delay_s -= elapsed_s
            if flow.delay_s < 0:
                flow.left += flow.delay_s * flow.rate
                flow.delay_s = 0.0

    def _share(self) -> None:
        """Divides every channel among those that use it now."""
        users = Counter(channel for flow in self._flows.values() if flow.delay_s < HANGS for channel in flow.channels)
        for flow in self._flows.values():
            flow.rate = min(self._bandwidth(channel) / max(1, users[channel]) for channel in flow.channels)

    def _bandwidth(self, channel: Channel) -> float:
        return self._links.host_tokens_per_s if channel[0] in ("offload", "load") else self._links.fetch_tokens_per_s
