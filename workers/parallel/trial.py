"""Whether sums and gathers through joined memory can be relied upon, before anything relies on them.

Imports torch and those kernels.
"""

import threading
from collections.abc import Callable, Sequence

import torch

from workers.kernels.rows.gather import gather
from workers.kernels.rows.peers import Peers
from workers.kernels.rows.reduce import sum_all

TRIED = ((1, 1024), (64, 8192))
"""Rows and widths: sums in one shot and, of more than two ranks, in two."""


def find_fault(
    peers: Peers, device: torch.device, give_up: Callable[[], object], patience_s: float,
    shapes: Sequence[tuple[int, int]] = TRIED,
) -> str:  # fmt: skip
    """Sums and gathers numbers that every rank knows, several times in a row. Empty if all was right to the bit, else what was
    not. All ranks call it at the same time; nobody is waited for any longer than patience_s: then `give_up` is called, from
    another thread, since this one may be waiting for the device in whatever it asks of it."""
    generator = torch.Generator().manual_seed(0)
    wholes = [torch.randint(-16, 17, (peers.size, *shape), generator=generator) for shape in [*shapes, *shapes]]
    parts = [whole[peers.rank].to(device, torch.bfloat16) for whole in wholes]  # all sums are exact
    late = threading.Event()

    def end() -> None:
        late.set()
        give_up()

    timer = threading.Timer(patience_s, end)
    timer.daemon = True
    timer.start()
    gathered = []
    try:
        for part in parts:  # both halves of an inbox
            gathered.append(gather(peers, part))
            sum_all(peers, part)
        came = [(one.cpu().long(), other.cpu().long()) for one, other in zip(gathered, parts, strict=True)]
    finally:
        timer.cancel()
        timer.join()  # so that it gives nothing up any more
    if late.is_set():
        return f"a sum had not ended after {patience_s:.0f} s"
    right = all(
        torch.equal(one, whole) and torch.equal(total, whole.sum(0)) for (one, total), whole in zip(came, wholes, strict=True)
    )
    return "" if right else "numbers that were sent are not those that came"
