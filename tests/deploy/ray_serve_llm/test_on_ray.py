"""A Serve configuration that was Ray Serve LLM's, with its import path changed, deployed and asked through OpenAI's client."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import openai
import pytest
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from deploy.config.load import EMBEDDED_MODEL
from deploy.config.serve import ServeConfig
from deploy.ray_serve_llm.builder import _listens_at
from deploy.serving.applications import start_proxies
from manta import LLM, SamplingParams
from tests.deploy.serving.test_live_change import PATIENCE_S, until
from tests.deploy.serving.test_ports import HOST
from tests.shared.ports import free_ports
from tests.shared.processes import WORKER, all_named
from tests.shared.ray_heads import own_ray

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PROMPT = "def add("
CONFIGURATION = f"""
applications:
- name: llm_app
  route_prefix: "/"
  import_path: manta.serve.llm:build_openai_app
  runtime_env:
    env_vars: {{OF_THE_APPLICATION: "1"}}
  args:
    llm_configs:
    - model_loading_config:
        model_id: my-tiny
        model_source: {EMBEDDED_MODEL}
      accelerator_config:
        kind: cpu
      engine_kwargs:
        dtype: float
        tensor_parallel_size: 2
        max_model_len: 512
        kv_cache_memory_bytes: 33554432
        trust_remote_code: true
      deployment_config:
        autoscaling_config:
          min_replicas: 1
          max_replicas: 2
          target_ongoing_requests: 64
        max_ongoing_requests: 128
    ingress_deployment_config:
      num_replicas: 1
"""


@pytest.fixture
def port() -> Iterator[int]:
    """Of a Serve that runs nothing yet."""
    (chosen,) = free_ports(1)
    with own_ray(8):
        try:
            start_proxies(ServeConfig(host=HOST, port=chosen, haproxy=False))
            yield chosen
        finally:
            serve.shutdown()


def deploy(tree: dict[str, Any]) -> None:
    client = _get_global_client()
    assert client is not None
    client.deploy_apps(ServeDeploySchema.model_validate(tree))


def status() -> Any:
    return serve.status().applications["llm_app"]


def test_one_changed_import_path(port: int) -> None:
    assert _listens_at() == HOST
    tree = msgspec.yaml.decode(CONFIGURATION)
    (model,) = tree["applications"][0]["args"]["llm_configs"]

    model["engine_kwargs"]["cpu_offload_gb"] = 8
    deploy(tree)
    until("it is not refused", lambda: status().status == "DEPLOY_FAILED", status)
    assert "llm_configs[0].engine_kwargs.cpu_offload_gb=8" in status().message

    del model["engine_kwargs"]["cpu_offload_gb"]
    deploy(tree)
    until("it does not come up", lambda: status().status == "RUNNING", status)
    client = openai.OpenAI(base_url=f"http://{HOST}:{port}/v1", api_key="fake-key", timeout=PATIENCE_S, max_retries=20)
    assert [each.id for each in client.models.list()] == ["my-tiny"]
    completion = client.completions.create(model="my-tiny", prompt=PROMPT, max_tokens=16, temperature=0)
    assert completion.choices[0].text == computed_here(PROMPT) != ""
    for rank in all_named(WORKER, 2):
        assert b"OF_THE_APPLICATION=1\0" in Path(f"/proc/{rank}/environ").read_bytes(), "runtime_env is for the ranks, too"
    chat = client.chat.completions.create(model="my-tiny", messages=[{"role": "user", "content": "hello"}], max_tokens=4)
    assert chat.usage is not None
    assert chat.usage.completion_tokens > 0


def computed_here(prompt: str) -> str:
    with LLM(local=True, dtype="float32", kv_memory="32MiB", max_model_len=512) as llm:
        (output,) = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=16), progress=False)
    return output.outputs[0].text
