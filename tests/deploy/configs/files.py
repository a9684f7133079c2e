"""What the tests of `deploy/configs/` share: reading the files, strict parsing, and how many groups a node has room for."""

import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from cluster.config import EngineConfig
from cluster.group import rank_resources
from cluster.worker_config import resolve
from deploy.config import EMBEDDED_MODEL, endpoint_config

REPOSITORY = Path(__file__).parents[3]
CONFIGS = REPOSITORY / "deploy" / "configs"
PROJECT: dict[str, Any] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
PINS = dict(line.split("==") for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if "==" in line)
SERVE_FILES = ("serve.yaml", "serve-cluster.yaml")
SERVICE_FILES = ("rayservice-gpu.yaml", "rayservice-cpu.yaml")
CLUSTER_FILES = {"raycluster-gpu.yaml": "serve-cluster.yaml", "raycluster-cpu.yaml": "rayservice-cpu.yaml"}
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


def groups_on(resources: Mapping[str, float], engine: EngineConfig) -> int:
    """How many groups find room on a node: all ranks of one, side by side, as `cluster.group` places them."""
    device = engine.device
    assert device in ("cpu", "cuda"), "a cluster's file says where ranks compute: while no GPU node is up, auto means the CPU"
    _, worker = resolve(replace(engine, model=str(EMBEDDED_MODEL)), device, engine.tensor_parallel_size, threads=1)
    per_rank = rank_resources(worker)
    return min(int(resources.get(name, 0) // (each * engine.tensor_parallel_size)) for name, each in per_rank.items())
