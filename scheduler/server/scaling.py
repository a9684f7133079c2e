"""How many groups there should be: one decision at a time, over a snapshot. Pure; the time is an argument.

Imports `stats` and `options`. `cluster.fleet.autoscale` asks once a second and carries out what is decided; an added group
starts as a pending placement group, for which Ray's autoscaler brings a node if there is none.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from scheduler.config.options import at_least, option
from scheduler.server.stats import EngineStats, GroupStats

REST_HEADROOM = 2.0
"""A group goes only if the others keep this many times `low_headroom`, so that its going cannot ask for it back."""


@dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    """When groups come and go. A change waits for the last one's `scale_cooldown_s`.

    low_headroom: share of blocks that nobody holds (free or cached); below it for headroom_s, another group is asked for.
    """

    scale_wait_s: float = option(2.0, "Wait of a newcomer, in seconds, beyond which another group is asked for.", at_least(0))
    scale_idle_s: float = option(300.0, "Seconds without work after which a group beyond `groups` goes.", at_least(0))
    scale_cooldown_s: float = option(60.0, "Seconds between two changes of the number of groups.", at_least(0))
    scale_dry_run: bool = option(False, "Log what the autoscaler would do, and why, without doing it.")
    low_headroom: float = 0.1
    headroom_s: float = 30.0


@dataclass(frozen=True, slots=True)
class ScalingDecision:
    """What to do now, and why, in words with the numbers. group: which one to drain."""

    action: Literal["add", "drain", "none"]
    reason: str
    group: int | None = None


@dataclass(frozen=True, slots=True)
class _Moment:
    """What a decision rests on. active: groups that are up and take sequences."""

    now_s: float
    stats: EngineStats
    active: tuple[GroupStats, ...]
    target: int
    starting: int


class Scaler:
    """Remembers since when what has been true. At most one action a call, never below min_groups, which may change meanwhile,
    or above max_groups."""

    def __init__(self, config: ScalingConfig, min_groups: int, max_groups: int) -> None:
        self.config = config
        self.min_groups, self.max_groups = min_groups, max_groups
        self._low_since_s: float | None = None
        self._up_since_s: dict[int, float] = {}
        self._idle_since_s: dict[int, float] = {}
        self._added_s = float("-inf")
        self._drained_s = float("-inf")

    def decide(self, now_s: float, stats: EngineStats, target: int, starting: int) -> ScalingDecision:
        """now_s: by any clock that does not go back. target: groups wanted so far, draining ones left out.

        starting: those of them that are not up yet. An action is taken as carried out; the next `target` should show it.
        """
        active = tuple(group for group in stats.groups if group.up and not group.draining)
        moment = _Moment(now_s, stats, active, target, starting)
        self._watch(moment)
        need = self._need(moment)
        return self._shrink(moment) if need is None else self._grow(moment, need)

    def _watch(self, at: _Moment) -> None:
        self._up_since_s = {group.group: self._up_since_s.get(group.group, at.now_s) for group in at.active}
        idle = (group.group for group in at.active if group.running == 0 and group.backlog_tokens == 0)
        self._idle_since_s = {name: self._idle_since_s.get(name, at.now_s) for name in idle}
        if not at.active or _headroom(at.active) >= self.config.low_headroom:
            self._low_since_s = None
        elif self._low_since_s is None:
            self._low_since_s = at.now_s

    def _need(self, at: _Moment) -> str | None:
        """Why one more group is needed; None if it is not."""
        config, waiting, wait_s = self.config, at.stats.waiting, at.stats.oldest_wait_s
        if at.target < self.min_groups:
            return f"{at.target} groups are below min_groups={self.min_groups}"
        if waiting > self._taken_soon(at) and wait_s > config.scale_wait_s:
            return (
                f"{waiting} sequences wait, the oldest for {wait_s:.1f} s, above scale_wait_s={config.scale_wait_s:g}, and "
                f"{at.starting} groups are starting"
            )
        if self._low_since_s is None or at.starting or at.now_s - self._low_since_s < config.headroom_s:
            return None
        return (
            f"{_headroom(at.active):.1%} of the blocks are free or cached, below low_headroom={config.low_headroom:g} "
            f"for {at.now_s - self._low_since_s:.0f} s (headroom_s={config.headroom_s:g})"
        )

    def _taken_soon(self, at: _Moment) -> float:
        """Sequences that the groups being started will take: each as many as one runs now. Without one, nothing is known."""
        if not at.starting:
            return 0.0
        if not at.active:
            return float("inf")
        return at.starting * max(1.0, sum(group.running for group in at.active) / len(at.active))

    def _grow(self, at: _Moment, need: str) -> ScalingDecision:
        config, since_s = self.config, at.now_s - self._added_s
        if at.target >= self.max_groups:
            return ScalingDecision("none", f"{need}; but max_groups={self.max_groups} is reached")
        if since_s < config.scale_cooldown_s:
            cooldown = f"scale_cooldown_s={config.scale_cooldown_s:g}"
            return ScalingDecision("none", f"{need}; but the last one was added {since_s:.0f} s ago ({cooldown})")
        self._added_s = at.now_s
        self._low_since_s = None
        return ScalingDecision("add", f"{need}; {at.target} groups become {at.target + 1}")

    def _shrink(self, at: _Moment) -> ScalingDecision:
        """The newest of those that are idle, if it has been idle for long: it is what a node was brought for, so that a node
        gets empty. An older one goes only while every newer one works: all that stand idle leave in turn, the newest first."""
        idle = [group for group in at.active if group.group in self._idle_since_s]
        leaving = max(idle, key=lambda group: (self._up_since_s[group.group], group.group), default=None)
        idle_s = at.now_s - self._idle_since_s[leaving.group] if leaving is not None else 0.0
        bound = f"scale_idle_s={self.config.scale_idle_s:g}"
        if leaving is None or idle_s < self.config.scale_idle_s:
            return ScalingDecision("none", f"{at.target} groups suffice, none has been idle for {bound}")
        why = f"group {leaving.group} has been idle for {idle_s:.0f} s ({bound})"
        if (obstacle := self._obstacle(at, leaving)) is not None:
            return ScalingDecision("none", f"{why}; but {obstacle}")
        self._drained_s = at.now_s
        lost = f"{leaving.cached_blocks} cached blocks are lost"
        return ScalingDecision("drain", f"{why}; {lost}, {at.target} groups become {at.target - 1}", leaving.group)

    def _obstacle(self, at: _Moment, leaving: GroupStats) -> str | None:
        """Why an idle group stays; None if it may go."""
        config = self.config
        if min(at.target, len(at.active)) <= self.min_groups:
            return f"{at.target} are wanted, {len(at.active)} are up, and min_groups={self.min_groups}"
        if at.starting or at.stats.waiting:
            return f"{at.starting} groups are starting and {at.stats.waiting} sequences wait"
        since_s = at.now_s - max(self._added_s, self._drained_s)
        if since_s < config.scale_cooldown_s:
            return f"the last change was {since_s:.0f} s ago (scale_cooldown_s={config.scale_cooldown_s:g})"
        rest = _headroom([group for group in at.active if group is not leaving])
        if rest < REST_HEADROOM * config.low_headroom:
            return f"only {rest:.1%} of the other groups' blocks are free or cached (low_headroom={config.low_headroom:g})"
        return None


def _headroom(groups: Sequence[GroupStats]) -> float:
    """Share of blocks that nobody holds."""
    total = sum(group.total_blocks for group in groups)
    return sum(group.free_blocks + group.cached_blocks for group in groups) / total if total else 0.0
