"""Small answers that no sequence stands behind. Imports `messages` and `limits`."""

from scheduler.protocol.messages import Deltas, Finished, FinishReason, Request
from scheduler.queue.limits import RequestRefused


def refuse(request: Request, refusal: RequestRefused) -> Deltas:
    """Ends every stream of a request that was never taken in."""
    ends = tuple(
        Finished(
            stream, FinishReason.FAILED, 0, 0, str(refusal), failure=refusal.failure, retry_after_s=refusal.retry_after_s
        )
        for stream in range(request.stream, request.stream + request.params.n)
    )
    return Deltas(b"", b"", ends)
