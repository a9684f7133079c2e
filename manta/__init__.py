"""Manta as its users import it: `from manta import LLM, SamplingParams`. Imports neither torch nor ray.

Inside, Manta is six packages of everyday names. Importing this one makes sure that they are Manta's own, whatever lies beside
the script that asks: see `manta.names`.
"""

from manta.names import claim

claim()

from cluster.engine import EngineError  # noqa: E402
from deploy.config.load import ConfigError  # noqa: E402
from deploy.doors.python.llm import LLM  # noqa: E402
from deploy.frontend.errors import Fault  # noqa: E402
from deploy.frontend.outputs import (  # noqa: E402
    CompletionOutput,
    EmbeddingRequestOutput,
    GenerationError,
    RequestOutput,
    ScoringRequestOutput,
)
from deploy.text.content import PromptError  # noqa: E402
from scheduler.protocol.sampling import Grammar, SamplingParams  # noqa: E402

__all__ = [
    "LLM",
    "CompletionOutput",
    "ConfigError",
    "EmbeddingRequestOutput",
    "EngineError",
    "Fault",
    "GenerationError",
    "Grammar",
    "PromptError",
    "RequestOutput",
    "SamplingParams",
    "ScoringRequestOutput",
]
