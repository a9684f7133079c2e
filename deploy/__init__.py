"""Ways in: `LLM` for Python, `manta` for the command line. Importing this package imports neither torch nor ray."""

from deploy.frontend.outputs import CompletionOutput, RequestOutput
from deploy.llm import LLM
from scheduler.protocol.sampling import SamplingParams

__all__ = ["LLM", "CompletionOutput", "RequestOutput", "SamplingParams"]
