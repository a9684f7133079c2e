"""What the tests of `deploy/configs/` share: reading the files, strict parsing, and which nodes groups bring."""

import tomllib
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from ray.autoscaler._private.node_provider_availability_tracker import NodeAvailabilitySummary
from ray.autoscaler._private.resource_demand_scheduler import (
    _default_utilization_scorer,
    get_nodes_for,
    placement_groups_to_resource_demands,
)
from ray.core.generated.common_pb2 import Bundle, PlacementStrategy
from ray.core.generated.gcs_pb2 import PlacementGroupTableData

from cluster.config import EngineConfig
from cluster.fleet.group import rank_resources
from cluster.resolve import resolve
from deploy.config.load import EMBEDDED_MODEL, endpoint_config

REPOSITORY = Path(__file__).parents[3]
CONFIGS = REPOSITORY / "deploy" / "configs"
PROJECT: dict[str, Any] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
PINS = dict(line.split("==") for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if "==" in line)
SERVE_FILES = ("serve.yaml", "serve-cluster.yaml")
SERVICE_FILES = ("kubernetes/rayservice-gpu.yaml", "kubernetes/rayservice-cpu.yaml")
CLUSTER_FILES = {
    "kubernetes/raycluster-gpu.yaml": "serve-cluster.yaml", "kubernetes/raycluster-cpu.yaml": "kubernetes/rayservice-cpu.yaml",
}  # fmt: skip
"""Which Serve configuration each cluster has to have room for."""

T = TypeVar("T")


def documents(name: str) -> list[dict[str, Any]]:
    return [msgspec.yaml.decode(part) for part in (CONFIGS / name).read_text().split("\n---\n")]


def tree(name: str) -> dict[str, Any]:
    """The first document of a file."""
    return documents(name)[0]


def serve_tree(name: str) -> dict[str, Any]:
    """A Serve configuration: a file's own, or the one that a RayService embeds."""
    found = tree(name)
    embedded: dict[str, Any] = msgspec.yaml.decode(found["spec"]["serveConfigV2"]) if name in SERVICE_FILES else found
    return embedded


def engine_of(name: str) -> EngineConfig:
    """As Manta reads it from a Serve configuration."""
    return endpoint_config(serve_tree(name)["applications"][0]["args"]).engine


def strictly(kind: type[T], value: Any) -> T:
    """Parses, and holds that nothing was unknown: what the parser kept is all that was given."""
    parsed = msgspec.convert(value, kind)
    assert _given(msgspec.to_builtins(parsed)) == value
    return parsed


def _given(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _given(each) for key, each in value.items() if each is not None}
    return [_given(each) for each in value] if isinstance(value, list) else value


def rank_of(engine: EngineConfig) -> dict[str, float]:
    """What one rank asks of its node, as `cluster.fleet.group` says."""
    assert engine.device in ("cpu", "cuda"), "while no GPU node is up, auto would mean the CPU"
    placed = replace(engine, model=str(EMBEDDED_MODEL))  # the file's own is on the cluster
    return rank_resources(placed, resolve(placed, engine.device))


def front_ends(name: str) -> int:
    """How many replicas of the Ingress the application of that file has."""
    deployments = {each["name"]: each for each in serve_tree(name)["applications"][0]["deployments"]}
    return int(deployments["Ingress"]["num_replicas"])


def nodes_for_all_groups(types: dict[str, Any], head: str, engine: EngineConfig) -> dict[str, int]:
    """The nodes that Ray's autoscaler adds to a head for the pending placement groups of `max_groups` groups.

    types: node types, as the autoscaler reads them.
    """
    bundles = [Bundle(unit_resources=rank_of(engine)) for _ in range(engine.tensor_parallel_size)]
    pending = [PlacementGroupTableData(strategy=PlacementStrategy.STRICT_PACK, bundles=bundles)] * (engine.max_groups or 0)
    demands, spread = placement_groups_to_resource_demands(pending)
    scorer = partial(_default_utilization_scorer, node_availability_summary=NodeAvailabilitySummary({}))
    most = sum(node["max_workers"] for node in types.values())
    added, unmet = get_nodes_for(types, {head: 1}, head, most, demands, scorer)
    assert demands
    assert not spread
    assert not unmet, "not every group finds room"
    return dict(added)


def holds_a_group(resources: Mapping[str, float], engine: EngineConfig) -> bool:
    """Whether a node has room for all ranks of a group."""
    return all(resources.get(name, 0) >= each * engine.tensor_parallel_size for name, each in rank_of(engine).items())
