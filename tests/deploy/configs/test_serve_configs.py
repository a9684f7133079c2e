"""The Serve configurations: Serve's own schema, with nothing that it would ignore, and Manta's own parser for the arguments."""

from collections.abc import Callable
from typing import Any

import pytest
from ray._common.utils import import_attr
from ray.serve._private.build_app import build_app
from ray.serve.config import gRPCOptions
from ray.serve.schema import ServeDeploySchema

from deploy.app import build as build_endpoint
from deploy.app import build_further
from deploy.config.load import EMBEDDED_MODEL, KEYS_VARIABLE, ConfigError, endpoint_config, load_config, read_api_keys
from deploy.config.serve import ServeConfig
from deploy.doors.grpc.server import SERVICER_FUNCTIONS
from deploy.serving.replicas.engine import further_name
from tests.deploy.configs.files import CONFIGS, REPOSITORY, SERVE_FILES, SERVICE_FILES, serve_tree

FILES = (*SERVE_FILES, *SERVICE_FILES)


def application(name: str) -> dict[str, Any]:
    (found,) = serve_tree(name)["applications"]
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("name", FILES)
def test_serve_takes_all_of_it(name: str) -> None:
    """Serve ignores what it does not know: so what it kept must be what was given."""
    tree = serve_tree(name)
    assert ServeDeploySchema.model_validate(tree).model_dump(mode="json", exclude_unset=True) == tree


@pytest.mark.parametrize("name", FILES)
def test_the_doors_are_those_that_manta_is_told(name: str) -> None:
    tree, serve = serve_tree(name), endpoint_config(application(name)["args"]).serve
    http, grpc = tree["http_options"], tree["grpc_options"]
    assert (serve.host, serve.port) == (http["host"], http["port"])
    assert serve.grpc_port == (grpc["port"] if grpc["grpc_servicer_functions"] else None)


@pytest.mark.parametrize("name", FILES)
def test_only_loopback_goes_without_keys(name: str) -> None:
    tree, serve = serve_tree(name), endpoint_config(application(name)["args"]).serve
    if serve.on_loopback:
        assert read_api_keys(serve, {}) == ()
        assert not tree["grpc_options"]["grpc_servicer_functions"], "Serve binds gRPC to every interface"
    else:
        with pytest.raises(ConfigError, match="MANTA_API_KEYS"):
            read_api_keys(serve, {})


@pytest.mark.parametrize("name", FILES)
def test_the_application_builds_and_has_the_deployments_that_are_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEYS_VARIABLE, "a-key")
    build: Callable[..., Any] = import_attr(application(name)["import_path"])
    built = build_app(build(application(name)["args"]), name="manta")
    named = {deployment["name"] for deployment in application(name).get("deployments", ())}
    assert named in (set(), {deployment.name for deployment in built.deployments})


@pytest.mark.parametrize("name", FILES)
def test_numbers_of_groups_and_front_ends_stand_where_a_change_is_no_outage(name: str) -> None:
    """Serve starts everything anew when `args` have changed, whatever it is."""
    args, deployments = application(name)["args"], {each["name"]: each for each in application(name)["deployments"]}
    assert "groups" not in args["engine"]
    assert "replicas" not in args["serve"]
    assert deployments["Engine"]["user_config"] == {"groups": 1}
    assert deployments["Ingress"]["num_replicas"] >= 1


def test_groups_that_a_change_would_be_an_outage_for_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    build: Callable[..., Any] = import_attr(application("serve.yaml")["import_path"])
    args = application("serve.yaml")["args"]
    build(args)
    assert not caplog.records
    build({**args, "engine": {**args["engine"], "groups": 2}})
    assert "as the Engine's user_config: {groups: N}" in caplog.text


def test_an_idle_engine_logs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Front ends ask it once a second how the cluster is."""
    monkeypatch.setenv(KEYS_VARIABLE, "a-key")
    build: Callable[..., Any] = import_attr(application("serve.yaml")["import_path"])
    built = build_app(build(application("serve.yaml")["args"]), name="manta")
    logging = {deployment.name: deployment._deployment_config.logging_config for deployment in built.deployments}
    assert logging["Engine"]["enable_access_log"] is False


@pytest.mark.parametrize("name", FILES)
def test_serve_can_import_the_grpc_services(name: str) -> None:
    grpc = gRPCOptions(**serve_tree(name)["grpc_options"])
    assert len(grpc.grpc_servicer_func_callable) == len(grpc.grpc_servicer_functions)
    assert tuple(grpc.grpc_servicer_functions) in ((), SERVICER_FUNCTIONS)


def test_the_service_on_gpus_is_the_cluster_configuration() -> None:
    assert serve_tree("kubernetes/rayservice-gpu.yaml") == serve_tree("serve-cluster.yaml")


@pytest.mark.parametrize("name", FILES)
def test_all_have_one_structure(name: str) -> None:
    """What may differ: addresses, the engine and where deployments are placed."""
    model, found = serve_tree("serve.yaml"), serve_tree(name)
    assert found.keys() == model.keys()
    for section in ("http_options", "grpc_options"):
        assert found[section].keys() == model[section].keys()
    same = ("name", "route_prefix", "import_path")
    assert [application(name)[key] for key in same] == [application("serve.yaml")[key] for key in same]
    assert application(name)["args"].keys() == application("serve.yaml")["args"].keys()


def test_several_models_are_an_application_each() -> None:
    tree = serve_tree("serve-models.yaml")
    assert ServeDeploySchema.model_validate(tree).model_dump(mode="json", exclude_unset=True) == tree
    first, *further = tree["applications"]
    assert (first["import_path"], further[0]["import_path"]) == ("deploy.app:build", "deploy.app:build_further")
    assert all(each["name"].startswith(f"{first['name']}:") and each["route_prefix"] is None for each in further)
    for each in tree["applications"]:
        build: Callable[..., Any] = import_attr(each["import_path"])
        built = build_app(build(each["args"]), name=each["name"])
        assert {deployment["name"] for deployment in each["deployments"]} == {each.name for each in built.deployments}


def test_several_models_of_one_command() -> None:
    config = load_config(CONFIGS / "models.yaml", environ={})
    assert [config.serve.served_model_name, *(each.name for each in config.further)] == ["tiny", "tiny-bf16"]
    assert all((REPOSITORY / each.model).is_dir() for each in (config.engine, config.further[0].engine))


def test_serve_has_an_application_for_each() -> None:
    with pytest.raises(ConfigError, match=r"deploy\.app:build_further"):
        build_endpoint({"models": {name: {"model": str(EMBEDDED_MODEL)} for name in ("a", "b")}})
    with pytest.raises(ConfigError, match=r"unknown key 'serve\.port'"):
        build_further({"serve": {"port": 1}})
    with pytest.raises(ConfigError, match="names several"):
        build_further({"models": {name: {"model": str(EMBEDDED_MODEL)} for name in ("a", "b")}})
    for args in ({"engine": {"groups": 2}}, {"models": {"a": {"model": str(EMBEDDED_MODEL)}}}):
        (engine,) = build_app(build_further(args), name="manta:a").deployments
        assert engine.name == "Engine"
        assert engine._deployment_config.graceful_shutdown_timeout_s > ServeConfig().request_timeout_s


def test_an_application_is_called_after_its_endpoint_and_model() -> None:
    assert further_name("manta", "Qwen3-8B") == "manta:Qwen3-8B"
    alike = {further_name("manta", model) for model in ("Org/Qwen3 8B", "Org-Qwen3/8B", "Org-Qwen3-8B")}
    assert len(alike) == 3
    assert all(name.startswith("manta:Org-Qwen3-8B") for name in alike)
    with pytest.raises(ValueError, match="without # and :"):
        ServeConfig(app_name="manta:x")


def test_every_file_is_documented() -> None:
    text = "".join(page.read_text() for page in (REPOSITORY / "docs").glob("*.md"))
    for file in (file for file in CONFIGS.rglob("*") if file.is_file()):
        assert f"deploy/configs/{file.relative_to(CONFIGS)}" in text, file
