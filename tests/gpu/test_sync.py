"""In the steady state the host waits for nothing that it has launched: torch raises where it would.

What a commit waits for, an event behind a step that was launched a turn ago, is no such wait.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from scheduler.protocol.leaders import Copy
from scheduler.protocol.sampling import SamplingParams
from tests.end_to_end.prompts import draw
from tests.gpu.works import GPU, HOW, constrained, loop, mixture
from tests.workers.stepping import Lease, Stepped, Work

pytestmark = GPU

STEPS = 24


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """A call that would hold up the host raises RuntimeError."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def allocations() -> int:
    """On the device, since the process began."""
    return int(torch.cuda.memory_stats()["allocation.all.allocated"])


def warm(rank: Stepped) -> None:
    """Every kernel of what follows has run: loading one for the first time waits."""
    rank.generate([*mixture(len(HOW), 12), constrained(40)])


def prefilled(rank: Stepped, works: list[Work]) -> list[Lease]:
    """All of them in the batch, decoding; blocks for all that follows."""
    leases = [rank.start(work) for work in works]
    rank.prefill(leases)
    return leases


def steady(rank: Stepped, leases: list[Lease]) -> None:
    """Some steps in which everybody gets a token, nobody waits, and nothing is allocated with graphs."""
    before = [len(lease.tokens) for lease in leases]
    with no_waiting():
        for _ in range(STEPS):
            rank.turn()
    assert [len(lease.tokens) - count for lease, count in zip(leases, before, strict=True)] == [STEPS] * len(leases)


@pytest.mark.parametrize("rows", [1, 3, 9, 16])
def test_any_mixture_of_settings_with_graphs(rank: Stepped, rows: int) -> None:
    warm(rank)
    leases = prefilled(rank, mixture(rows, 2 * STEPS))
    for _ in range(2):
        rank.turn()
    before = allocations()
    steady(rank, leases)
    assert allocations() == before, "a decode step allocates nothing"


def test_any_mixture_of_settings_launch_by_launch(rank: Stepped) -> None:
    with rank.eager():
        warm(rank)
        steady(rank, prefilled(rank, mixture(16, 2 * STEPS)))


def test_prompts_come_and_go_beside_the_decodes(rank: Stepped) -> None:
    warm(rank)
    leases = prefilled(rank, mixture(6, 3 * STEPS))
    before = [len(lease.tokens) for lease in leases]
    come = [Work(work.prompt, work.params, 7) for work in mixture(12, 5, first=20)]
    with no_waiting():
        for number in range(2 * STEPS):
            if number % 4 == 0 and rank.free_rows:
                rank.start(come[number // 4])
            if number % 16 == 9:
                rank.drop(next(lease for lease in rank.leases.values() if lease not in leases))
            rank.turn()
    made = [len(lease.tokens) - count for lease, count in zip(leases, before, strict=True)]
    assert made == [2 * STEPS] * len(leases), "none of the six has sat out"


def test_copies_of_blocks(rank: Stepped) -> None:
    warm(rank)
    leases = prefilled(rank, mixture(4, 2 * STEPS))
    with no_waiting():
        for tokens in (16, 5, 1):
            rank.say(Copy(leases[2].blocks[0], rank.free_blocks[-1], tokens))
            rank.turn()
    rank.run()


def test_log_probabilities_of_prompts_and_tokens(rank: Stepped) -> None:
    params = SamplingParams(temperature=1.0, max_tokens=STEPS, ignore_eos=True, logprobs=3, prompt_logprobs=2)
    works = [Work(draw(40, seed=number), params, number) for number in range(4)]
    warm(rank)
    rank.generate(works)
    plain = prefilled(rank, mixture(3, 2 * STEPS))
    with no_waiting():
        leases = [rank.start(work) for work in works]
        for _ in range(STEPS // 2):
            rank.turn()
    rank.run()
    assert [len(lease.logprobs) for lease in leases] == [STEPS] * 4
    assert [len(lease.tokens) for lease in plain] == [2 * STEPS] * 3


def test_rows_that_follow_a_grammar(rank: Stepped) -> None:
    """The host does wait for their tokens, an event at a time; nothing else may hold it up."""
    warm(rank)
    free = prefilled(rank, mixture(5, 2 * STEPS))
    with no_waiting():
        following = [rank.start(constrained(40, seed=seed, temperature=1.0)) for seed in range(3)]
        for _ in range(STEPS):
            rank.turn()
    rank.run()
    assert [len(lease.tokens) for lease in free] == [2 * STEPS] * 5
    assert all(lease.tokens for lease in following)


def test_narrow_types_with_every_attention_backend_that_is_here(model: Path) -> None:
    for attention in ("auto", "triton"):
        with contextlib.closing(loop(model, dtype="bfloat16", attention=attention, block_size=256)) as stepped:
            warm(stepped)
            steady(stepped, prefilled(stepped, mixture(11, 2 * STEPS)))
            stepped.drop_all()
