"""Small answers that no sequence stands behind. Imports `messages` and `limits`."""

from scheduler.limits import RequestRefused
from scheduler.messages import Deltas, Finished, FinishReason, Request


def refuse(request: Request, refusal: RequestRefused) -> Deltas:
    """Ends every stream of a request that was never taken in."""
    ends = tuple(
        Finished(
            stream, FinishReason.FAILED, 0, 0, str(refusal), failure=refusal.failure, retry_after_s=refusal.retry_after_s
        )
        for stream in range(request.stream, request.stream + request.params.n)
    )
    return Deltas(b"", b"", ends)
