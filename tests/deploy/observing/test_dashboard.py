"""The Grafana dashboard asks for what `/metrics` shows, and fits its grid."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

import deploy
from deploy.observing.metrics import render
from scheduler.server.stats import ClusterStatus, EngineStats, GroupStats

DASHBOARD = json.loads((Path(deploy.__file__).parent / "configs" / "grafana-dashboard.json").read_text())
SHOWN: dict[str, set[str]] = {}
for family in text_string_to_metric_families(
    render({"tiny": ClusterStatus(phase="ready", engine=EngineStats(groups=(GroupStats(0, True, 1, 1, 0, 0, 0),)))}).decode()
):
    for sample in family.samples:
        SHOWN.setdefault(sample.name, set()).update(sample.labels)

PANELS: list[dict[str, Any]] = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]]
QUERIES = [variable["definition"] for variable in DASHBOARD["templating"]["list"] if variable["type"] == "query"]


@pytest.mark.parametrize("query", [*dict.fromkeys(EXPRESSIONS), *QUERIES])
def test_a_query_names_metrics_and_labels_that_exist(query: str) -> None:
    names = re.findall(r"manta_\w+", query)
    assert names
    labels = {"job", "group", "model"} if "label_values" in query else {"job"}  # `job` is Prometheus' own
    for name in names:
        assert name in SHOWN, f"{name} is not among the metrics"
        labels |= SHOWN[name]
    grouped = [name.strip() for names in re.findall(r"by \(([^)]*)\)", query) for name in names.split(",")]
    matched = re.findall(r"(\w+)=~?\"", query)
    assert {*grouped, *matched} <= labels
    assert query.count("(") == query.count(")")


def test_every_query_takes_the_maximum_over_replicas() -> None:
    """Each of them shows the whole cluster: the sum over two scraped replicas would count everything twice."""
    for expression in EXPRESSIONS:
        selectors = re.finditer(r"(?:rate\()?manta_\w+\{", expression)
        assert all(re.search(r"max(?: by \([\w, ]+\) )?\($", expression[: found.start()]) for found in selectors), expression


def test_legends_name_labels_that_their_query_keeps() -> None:
    for panel in PANELS:
        for target in panel["targets"]:
            for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
                assert re.search(rf"by \([^)]*\b{label}\b", target["expr"]), f"{panel['title']}: {label}"


def test_every_shown_metric_but_a_few_is_on_the_dashboard() -> None:
    asked = " ".join(EXPRESSIONS)
    missing = {name for name in SHOWN if re.sub(r"_(bucket|sum|count)$", "", name) not in asked}
    assert missing == {
        "manta_info", "manta_group_up", "manta_group_epoch", "manta_sequence_starts_total", "manta_sequences_starved",
        "manta_submitted_requests_total", "manta_sequences_finished_total", "manta_prompt_tokens_total",
        "manta_request_log_dropped_total", "manta_resumed_sequences_total",
    }  # fmt: skip


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, f"{panel['title']} lies on another panel"
        taken |= cells


def test_it_works_with_any_prometheus() -> None:
    sources = [panel["datasource"]["uid"] for panel in PANELS] + [t["datasource"]["uid"] for p in PANELS for t in p["targets"]]
    assert set(sources) == {"${datasource}"}
    assert {variable["name"] for variable in DASHBOARD["templating"]["list"]} == {"datasource", "job", "model", "group"}
    assert DASHBOARD["schemaVersion"] >= 39
