"""Small answers that no sequence stands behind. Imports `messages`."""

from scheduler.messages import Deltas, Finished, FinishReason, Request


def refuse(request: Request, why: str) -> Deltas:
    """Ends every stream of a request that was never taken in."""
    streams = range(request.stream, request.stream + request.params.n)
    return Deltas(b"", b"", tuple(Finished(stream, FinishReason.FAILED, 0, 0, why) for stream in streams))
