"""The builder's arguments, from every form that Ray Serve LLM takes them in, down to an application that Serve would run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from ray.serve._private.build_app import build_app

from deploy.config.load import EMBEDDED_MODEL, KEYS_VARIABLE, ConfigError
from deploy.ray_serve_llm.builder import read_args
from manta.serve.llm import LLMConfig, LLMServingArgs, ModelLoadingConfig, build_further_model, build_openai_app
from tests.shared.hub import put_into_cache
from tests.shared.sources import parsed
from workers.model.config.fields import CheckpointError

TINY = str(EMBEDDED_MODEL)
HOST = "127.0.0.1"
MODEL: dict[str, Any] = {
    "model_loading_config": {"model_id": "tiny", "model_source": TINY},
    "accelerator_config": {"kind": "cpu"},
    "engine_kwargs": {"max_model_len": 512, "gpu_memory_utilization": 0.5},
}
YAML = f"""
model_loading_config:
  model_id: tiny
  model_source: {TINY}
accelerator_config:
  kind: cpu
engine_kwargs:
  max_model_len: 512
  gpu_memory_utilization: 0.5
"""
ENGINE = {"model": TINY, "device": "cpu", "max_model_len": 512, "gpu_memory_fraction": 0.5, "max_groups": 1}
SERVE = {"served_model_name": "tiny", "host": HOST}


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "tiny.yaml").write_text(YAML)
    return str(tmp_path / "tiny.yaml")


def test_every_form_says_the_same(file: str) -> None:
    record = LLMConfig(**(MODEL | {"model_loading_config": ModelLoadingConfig(model_id="tiny", model_source=TINY)}))
    for given in (MODEL, LLMConfig(**MODEL), record, file, LLMConfig.from_file(file)):
        for args in ({"llm_configs": [given]}, LLMServingArgs(llm_configs=[given])):
            assert read_args(args, HOST) == {"engine": ENGINE, "serve": SERVE}


def test_serve_runs_what_is_built() -> None:
    built = build_app(build_openai_app({"llm_configs": [MODEL]}), name="llm_app")
    ingress, engine = (next(each for each in built.deployments if each.name == name) for name in ("Ingress", "Engine"))
    assert engine.init_args[0].max_model_len == 512
    assert ingress.init_args[2].served_model_name == "tiny"


def test_a_model_beside_the_first_is_an_engine_alone() -> None:
    (engine,) = build_app(build_further_model({"llm_configs": [MODEL]}), name="llm_app:tiny").deployments
    assert (engine.name, engine.init_args[0].max_model_len, engine.init_args[1].served_model_name) == ("Engine", 512, "tiny")
    with pytest.raises(ConfigError, match=r"unknown key 'serve.replicas'"):
        build_further_model({"llm_configs": [MODEL], "ingress_deployment_config": {"num_replicas": 2}})


@pytest.mark.parametrize(
    ("args", "serve"),
    [
        ({"ingress_deployment_config": {"num_replicas": 3}}, {"replicas": 3}),
        ({"ingress_deployment_config": {"autoscaling_config": {"min_replicas": 2, "max_replicas": 2}}}, {"replicas": 2}),
        ({"ingress_deployment_config": {"max_queued_requests": 9, "max_ongoing_requests": 4}}, {"max_queued_requests": 9}),
        ({"ingress_deployment_config": {"request_router_config": {}, "graceful_shutdown_timeout_s": 9}}, {}),
        ({"ingress_cls_config": {"ingress_extra_kwargs": {}}}, {}),
        ({"serve": {"miss_reasons": True}}, {"miss_reasons": True}),
        ({"serve": {"host": "127.0.0.9"}}, {"host": "127.0.0.9"}),
    ],
)
def test_what_belongs_to_the_front_ends(args: dict[str, Any], serve: dict[str, Any]) -> None:
    assert read_args({"llm_configs": [MODEL]} | args, HOST)["serve"] == SERVE | serve


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"llm_configs": []}, "write a list with the configuration of a model"),
        ({}, "write a list with the configuration of a model"),
        ({"llm_configs": MODEL}, "write a list with the configuration of a model"),
        ({"llm_configs": [MODEL, MODEL]}, r"2 models \(tiny, tiny\), .* one here: .*:build_further_model"),
        ({"llm_configs": ["/nowhere.yaml"]}, r"cannot read the configuration file /nowhere\.yaml"),
        ({"llm_configs": [MODEL | {"llm_engine": "SGLang"}]}, r"llm_configs\[0\]\.llm_engine='SGLang'"),
        ({"llm_configs": [MODEL], "ingres_cls_config": {}}, "ingres_cls_config is unknown: did you mean 'ingress_cls_config'"),
        ({"llm_configs": [MODEL], "ingress_cls_config": {"ingress_cls": "a:B"}}, "ingress_cls='a:B': the doors are Manta's"),
        (
            {"llm_configs": [MODEL], "ingress_deployment_config": {"autoscaling_config": {"max_replicas": 2}}},
            "does not follow the load: say num_replicas",
        ),
        ({"llm_configs": [MODEL], "ingress_deployment_config": {"autoscaling_config": {"min_replica": 2}}}, "min_replicas"),
        ({"llm_configs": [MODEL], "ingress_deployment_config": {"ray_actor_options": {"num_cpus": 2}}}, "below `deployments:`"),
        ({"llm_configs": [MODEL], "serve": {"miss_reason": True}}, "did you mean 'serve.miss_reasons'"),
        ({"llm_configs": [MODEL], "ingress_deployment_config": {"num_replicas": 0}}, r"num_replicas: replicas=0 is below 1"),
    ],
)
def test_what_is_refused_by_name(args: Mapping[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_args(args, HOST)


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    file = tmp_path / "model.yaml"
    for text, words in (("a: [", "is not valid YAML"), ("- a", "holds a list"), ("engine: {}", r"model\.yaml\.model_loading")):
        file.write_text(text)
        with pytest.raises(ConfigError, match=words):
            read_args({"llm_configs": [str(file)]}, HOST)


def test_beyond_loopback_it_needs_keys_as_any_endpoint_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)
    monkeypatch.setattr("deploy.ray_serve_llm.builder._listens_at", lambda: "0.0.0.0")
    with pytest.raises(ConfigError, match=r"host=0\.0\.0\.0 can be reached from other machines"):
        build_openai_app({"llm_configs": [MODEL]})
    build_openai_app({"llm_configs": [MODEL], "serve": {"auth": False}})
    monkeypatch.setenv(KEYS_VARIABLE, "a-key")
    build_openai_app({"llm_configs": [MODEL]})


def test_what_changes_nothing_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "deploy.ray_serve_llm")
    read_args({"llm_configs": [MODEL | {"engine_kwargs": {"trust_remote_code": True}}]}, HOST)
    assert "it changes nothing: llm_configs[0].engine_kwargs.trust_remote_code: no code" in caplog.text


def test_an_id_is_what_it_is_when_the_application_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    args = {"llm_configs": [MODEL | {"model_loading_config": {"model_id": "my-qwen", "model_source": "Qwen/Qwen3-8B"}}]}
    tree = read_args(args, HOST)
    assert tree["engine"]["model"] == "Qwen/Qwen3-8B"
    assert tree["serve"]["served_model_name"] == "my-qwen"
    with pytest.raises(CheckpointError, match=r"model='Qwen/Qwen3-8B' is no folder .* `hf download Qwen/Qwen3-8B`"):
        build_openai_app(args)
    put_into_cache(tmp_path, "Qwen/Qwen3-8B", {"config.json": b"{}"})
    engine = build_openai_app(args)._bound_deployment.init_args[1]
    assert (engine.model, engine.revision) == ("Qwen/Qwen3-8B", "c" * 40)


def test_a_bucket_is_named_by_its_url() -> None:
    for source in ("s3://bucket/qwen", {"bucket_uri": "s3://bucket/qwen"}):
        args = {"llm_configs": [MODEL | {"model_loading_config": {"model_id": "qwen", "model_source": source}}]}
        assert read_args(args, HOST)["engine"]["model"] == "s3://bucket/qwen"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("build_pd_openai_app", "every group computes prompts and outputs"),
        ("build_dp_openai_app", "num_replicas"),
        ("build_dp_deployment", "num_replicas"),
        ("build_llm_deployment", "use build_openai_app"),
        ("LLMServer", "use build_openai_app"),
        ("LoraConfig", "name adapters in engine_kwargs"),
        ("CloudMirrorConfig", "as model_source"),
    ],
)
def test_what_rays_module_has_besides(name: str, words: str) -> None:
    with pytest.raises(ImportError, match=f"cannot import '{name}' .*{words}"):
        exec(f"from manta.serve.llm import {name}")


def test_rays_module_has_no_name_that_is_neither_here_nor_refused() -> None:
    import ast

    import ray.serve

    import manta.serve.llm as ours

    source = Path(ray.serve.__file__).parent / "llm" / "__init__.py"  # cannot be imported without vLLM
    (exported,) = (
        ast.literal_eval(node.value)
        for node in parsed(source).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__"
    )
    assert {*exported, "build_further_model"} == {*ours.__all__, *ours.NOT_HERE}
    with pytest.raises(ImportError, match="cannot import name 'frobnicate'"):
        exec("from manta.serve.llm import frobnicate")
