"""What can be served at all. Pure arithmetic on lengths and pages.

Imports `config`, `messages` and `waiting`.
"""

from scheduler.config import CoreConfig
from scheduler.messages import Failure
from scheduler.waiting import WaitingRoom

LONGEST_RETRY_S = 60.0


class RequestRefused(ValueError):
    """The request is not taken in; the message names the numbers and what to change.

    failure: whether it never can be, or not now; then retry_after_s says when to try again.
    """

    def __init__(self, message: str, failure: Failure = Failure.IMPOSSIBLE, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.failure = failure
        self.retry_after_s = retry_after_s


def pages_for(tokens: int, page_size: int) -> int:
    return -(-tokens // page_size)


def output_limit(
    prompt: int, max_tokens: int | None, max_model_len: int, page_size: int, largest_pool: int | None, lost: str = ""
) -> int:
    """Output tokens that the request may have: max_tokens, or all that model and pools leave if it names none.

    largest_pool: pages of the largest pool; 0 if there is none, None if it is not known yet. lost: why the last one went.
    The KV of the last token is never written, so prompt + max_tokens - 1 slots are enough.
    Errors: RequestRefused.
    """
    if prompt < 1:
        raise RequestRefused("the prompt is empty: give it at least one token")
    if largest_pool == 0:
        because = f" ({lost})" if lost else ""
        raise RequestRefused(f"no group of workers is up or expected{because}: start one", Failure.UNAVAILABLE)
    least = max_tokens or 1
    if prompt + least > max_model_len:
        raise RequestRefused(
            f"{prompt} prompt tokens and max_tokens={least} are above the length of {max_model_len} tokens that the model "
            "allows: shorten the prompt, lower max_tokens or raise max_model_len"
        )
    room = max_model_len - prompt
    if largest_pool is not None:
        if pages_for(prompt + least - 1, page_size) > largest_pool:
            raise RequestRefused(
                f"{prompt} prompt tokens and max_tokens={least} need {pages_for(prompt + least - 1, page_size)} pages of "
                f"{page_size} tokens, but the largest pool has {largest_pool}: shorten the prompt, lower max_tokens or "
                "raise kv_memory"
            )
        room = min(room, largest_pool * page_size + 1 - prompt)
    return room if max_tokens is None else max_tokens


def queue_room(config: CoreConfig, waiting: WaitingRoom, requests: int, tokens: int, admitted_per_s: float) -> None:
    """May so many more choices, with so many tokens in all, wait? An empty queue takes anything.

    admitted_per_s: tokens that lately left the queue; the wait until it is empty at that pace is when to try again.
    Errors: RequestRefused.
    """
    most_requests, most_tokens = config.max_queued_requests, config.max_queued_tokens
    crowded = most_requests is not None and waiting.count + requests > most_requests
    heavy = most_tokens is not None and waiting.tokens + tokens > most_tokens
    if not waiting.count or not (crowded or heavy):
        return
    retry_after_s = min(max(waiting.tokens / admitted_per_s, 1.0), LONGEST_RETRY_S) if admitted_per_s else 1.0
    bound = f"{most_requests} requests" if crowded else f"{most_tokens} tokens"
    raise RequestRefused(
        f"{waiting.count} requests with {waiting.tokens} tokens are waiting and {bound} may: try again in "
        f"{retry_after_s:.0f} s",
        Failure.OVERLOADED,
        retry_after_s,
    )
