"""The rest of a model's configuration in Ray Serve LLM's shape: what each key becomes, or the words that refuse it; and that
Ray's own records have no field that is not here."""

import ast
import inspect
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import serve
from ray.serve.config import AutoscalingConfig
from ray.util.accelerators import accelerators

from deploy.config.load import ConfigError
from deploy.ray_serve_llm.builder import LLMServingArgs
from deploy.ray_serve_llm.deployment import AUTOSCALING, DEPLOYMENT, INGRESS
from deploy.ray_serve_llm.llm_config import MODEL, LLMConfig, ModelLoadingConfig
from deploy.ray_serve_llm.placement import KINDS
from deploy.ray_serve_llm.reading import Translation
from tests.shared.sources import parsed

FOLDER = "/models/Qwen3-8B"
RAY_LLM = Path(ray.__file__).parent / "llm" / "_internal" / "serve" / "core"
GPU, CPU, TWO_RANKS = {"GPU": 1, "CPU": 1}, {"CPU": 2}, {"tensor_parallel_size": 2}

BECOMES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"device": "cuda", "max_groups": 1}),
    ({"llm_engine": "vLLM"}, {}),
    ({"deployment_config": {"num_replicas": 3}}, {"groups": 3, "max_groups": 3}),
    ({"deployment_config": {"num_replicas": "auto"}}, {"groups": 1, "max_groups": 100}),
    (
        {"deployment_config": {"num_replicas": "auto", "autoscaling_config": {"min_replicas": 2, "max_replicas": 4}}},
        {"groups": 2, "max_groups": 4},
    ),
    (
        {"deployment_config": {"autoscaling_config": {"min_replicas": 1, "max_replicas": 2}}},
        {"groups": 1, "max_groups": 2},
    ),
    ({"deployment_config": {"autoscaling_config": {"max_replicas": 4}}}, {"max_groups": 4}),
    ({"deployment_config": {"autoscaling_config": {"min_replicas": 4}}}, {"groups": 4, "max_groups": 4}),
    (
        {"deployment_config": {"autoscaling_config": {"min_replicas": 2, "initial_replicas": 2, "max_replicas": 2}}},
        {"groups": 2, "max_groups": 2},
    ),
    (
        {"deployment_config": {"autoscaling_config": {"upscale_delay_s": 5, "downscale_delay_s": 600}}},
        {"scale_wait_s": 5, "scale_idle_s": 600},
    ),
    ({"deployment_config": {"graceful_shutdown_timeout_s": 60}}, {"drain_timeout_s": 60}),
    ({"deployment_config": {"max_queued_requests": 100}}, {"max_queued_requests": 100}),
    ({"accelerator_type": "H100"}, {"device": "cuda", "accelerator_type": "H100"}),
    ({"accelerator_type": "A10"}, {"accelerator_type": "A10G"}),
    ({"engine_kwargs": {"device": "auto"}}, {"device": "auto"}),
    ({"engine_kwargs": {"device": "cuda"}, "accelerator_type": "L4"}, {"device": "cuda", "accelerator_type": "L4"}),
    ({"accelerator_config": {"kind": "gpu"}}, {"device": "cuda"}),
    ({"accelerator_config": {"kind": "cpu"}}, {"device": "cpu"}),
    ({"placement_group_config": {"bundle_per_worker": GPU, "strategy": "PACK"}}, {"device": "cuda"}),
    (
        {"placement_group_config": {"bundles": [GPU, GPU]}, "engine_kwargs": TWO_RANKS},
        {"device": "cuda", "tensor_parallel_size": 2},
    ),
    ({"placement_group_config": {"bundle_per_worker": {"GPU": 1, "accelerator_type:L4": 0.001}}}, {"accelerator_type": "L4"}),
    ({"placement_group_config": {"bundle_per_worker": CPU}}, {"device": "cpu", "threads": 2}),
    (
        {"placement_group_config": {"bundles": [CPU, CPU], "strategy": "STRICT_PACK"}, "engine_kwargs": TWO_RANKS},
        {"device": "cpu", "threads": 2},
    ),
    ({"experimental_configs": {"num_ingress_replicas": 4}}, {"replicas": 4}),
    ({"lora_config": None, "server_cls": None, "callback_config": {}, "runtime_env": {"env_vars": None}}, {}),
]

CHANGES_NOTHING: list[tuple[dict[str, Any], str]] = [
    ({"log_engine_metrics": False}, "/metrics"),
    ({"experimental_configs": {"stream_batching_interval_ms": 50}}, "as they come"),
    ({"runtime_env": {"env_vars": {"VLLM_USE_V1": "1"}}}, "nothing here reads VLLM_USE_V1"),
    ({"deployment_config": {"name": "llm"}}, "Engine and Ingress"),
    ({"deployment_config": {"max_ongoing_requests": 64}}, "max_num_seqs"),
    ({"deployment_config": {"max_queued_requests": -1}}, "always bounded"),
    ({"deployment_config": {"health_check_period_s": 10}}, "watched by Manta"),
    ({"deployment_config": {"health_check_timeout_s": 10}}, "watched by Manta"),
    ({"deployment_config": {"graceful_shutdown_wait_loop_s": 10}}, "watched by Manta"),
    ({"deployment_config": {"request_router_config": {"request_router_class": "x"}}}, "its prefix"),
    *(
        ({"deployment_config": {"autoscaling_config": {key: 2}}}, "groups are added when newcomers wait")
        for key in (
            "target_ongoing_requests", "target_num_ongoing_requests_per_replica", "metrics_interval_s", "look_back_period_s",
            "smoothing_factor", "upscale_smoothing_factor", "downscale_smoothing_factor", "upscaling_factor",
            "downscaling_factor", "aggregation_function",
        )
    ),
]  # fmt: skip

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_loading_config": {}}, r"model_loading_config\.model_id is missing"),
    ({"model_loading_config": {"model_id": "m", "model_sorce": "x"}}, "model_sorce is unknown: did you mean 'model_source'"),
    ({"model_loading_config": {"model_id": "m", "model_source": ["s3://b/m"]}}, "name a folder, an id"),
    ({"model_loading_config": {"model_id": "m", "model_source": {"bucket_url": "s3://b/m"}}}, "did you mean 'bucket_uri'"),
    (
        {"model_loading_config": {"model_id": "m", "model_source": {"bucket_uri": "s3://b/m", "extra_files": [{"a": "b"}]}}},
        "below one URL",
    ),
    ({"runtime_env": {"env_vars": {"HF_TOKEN": "secret"}}}, r"env_vars=\['HF_TOKEN'\]: say it as the runtime_env"),
    (
        {"model_loading_config": {"model_id": "m", "model_source": FOLDER, "tokenizer_source": "other"}},
        f"tokenizer_source='other': .* beside the weights, in {FOLDER}",
    ),
    ({"llm_engine": "SGLang"}, "say vLLM, or leave it out"),
    ({"accelerator_type": "TPU-V6E"}, "NVIDIA's GPUs and for CPUs; .* H100"),
    ({"accelerator_type": "AMD-Instinct-MI300X-OAM"}, "NVIDIA's GPUs"),
    ({"accelerator_config": {"kind": "tpu", "topology": "4x4"}}, r"accelerator_config\.kind='tpu'"),
    ({"accelerator_config": {"kind": "cpu"}, "accelerator_type": "L4"}, "accelerator_type=L4 is a kind of GPU"),
    ({"placement_group_config": {}}, "either bundle_per_worker or bundles"),
    ({"placement_group_config": {"bundles": [GPU], "bundle_per_worker": GPU}}, "either bundle_per_worker or bundles"),
    ({"placement_group_config": {"bundles": [GPU], "strategy": "SPREAD"}}, "strategy='SPREAD': a group lies on one node"),
    ({"placement_group_config": {"bundles": [GPU], "strategy": "STRICT_SPREAD"}}, "a group lies on one node"),
    ({"placement_group_config": {"bundles": [GPU, GPU]}}, "tensor_parallel_size=1 has 1, one for each rank"),
    ({"placement_group_config": {"bundle_per_worker": {"GPU": 0.5}}}, r"bundle_per_worker\.GPU=0\.5: a rank has one GPU"),
    ({"placement_group_config": {"bundle_per_worker": {"GPU": 1, "CPU": 8}}}, "takes one CPU beside its GPU"),
    ({"placement_group_config": {"bundles": [{"GPU": 1, "front": 1}]}}, r"bundles\[0\]\.front=1: ranks ask for GPU and CPU"),
    ({"placement_group_config": {"bundles": 2}}, "one for each rank: list them"),
    ({"placement_group_config": {"bundles": [2]}}, r"bundles\[0\] holds a int: write a mapping"),
    ({"placement_group_config": {"bundles": [{"CPU": "two"}]}}, r"bundles\[0\]\.CPU='two': write a number"),
    ({"accelerator_config": "gpu"}, "accelerator_config holds a str: write a mapping"),
    ({"placement_group_config": {"bundles": [{"CPU": 0.5}]}}, "a whole number from 1 up"),
    ({"placement_group_config": {"bundles": [{"CPU": 2}]}, "accelerator_type": "L4"}, r"GPU=0: a rank has one GPU"),
    (
        {"placement_group_config": {"bundles": [GPU]}, "accelerator_config": {"kind": "cpu"}},
        "accelerator_config says kind: cpu",
    ),
    (
        {"placement_group_config": {"bundle_per_worker": {"GPU": 1, "accelerator_type:L4": 0.1}}, "accelerator_type": "H100"},
        "of one kind, and accelerator_type is H100",
    ),
    (
        {"placement_group_config": {"bundle_per_worker": CPU}, "engine_kwargs": {"threads": 4}},
        r"bundle_per_worker\.CPU=2: .*engine_kwargs\.threads says threads=4",
    ),
    ({"placement_group_config": {"bundle_per_worker": CPU}, "engine_kwargs": {"device": "cuda"}}, "device='cuda': leave one"),
    ({"lora_config": {"dynamic_lora_loading_path": "s3://b/l"}}, "name adapters in engine_kwargs"),
    ({"server_cls": "my.Server"}, "the server is Manta's"),
    ({"callback_config": {"callback_class": "my.Callback"}}, "nothing is called while starting"),
    ({"runtime_env": {"pip": ["x"]}}, r"runtime_env\.pip=\['x'\]: say it as the runtime_env of the application"),
    ({"runtime_env": {"env_vars": {"VLLM_USE_V1": "1", "MY": "1"}}}, r"env_vars=\['MY'\]: say it as the runtime_env"),
    ({"experimental_configs": {"num_router_replicas": 2}}, r"ingress_deployment_config\.num_replicas"),
    ({"experimental_configs": {"warp": 9}}, r"experimental_configs\.warp is unknown: leave it out"),
    ({"deployment_config": {"num_replicas": 0}}, r"deployment_config\.num_replicas: groups=0 is below 1"),
    (
        {"deployment_config": {"num_replicas": 2, "autoscaling_config": {"max_replicas": 4}}},
        "num_replicas says how many there are: leave one of them out",
    ),
    ({"deployment_config": {"autoscaling_config": {"min_replicas": 0}}}, "one group always stays: say 1"),
    (
        {"deployment_config": {"autoscaling_config": {"min_replicas": 4, "max_replicas": 2}}},
        r"autoscaling_config\.max_replicas: max_groups=2 is below groups=4",
    ),
    (
        {"deployment_config": {"autoscaling_config": {"min_replicas": 1, "initial_replicas": 2, "max_replicas": 2}}},
        "initial_replicas=2: min_replicas=1 are started",
    ),
    ({"deployment_config": {"autoscaling_config": {"downscale_to_zero_delay_s": 9}}}, "one group always stays"),
    ({"deployment_config": {"autoscaling_config": {"policy": {"policy_function": "a:b"}}}}, "groups are added when"),
    ({"deployment_config": {"autoscaling_config": {"max_replica": 4}}}, "did you mean 'max_replicas'"),
    ({"deployment_config": {"ray_actor_options": {"num_cpus": 2}}}, "below `deployments:` of the application"),
    ({"deployment_config": {"user_config": {"a": 1}}}, "below `deployments:` of the application"),
    ({"deployment_config": {"logging_config": {"encoding": "JSON"}}}, "log_format: json"),
    ({"deployment_config": {"max_replicas_per_node": 1}}, "what fits on a node"),
    ({"deployment_config": {"placement_group_bundles": [GPU]}}, "say placement_group_config"),
    ({"deployment_config": {"placement_group_strategy": "PACK"}}, "say placement_group_config"),
    ({"deployment_config": {"num_replica": 4}}, "did you mean 'num_replicas'"),
    ({"deployment_config": [1]}, "deployment_config holds a list: write a mapping"),
    ({"acelerator_type": "L4"}, "acelerator_type is unknown: did you mean 'accelerator_type'"),
]


def translated(**given: Any) -> Translation:
    return LLMConfig.of("llm", {"model_loading_config": {"model_id": "qwen", "model_source": FOLDER}} | given).translate("llm")


@pytest.mark.parametrize(("given", "becomes"), BECOMES)
def test_what_becomes_a_setting(given: dict[str, Any], becomes: dict[str, Any]) -> None:
    translation = translated(**given)
    settings = translation.engine | translation.serve
    assert becomes.items() <= settings.items()
    assert not translation.idle
    bare = {"model", "served_model_name", "device", "max_groups", "tensor_parallel_size", "groups"}
    assert set(settings) - set(becomes) <= bare, "nothing else"


@pytest.mark.parametrize(("given", "words"), CHANGES_NOTHING)
def test_what_changes_nothing_is_told(given: dict[str, Any], words: str) -> None:
    translation = translated(**given)
    (line,) = translation.idle
    assert words in line
    assert translation.engine | translation.serve == translated().engine | translated().serve


@pytest.mark.parametrize(("given", "words"), REFUSED)
def test_what_is_refused_by_name(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        translated(**given)


def test_the_name_and_the_folder() -> None:
    for loading in ({"model_id": "qwen", "model_source": FOLDER}, ModelLoadingConfig(model_id="qwen", model_source=FOLDER)):
        config = LLMConfig(model_loading_config=loading)
        translation = config.translate("llm")
        assert (config.model_id, translation.model, translation.serve["served_model_name"]) == ("qwen", FOLDER, "qwen")
    only_id = LLMConfig(model_loading_config={"model_id": "Qwen/Qwen3-8B"}).translate("llm")
    assert (only_id.model, only_id.serve["served_model_name"]) == ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B")
    same = {"model_id": "q", "model_source": FOLDER, "tokenizer_source": FOLDER}
    assert translated(model_loading_config=same).model == FOLDER


def test_a_record_is_valid_from_its_birth() -> None:
    with pytest.raises(ConfigError, match=r"LLMConfig\.engine_kwargs\.cpu_offload_gb=8"):
        LLMConfig(model_loading_config={"model_id": "m"}, engine_kwargs={"cpu_offload_gb": 8})
    with pytest.raises(ConfigError, match="model_loading_config is missing"):
        LLMConfig.of("llm", {"accelerator_type": "L4"})


# ---- against the Ray that is installed


def fields_of(file: str, record: str) -> set[str]:
    """Of a pydantic model that cannot be imported without vLLM."""
    tree = parsed(RAY_LLM / file)
    (found,) = (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == record)
    named = {each.target.id for each in found.body if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)}
    return {name for name in named if not name.startswith("_") and name != "model_config"}


def test_ray_has_no_field_that_is_not_here() -> None:
    assert fields_of("configs/llm_config.py", "LLMConfig") == set(MODEL)
    assert fields_of("configs/llm_config.py", "LLMConfig") == set(LLMConfig.__dataclass_fields__)
    assert fields_of("configs/llm_config.py", "ModelLoadingConfig") == set(ModelLoadingConfig.__dataclass_fields__)
    assert fields_of("ingress/builder.py", "LLMServingArgs") == set(LLMServingArgs.__dataclass_fields__) - {"serve"}


def test_ray_has_no_option_of_autoscaling_that_is_not_here() -> None:
    assert set(AutoscalingConfig.model_fields) <= set(AUTOSCALING)


def test_ray_has_no_option_of_deployments_that_is_not_here() -> None:
    said = {"name", "num_replicas", "ray_actor_options", "max_ongoing_requests", "autoscaling_config", "max_queued_requests"}
    said |= {"user_config", "health_check_period_s", "health_check_timeout_s", "graceful_shutdown_wait_loop_s"}
    said |= {"graceful_shutdown_timeout_s", "logging_config", "request_router_config"}  # LLMConfig's own docstring
    assert said <= set(DEPLOYMENT)
    assert said <= set(INGRESS)
    assert said <= set(inspect.signature(serve.deployment).parameters), "Ray has them by these names"


def test_ray_knows_the_kinds_of_gpu() -> None:
    known = {value for name, value in vars(accelerators).items() if isinstance(value, str) and not name.startswith("_")}
    assert {"H100", "A10G", "L4", "A100-80G"} <= set(KINDS) <= known
