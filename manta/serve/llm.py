"""In the place of `ray.serve.llm`: the same names for the same shape, with Manta behind them.

    from manta.serve.llm import LLMConfig, build_openai_app      # was: from ray.serve.llm import ...
    import_path: manta.serve.llm:build_openai_app                # in a Serve configuration

Imports ray.
"""

from typing import Any

from deploy.ray_serve_llm.builder import LLMServingArgs, build_further_model, build_openai_app
from deploy.ray_serve_llm.llm_config import LLMConfig, ModelLoadingConfig

__all__ = ["LLMConfig", "LLMServingArgs", "ModelLoadingConfig", "build_further_model", "build_openai_app"]

ALONE = "the deployments of an application belong together: use build_openai_app"
ALIKE = "every group computes prompts and outputs, and fetches prefixes from the others by itself: use build_openai_app"
EACH = "the experts of a model are sharded within a group, and each replica is a group: use build_openai_app with num_replicas"
NOT_HERE = {
    "build_llm_deployment": ALONE,
    "LLMServer": ALONE,
    "build_pd_openai_app": ALIKE,
    "build_dp_deployment": EACH,
    "build_dp_openai_app": EACH,
    "LoraConfig": "name adapters in engine_kwargs.lora: {NAME: FOLDER}",
    "CloudMirrorConfig": "say the URL of the bucket itself, as model_source",
}
"""What `ray.serve.llm` has besides, and what to do instead."""


def __getattr__(name: str) -> Any:
    """Errors: ImportError for what Manta does not have, with the way to go."""
    if name in NOT_HERE:
        raise ImportError(f"cannot import {name!r} from {__name__!r}: {NOT_HERE[name]}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
