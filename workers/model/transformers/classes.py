"""transformers' class of a decoder on the meta device: all of a model but its numbers. Imports torch and transformers."""

import copy
import threading
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from workers.model.config.fields import CheckpointError
from workers.model.transformers.attention import NAME
from workers.model.transformers.compared import WORKS

BUILDING = threading.Lock()
"""transformers sets torch's default dtype and patches its initialisers while it builds: of a process's ranks one at a time."""


def build(text: Any) -> Any:
    """The model of that configuration, in float32, for inference. Errors: CheckpointError for a class that is not served."""
    found = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text.model_type])
    _refuse(found, text)
    try:
        with BUILDING, torch.device("meta"):
            return found._from_config(copy.deepcopy(text), dtype=torch.float32, attn_implementation=NAME).eval()
    except Exception as error:  # whatever a class of somebody else's may raise for fields that do not fit each other
        raise CheckpointError(
            f"{found.__name__} cannot be made of this config.json ({type(error).__name__}: {error}): it is damaged, or of "
            f"another version than transformers {transformers.__version__} knows"
        ) from error


def _refuse(found: Any, text: Any) -> None:
    """What can be said of a class before it is built."""
    if not isinstance(text, found.config_class) and text.sub_configs:  # some families have a name for another's class
        raise CheckpointError(f"{found.__name__} is not a model of text alone: {WORKS}")
    if found._is_stateful:
        raise CheckpointError(f"{found.__name__} has recurrent layers, whose state is in no KV cache: {WORKS}")
    if not found._supports_attention_backend:
        raise CheckpointError(f"{found.__name__} has an attention of its own, which cannot be replaced: {WORKS}")
