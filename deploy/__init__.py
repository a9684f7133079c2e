"""Ways in: `LLM` for Python, `manta` for the command line. Importing this package imports neither torch nor ray."""

from deploy.doors.python.llm import LLM
from deploy.frontend.outputs import CompletionOutput, RequestOutput
from scheduler.protocol.sampling import SamplingParams

__all__ = ["LLM", "CompletionOutput", "RequestOutput", "SamplingParams"]
