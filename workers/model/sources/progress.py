"""How far something long is, in bytes, and now and then in words. Imports nothing of Manta."""

import time
from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called as (done_bytes, total_bytes) while a checkpoint is downloaded, or read: then bytes of this rank's share."""

DOWNLOADING = "downloading"
"""What a group's start is in then (`scheduler.server.stats.GroupStart`)."""

SAY_S = 5.0
GB = 1e9


def in_words(say: Callable[[str], None], what: str, every_s: float = SAY_S) -> Progress:
    """Says what is done, with its bar: once the total is known, then every so many seconds, and at the end."""
    due_s, last = 0.0, -1

    def tell(done: int, total: int) -> None:
        nonlocal due_s, last
        if total > 0 and done != last and (time.monotonic() >= due_s or done >= total):
            due_s, last = time.monotonic() + every_s, done
            say(f"{what} {bar(done, total)} {done / GB:,.2f} of {total / GB:,.2f} GB")

    return tell


def bar(done: int, total: int, width: int = 24) -> str:
    filled = width * min(done, total) // max(1, total)
    return "━" * filled + "╌" * (width - filled)
