"""Ways in: `LLM` for Python, `manta` for the command line. Importing this package imports neither torch nor ray."""

from deploy.llm import LLM
from deploy.outputs import CompletionOutput, RequestOutput
from scheduler.sampling import SamplingParams

__all__ = ["LLM", "CompletionOutput", "RequestOutput", "SamplingParams"]
