"""`/metrics` as Prometheus reads it: every fact is there, the parts sum up, and the names follow its rules."""

import re
from pathlib import Path

import msgspec
from prometheus_client import Metric as Family
from prometheus_client.parser import text_string_to_metric_families

import deploy
from deploy.observing.metrics import CONTENT_TYPE, render
from deploy.observing.tally import OUTCOMES, REQUEST_METRICS, TTFT, increments
from scheduler.server.stats import ClusterStatus, EngineStats, GroupStats
from scheduler.server.tallies import Tallies
from tests.deploy.frontend.observations import observation

GROUP = GroupStats(
    group=3, up=True, total_blocks=60, free_blocks=10, held_blocks=20, cached_blocks=30, running=41, shared_blocks=42,
    epoch=51, starved=43, draining=True, backlog_tokens=44, evictions=45, steps=46, step_s=47.5, step_tokens=48, lease_waits=49,
    starts=50,
)  # fmt: skip
ENGINE = EngineStats(
    groups=(GROUP, GroupStats(5, False, 60, 0, 0, 0, 0)), waiting=79, preempted=7, waiting_tokens=73, oldest_wait_s=74.5,
    requests=101, prompt_tokens=102, cached_tokens=103, output_tokens=104, preemptions=105, recomputed_tokens=106, finished=107,
    refused=108, started_tokens=103 + 110 + 111 + 112 + 113, miss_inside_block=110, miss_routed=111, miss_evicted=112,
    miss_cold=113, routed_by_prefix=114, routed_by_load=115, waiting_tenants=116, expired=117, skipped=118, aged=119,
    given_up=120,
)  # fmt: skip
READY = ClusterStatus(
    phase="ready", model="/models/tiny", block_size=16, epoch=91, engine=ENGINE, uptime_s=92.5, busy_s=93.5, front_ends=94,
    target_groups=95,
)  # fmt: skip


def families(status: ClusterStatus) -> dict[str, Family]:
    return read_families({"tiny": status})


def read_families(told: dict[str, ClusterStatus]) -> dict[str, Family]:
    return {family.name: family for family in text_string_to_metric_families(render(told).decode())}


def samples(status: ClusterStatus) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """By name and labels, but for that of the one model."""
    every = [sample for family in families(status).values() for sample in family.samples]
    assert {sample.labels.pop("model") for sample in every} == {"tiny"}
    read = {(sample.name, tuple(sorted(sample.labels.items()))): sample.value for sample in every}
    assert len(read) == len(every), "no sample comes twice"
    return read


def test_every_number_that_the_scheduler_tells_is_shown() -> None:
    shown = set(samples(READY).values())
    elsewhere = {"waiting", "total_blocks", "group", "block_size", "tokens_per_s"}  # as parts, labels, or rates of counters
    for facts in (GROUP, ENGINE, READY):
        for name, value in msgspec.structs.asdict(facts).items():
            if isinstance(value, int | float) and name not in elsewhere:
                assert value in shown, f"{name}={value} is not shown"


def test_parts_sum_up_to_their_whole() -> None:
    shown = samples(READY)

    def total(name: str, **labels: str) -> float:
        return sum(value for (each, of), value in shown.items() if each == name and labels.items() <= dict(of).items())

    hits, misses = total("manta_prefix_cache_hit_tokens_total"), total("manta_prefix_cache_miss_tokens_total")
    assert hits + misses == total("manta_prefix_cache_queried_tokens_total") == ENGINE.started_tokens
    assert total("manta_sequences_waiting") == ENGINE.waiting
    assert total("manta_kv_blocks", group="3") == GROUP.total_blocks
    assert total("manta_groups_up") == 1
    assert shown["manta_group_up", (("group", "5"),)] == 0


def test_requests_of_all_front_ends_are_shown_as_cumulative_histograms() -> None:
    sums = Tallies()
    for ttft_s in (0.0005, 0.5, 0.5, 10_000.0):
        sums.add(increments(observation(ttft_s=ttft_s)))
    sums.add(increments(observation(outcome="timed_out", ttft_s=None)))
    shown = samples(msgspec.structs.replace(READY, tallies=sums.snapshot()))
    bucket = TTFT.name + "_bucket"
    below = [shown[bucket, (("le", bound),)] for bound in ("0.001", "0.3", "0.5", "700", "+Inf")]
    assert below == [1, 1, 3, 3, 4]
    assert shown[TTFT.name + "_count", ()] == 4
    assert shown[TTFT.name + "_sum", ()] == 10_001.0005
    outcomes = {dict(labels)["outcome"]: count for (name, labels), count in shown.items() if name == "manta_requests_total"}
    assert outcomes == dict.fromkeys(OUTCOMES, 0) | {"stop": 4, "timed_out": 1}


def test_all_metrics_are_there_before_anything_happened() -> None:
    """So that the first event is seen as an increase, and dashboards know every name."""
    idle = ClusterStatus(phase="ready", engine=EngineStats(groups=(GroupStats(0, True, 1, 1, 0, 0, 0),)))
    assert {name for name, _ in samples(idle)} == {name for name, _ in samples(READY)}
    assert {metric.name.removesuffix("_total") for metric in REQUEST_METRICS} <= set(families(idle))


def test_how_evenly_experts_were_wanted_is_shown_of_models_that_have_any() -> None:
    told = msgspec.structs.replace(GROUP, expert_layers=(1, 3), expert_imbalance=(1.25, 2.5))
    shown = samples(msgspec.structs.replace(READY, engine=msgspec.structs.replace(ENGINE, groups=(told,))))
    found = {labels: value for (name, labels), value in shown.items() if name == "manta_expert_imbalance"}
    assert found == {(("group", "3"), ("layer", "1")): 1.25, (("group", "3"), ("layer", "3")): 2.5}
    assert not [name for name, _ in samples(READY) if name == "manta_expert_imbalance"]


def test_without_a_scheduler_nothing_is_shown_that_would_look_like_a_restart() -> None:
    starting = families(ClusterStatus(phase="starting", model="/models/tiny"))
    assert set(starting) == {"manta_ready", "manta_info"}
    assert starting["manta_ready"].samples[0].value == 0


def test_each_model_has_its_own_samples_below_one_name() -> None:
    other = msgspec.structs.replace(READY, engine=msgspec.structs.replace(ENGINE, waiting_tokens=1, groups=(GROUP,)))
    starting = ClusterStatus(phase="starting")
    shown = read_families({"tiny": READY, "other": other, "third": starting})
    of = {name: [(s.labels["model"], s.value) for s in family.samples] for name, family in shown.items()}
    assert of["manta_waiting_tokens"] == [("tiny", 73), ("other", 1)]
    assert of["manta_ready"] == [("tiny", 1), ("other", 1), ("third", 0)]
    assert of["manta_group_up"] == [("tiny", 1), ("tiny", 0), ("other", 1)]
    buckets = [sample for sample in shown[TTFT.name].samples if sample.labels.get("le") == "+Inf"]
    assert [sample.labels["model"] for sample in buckets] == ["tiny", "other"]


def test_names_follow_the_rules_of_promtool() -> None:
    units = ("_s", "_ms", "_milliseconds", "_mb", "_percent", "_kilobytes")
    for family in families(READY).values():
        counter = family.type == "counter"
        name = family.name + ("_total" if counter else "")
        assert re.fullmatch(r"manta_[a-z0-9_]+", name), f"{name} is not in snake case"
        assert family.documentation.endswith("."), f"{name} has no help"
        assert family.type in ("counter", "gauge", "histogram", "summary"), f"{name} is {family.type}"
        assert counter or not name.endswith(("_total", "_count", "_sum", "_bucket")), f"{name} ends with a reserved suffix"
        assert not family.name.endswith(units), f"{name} is not in a base unit"
        assert family.type not in name, f"{name} names its type"
        for sample in family.samples:
            reserved = {"le"} if family.type == "histogram" else set()
            assert not {"le", "quantile", "job", "instance"} & sample.labels.keys() - reserved
            assert sample.value >= 0 or not counter


def test_each_metric_has_its_help_and_type_once_and_ahead_of_its_samples() -> None:
    lines = render({"tiny": READY}).decode().splitlines()
    helps = [line.split()[2] for line in lines if line.startswith("# HELP")]
    types = [line.split()[2] for line in lines if line.startswith("# TYPE")]
    assert helps == types
    assert len(set(helps)) == len(helps)
    assert "0.0.4" in CONTENT_TYPE


def test_the_documentation_names_every_metric_and_no_other() -> None:
    text = (Path(deploy.__file__).parent.parent / "docs" / "observability.md").read_text()
    named = set(re.findall(r"`(manta_\w+)", text))
    assert named == {family.name + ("_total" if family.type == "counter" else "") for family in families(READY).values()}
