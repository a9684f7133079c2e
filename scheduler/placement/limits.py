"""What can be served at all. Pure arithmetic on lengths and blocks.

Imports `config`, `messages` and `waiting`.
"""

import math

from scheduler.config.core import QueueBounds
from scheduler.protocol.messages import Failure, Request, context_length
from scheduler.state.queue.waiting import WaitingRoom

LONGEST_RETRY_S = 60.0


class RequestRefused(ValueError):
    """The request is not taken in; the message names the numbers and what to change.

    failure: whether it never can be, or not now; then retry_after_s says when to try again.
    """

    def __init__(self, message: str, failure: Failure = Failure.IMPOSSIBLE, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.failure = failure
        self.retry_after_s = retry_after_s


def retry_after(wait_s: float) -> float:
    """What to tell a client of a wait that may be long, or unknown (0)."""
    return min(max(wait_s, 1.0), LONGEST_RETRY_S)


def blocks_for(tokens: int, block_size: int) -> int:
    return -(-tokens // block_size)


def allowance(
    prompt: int, max_tokens: int | None, max_model_len: int, block_size: int, largest_pool: int | None, lost: str = ""
) -> tuple[int, int]:  # fmt: skip
    """(output tokens that the request may have, blocks for all that it may come to): max_tokens, which may be 0, or all that
    model and pools leave if it names none.

    largest_pool: blocks of the largest pool; 0 if there is none, None if it is not known yet. lost: why the last one went.
    Errors: RequestRefused.
    """
    if prompt < 1:
        raise RequestRefused("the prompt is empty: give it at least one token")
    if largest_pool == 0:
        raise _nobody(lost, 0.0)
    least = 1 if max_tokens is None else max_tokens
    if prompt + least > max_model_len:
        raise RequestRefused(
            f"{context_length(max_model_len)}, and {prompt} prompt tokens with max_tokens={least} are above it: shorten the "
            "prompt, lower max_tokens or raise max_model_len"
        )
    room = max_model_len - prompt
    if largest_pool is not None:
        needed = _needed(prompt, least, block_size)
        if needed > largest_pool:
            most = context_length(largest_pool * block_size + min(least, 1), output=least > 0)
            raise RequestRefused(
                f"{most}, for want of blocks: {prompt} prompt tokens and max_tokens={least} need {needed} blocks of "
                f"{block_size} tokens, but the largest pool has {largest_pool}: shorten the prompt, lower max_tokens or raise "
                "kv_memory"
            )
        room = min(room, largest_pool * block_size + 1 - prompt)
    output = room if max_tokens is None else max_tokens
    return output, _needed(prompt, output, block_size)


def _needed(prompt: int, output: int, block_size: int) -> int:
    """Blocks of the tokens whose KV is written: that of the last token of an output never is."""
    return blocks_for(prompt + max(output - 1, 0), block_size)


def rest_room(bounds: QueueBounds | None, rests_s: float, deadline_s: float | None, lost: str) -> None:
    """May a newcomer wait that only a group can serve which is tried again in `rests_s`? Where the queue has bounds, for as
    long as anybody is told to wait at most; and not where its deadline would come first. Once taken in it waits until that.
    Errors: RequestRefused; when to try again is when the group is tried."""
    patience_s = math.inf if bounds is None else LONGEST_RETRY_S
    if rests_s > min(patience_s, math.inf if deadline_s is None else deadline_s):
        raise _nobody(lost, rests_s)


def queue_room(bounds: QueueBounds | None, waiting: WaitingRoom, request: Request, tokens: int, now_s: float) -> None:
    """May the request, with a prompt of so many tokens, wait behind others? An empty queue takes anything.

    A full queue still takes a tenant that has less than an equal share of it waiting, up to twice its bounds, so that nobody
    can fill it for all. And none takes a request that its deadline would meet in the queue, as far as one can tell.
    Errors: RequestRefused; when to try again is when the tenant's turn would come, at the pace of lately.
    """
    deadline_s, choices = request.deadline_s, request.params.n
    per_s = waiting.pace.per_s(now_s)
    if deadline_s is not None and per_s is not None and waiting.tokens > per_s * deadline_s:  # else nobody waits that long
        wait_s = _wait_s(waiting, request, now_s)
        if wait_s > deadline_s:
            raise _refusal(f"its turn would come in about {wait_s:.0f} s, after its deadline of {deadline_s:g} s", wait_s)
    if bounds is None:
        return
    kinds = (
        ("requests", bounds.max_queued_requests, waiting.count, choices, 0),
        ("tokens", bounds.max_queued_tokens, waiting.tokens, choices * tokens, 1),
    )
    for name, most, there, more, kind in kinds:
        if there + more <= most:
            continue
        own = waiting.fair.waiting(request.tenant)
        share = most / (waiting.fair.tenants + (own[0] == 0))
        if there + more > 2 * most or own[kind] + more > share:
            raise _refusal(
                f"{waiting.count} requests with {waiting.tokens} tokens are waiting and {most} {name} may",
                _wait_s(waiting, request, now_s),
            )


def _wait_s(waiting: WaitingRoom, request: Request, now_s: float) -> float:
    """Until another request like this one would start, at the pace of lately; 0 if nothing is known of that."""
    per_s = waiting.pace.per_s(now_s)
    if per_s is None:
        return 0.0
    return waiting.fair.ahead(request.tenant, request.priority) / per_s if per_s else math.inf


def _nobody(lost: str, rests_s: float) -> RequestRefused:
    because, retry_after_s = f" ({lost})" if lost else "", retry_after(rests_s)
    message = f"no group of workers is up or expected{because}: try again in {retry_after_s:.0f} s"
    return RequestRefused(message, Failure.UNAVAILABLE, retry_after_s)


def _refusal(why: str, wait_s: float) -> RequestRefused:
    retry_after_s = retry_after(wait_s)
    return RequestRefused(f"{why}: try again in {retry_after_s:.0f} s", Failure.OVERLOADED, retry_after_s)
