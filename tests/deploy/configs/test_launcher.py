"""The cluster launcher's files: Ray's own schema and preparation, room for the groups, secrets on every node."""

from typing import Any

import pytest
from ray.autoscaler._private.util import prepare_config, validate_config

from deploy.config.load import KEYS_VARIABLE
from tests.deploy.configs.files import (
    CONFIGS,
    PROJECT,
    REPOSITORY,
    engine_of,
    front_ends,
    holds_a_group,
    nodes_for_all_groups,
    tree,
)

FILES = ("cluster-aws.yaml", "cluster-onprem.yaml")
SERVES = "serve-cluster.yaml"


def prepared(name: str) -> dict[str, Any]:
    """As `ray up` sees it, with its defaults filled in."""
    config: dict[str, Any] = prepare_config(tree(name))
    validate_config(config)
    return config


@pytest.mark.parametrize("name", FILES)
def test_ray_takes_it(name: str) -> None:
    config = prepared(name)
    for commands in ("setup_commands", "worker_setup_commands"):
        assert config[commands] == [], "Ray's defaults would install another Ray"
    assert config["head_setup_commands"] == tree(name).get("head_setup_commands", [])


def test_pending_groups_bring_gpu_machines_and_the_rest_fits_on_the_head() -> None:
    engine, config = engine_of(SERVES), prepared("cluster-aws.yaml")
    types = config["available_node_types"]
    head, gpu = types["head"]["resources"], types["gpu"]["resources"]
    assert nodes_for_all_groups(types, "head", engine).keys() == {"gpu"}
    assert config["max_workers"] == types["gpu"]["max_workers"]
    assert not holds_a_group(head, engine)
    assert head["front"] >= 1 + front_ends(SERVES)
    assert "front" not in gpu


def test_machines_of_ones_own_stay_up() -> None:
    config = prepared("cluster-onprem.yaml")
    (node,) = config["available_node_types"].values()
    assert node["min_workers"] == node["max_workers"] == len(config["provider"]["worker_ips"])
    assert """--resources='{"front": """ in start_command("cluster-onprem.yaml", "head")


def start_command(name: str, kind: str) -> str:
    """The one that runs `ray start`."""
    (command,) = (each for each in prepared(name)[f"{kind}_start_ray_commands"] if "ray start" in each)
    assert isinstance(command, str)
    return command


@pytest.mark.parametrize("kind", ["head", "worker"])
@pytest.mark.parametrize("name", FILES)
def test_every_node_has_ray_s_token_and_manta_s_keys(name: str, kind: str) -> None:
    command, mounts = start_command(name, kind), prepared(name)["file_mounts"]
    assert "RAY_AUTH_MODE=token" in command
    assert f'{KEYS_VARIABLE}="$(paste -sd, ~/manta-api-keys)"' in command
    assert {"~/.ray/auth_token", "~/manta-api-keys"} <= mounts.keys()


@pytest.mark.parametrize("name", FILES)
def test_the_dashboard_listens_on_loopback(name: str) -> None:
    assert "--dashboard-host=127.0.0.1" in start_command(name, "head")


@pytest.mark.parametrize("name", FILES)
def test_what_is_copied_and_run_exists(name: str) -> None:
    config = prepared(name)
    for source in config["file_mounts"].values():
        assert source.startswith("~/") or (REPOSITORY / source).exists(), source
    image, _, tag = config["docker"]["image"].partition(":")
    version, _, kind = tag.partition("-")
    assert (image, version) == ("manta", PROJECT["version"])
    assert (CONFIGS / f"Dockerfile.{kind}").exists()
