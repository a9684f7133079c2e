"""Group autoscaling: what asks for a group, what lets one go, and that no sequence of snapshots makes it misbehave."""

from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.server.scaling import Scaler, ScalingConfig, ScalingDecision
from scheduler.server.stats import EngineStats, GroupStats
from tests.shared.examples import examples

BLOCKS = 100
CONFIG = ScalingConfig()


def scaler_of(config: ScalingConfig) -> Scaler:
    return Scaler(config, min_groups=1, max_groups=4)


def group(
    name: int, running: int = 0, *, held: int = 0, cached: int = 0, up: bool = True, draining: bool = False
) -> GroupStats:
    free = BLOCKS - held - cached
    return GroupStats(name, up, BLOCKS, free, held, cached, running, draining=draining, backlog_tokens=0)


def stats(*groups: GroupStats, waiting: int = 0, wait_s: float = 0.0) -> EngineStats:
    return EngineStats(groups=groups, waiting=waiting, oldest_wait_s=wait_s)


def last(
    scaler: Scaler, seconds: int, snapshot: EngineStats, target: int, starting: int = 0, start_s: int = 0
) -> ScalingDecision:
    """The same snapshot each second; the decision of the last one. None before it may act."""
    for now_s in range(start_s, start_s + seconds):
        assert scaler.decide(now_s, snapshot, target, starting).action == "none"
    return scaler.decide(start_s + seconds, snapshot, target, starting)


def test_a_newcomer_that_waits_too_long_asks_for_a_group() -> None:
    patient = scaler_of(CONFIG).decide(0, stats(group(0, 8), waiting=3, wait_s=2.0), 1, 0)
    assert patient.action == "none"
    decision = scaler_of(CONFIG).decide(0, stats(group(0, 8), waiting=3, wait_s=2.1), 1, 0)
    assert (decision.action, decision.group) == ("add", None)
    for number in ("3 sequences", "2.1 s", "scale_wait_s=2", "1 groups become 2"):
        assert number in decision.reason


def test_a_group_that_starts_counts_with_what_it_will_take() -> None:
    """One running group holds 8; the one that starts will take about 8 of those that wait."""
    assert scaler_of(CONFIG).decide(0, stats(group(0, 8), waiting=8, wait_s=9), 2, 1).action == "none"
    assert scaler_of(CONFIG).decide(0, stats(group(0, 8), waiting=9, wait_s=9), 2, 1).action == "add"
    cold = stats(group(0, up=False), waiting=99, wait_s=99)
    assert scaler_of(CONFIG).decide(0, cold, 1, 1).action == "none", "nothing is known before the first group is up"


def test_low_headroom_must_last() -> None:
    scaler, low = scaler_of(CONFIG), stats(group(0, 4, held=95, cached=5))
    assert last(scaler, 29, low, 1).action == "none"
    assert scaler.decide(29.5, stats(group(0, 4, held=90, cached=5)), 1, 0).action == "none", "10% is not below 10%"
    decision = last(scaler, 30, low, 1, start_s=40)
    assert decision.action == "add"
    assert "5.0% of the blocks" in decision.reason
    assert "30 s" in decision.reason


def test_the_maximum_and_the_cooldown_are_named() -> None:
    busy = stats(group(0, 8), waiting=50, wait_s=10)
    assert "max_groups=4 is reached" in scaler_of(CONFIG).decide(0, busy, 4, 0).reason
    scaler = scaler_of(CONFIG)
    assert scaler.decide(0, busy, 1, 0).action == "add"
    assert "added 59 s ago (scale_cooldown_s=60)" in scaler.decide(59, busy, 2, 1).reason
    assert scaler.decide(60, busy, 2, 1).action == "add"


def test_below_the_minimum_a_group_is_asked_for_without_any_load() -> None:
    decision = Scaler(CONFIG, 2, 4).decide(0, stats(group(0)), 1, 0)
    assert decision.action == "add"
    assert "min_groups=2" in decision.reason


def test_an_idle_group_drains_after_its_time() -> None:
    decision = last(scaler_of(CONFIG), 300, stats(group(0, 3), group(1)), 2)
    assert (decision.action, decision.group) == ("drain", 1)
    assert "idle for 300 s" in decision.reason


def test_a_step_of_work_starts_the_idle_time_anew() -> None:
    scaler = scaler_of(CONFIG)
    assert last(scaler, 299, stats(group(0, 3), group(1)), 2).action == "none"
    assert scaler.decide(299.5, stats(group(0, 3), group(1, 1)), 2, 0).action == "none"
    assert last(scaler, 300, stats(group(0, 3), group(1)), 2, start_s=300).action == "drain"


@pytest.mark.parametrize(
    ("groups", "leaves"),
    [
        ((group(0), group(1), group(2, cached=90)), 2),
        ((group(0), group(1), group(2, 1)), 1),
    ],
    ids=["the highest number of those that came together", "never a busy one"],
)
def test_which_group_leaves(groups: tuple[GroupStats, ...], leaves: int) -> None:
    assert last(scaler_of(CONFIG), 300, stats(*groups), 3).group == leaves


def test_the_newest_leaves_whatever_its_number() -> None:
    """Group 0 was lost or drained, and came anew."""
    scaler = scaler_of(CONFIG)
    scaler.decide(0, stats(group(0, 3), group(1, 3)), 2, 0)
    scaler.decide(1, stats(group(1, 3)), 1, 0)
    assert last(scaler, 300, stats(group(0), group(1)), 2, start_s=2).group == 0


def test_the_newest_is_waited_for_unless_it_works() -> None:
    """When the load ends, groups run empty one by one: the first to do so is not the one to go."""
    scaler = scaler_of(CONFIG)
    scaler.decide(0, stats(group(0), group(1, 1)), 2, 0)
    assert last(scaler, 300, stats(group(0), group(1)), 2, start_s=9).group == 1
    scaler = scaler_of(CONFIG)
    assert last(scaler, 300, stats(group(0), group(1, 1)), 2).group == 0


@pytest.mark.parametrize(
    ("snapshot", "target", "starting", "word"),
    [
        (stats(group(0)), 1, 0, "min_groups=1"),
        (stats(group(0), group(1, up=False)), 2, 0, "1 are up"),
        (stats(group(0), group(1)), 3, 1, "1 groups are starting"),
        (stats(group(0), group(1), waiting=1), 2, 0, "1 sequences wait"),
        (stats(group(0, 5, held=85), group(1)), 2, 0, "15.0% of the other groups' blocks"),
    ],
    ids=["minimum", "the other is down", "one is starting", "something waits", "the others are nearly full"],
)
def test_what_keeps_an_idle_group(snapshot: EngineStats, target: int, starting: int, word: str) -> None:
    decision = last(scaler_of(CONFIG), 900, snapshot, target, starting)
    assert decision.action == "none"
    assert word in decision.reason


def test_after_any_change_a_drain_waits() -> None:
    scaler = scaler_of(replace(CONFIG, scale_idle_s=10))
    assert scaler.decide(0, stats(group(0, 8), waiting=9, wait_s=9), 1, 0).action == "add"
    calm = stats(group(0, 8), group(1), group(2))
    assert last(scaler, 59, calm, 3, start_s=1).action == "drain"
    assert last(scaler, 59, calm, 3, start_s=61).action == "drain"


# ---- any snapshots at all -------------------------------------------------------------------------------------------------

configs = st.builds(
    lambda idle, cooldown, wait: ScalingConfig(scale_idle_s=idle, scale_cooldown_s=cooldown, scale_wait_s=wait, headroom_s=3),
    st.integers(0, 8),
    st.integers(0, 8),
    st.integers(0, 2),
)
bounds = st.tuples(st.integers(1, 3), st.integers(0, 4)).map(lambda drawn: (drawn[0], sum(drawn)))


@dataclass
class FakeCluster:
    """Carries decisions out: an added group comes up some seconds later, a drained one goes once it runs nothing."""

    config: ScalingConfig
    bounds: tuple[int, int]
    start_s: int = 3
    groups: dict[int, int] = field(default_factory=dict)
    draining: set[int] = field(default_factory=set)
    actions: list[tuple[int, ScalingDecision]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.groups = dict.fromkeys(range(self.bounds[0]), 0)
        self.scaler = Scaler(self.config, *self.bounds)

    def up(self, now_s: int) -> list[int]:
        return [name for name, up_s in self.groups.items() if up_s <= now_s and name not in self.draining]

    @property
    def target(self) -> int:
        return len(self.groups.keys() - self.draining)

    def tick(self, now_s: int, load: dict[int, GroupStats], waiting: int, wait_s: float) -> ScalingDecision:
        """load: what each group that is up reports."""
        shown = [load.get(name, group(name, up=False)) for name in self.groups]
        starting = self.target - len(self.up(now_s))
        decision = self.scaler.decide(now_s, stats(*shown, waiting=waiting, wait_s=wait_s), self.target, starting)
        if decision.action == "add":
            self.groups[max(self.groups) + 1] = now_s + self.start_s
        if decision.action == "drain":
            assert decision.group in self.up(now_s)
            self.draining.add(decision.group)
        if decision.action != "none":
            self.actions.append((now_s, decision))
        for name in [name for name in self.draining if load[name].running == 0]:
            self.draining.remove(name)
            del self.groups[name]
        return decision


@given(configs, bounds, st.data())
@settings(max_examples=examples(40))
def test_bounds_and_cooldowns_hold_whatever_comes(config: ScalingConfig, bounds: tuple[int, int], data: st.DataObject) -> None:
    cluster = FakeCluster(config, bounds)
    idle_since: dict[int, int] = {}
    for now_s in range(data.draw(st.integers(10, 60))):
        load = {}
        for name in [*cluster.up(now_s), *cluster.draining]:
            running = data.draw(st.sampled_from((0, 0, 0, 5)))
            held = data.draw(st.sampled_from((0, 99))) if running else 0
            load[name] = group(name, running, held=held, draining=name in cluster.draining)
        idle_since = {name: idle_since.get(name, now_s) for name, each in load.items() if each.running == 0}
        waiting = data.draw(st.sampled_from((0, 0, 1, 40)))
        decision = cluster.tick(now_s, load, waiting, 5.0 if waiting else 0.0)
        assert bounds[0] <= cluster.target <= bounds[1]
        if decision.group is not None:
            assert now_s - idle_since[decision.group] >= config.scale_idle_s
            assert waiting == 0
    added = [now_s for now_s, decision in cluster.actions if decision.action == "add"]
    assert all(b - a >= config.scale_cooldown_s for a, b in pairwise(added))
    for (before_s, _), (now_s, decision) in pairwise(cluster.actions):
        assert decision.action == "add" or now_s - before_s >= config.scale_cooldown_s


@given(
    load=st.integers(0, 60),
    most=st.integers(1, 6),
    packed=st.booleans(),
    blocks_each=st.sampled_from((1, 8, 10)),
    start_s=st.integers(0, 200),
)
@settings(max_examples=examples(30))
def test_a_constant_load_ends_in_rest(load: int, most: int, packed: bool, blocks_each: int, start_s: int) -> None:
    """A load of so many sequences, 10 to a group, packed or spread: after growing or shrinking once, nothing moves."""
    config = ScalingConfig(scale_idle_s=60, scale_cooldown_s=30)
    cluster = FakeCluster(config, (1, most), start_s)
    waits_since = None
    for now_s in range(3000):
        up = cluster.up(now_s)
        room = 10 * len(up)
        taken = min(load, room)
        share = [min(10, max(0, taken - 10 * i)) if packed else (taken + i) // len(up) for i in range(len(up))]
        shown = {n: group(n, k, held=k * blocks_each) for n, k in zip(up, share, strict=True)}
        waiting = load - taken
        waits_since = None if waiting == 0 else now_s if waits_since is None else waits_since
        cluster.tick(now_s, shown, waiting, 0.0 if waits_since is None else now_s - waits_since)
    turns = [decision.action for _, decision in cluster.actions]
    assert turns == sorted(turns, key=("add", "drain").index), "it never goes back and forth"
    assert all(now_s < 2400 for now_s, _ in cluster.actions), "it comes to rest"
    assert len(cluster.groups) >= min(most, -(-load // 10)), "what the load needs is there"
