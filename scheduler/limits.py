"""What can be served at all. Pure arithmetic on lengths and pages.

Imports nothing of Manta.
"""


class RequestRefused(ValueError):
    """The request can never be served; the message names the numbers and what to change."""


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
        raise RequestRefused(f"no group of workers is up or expected{because}: start one")
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
