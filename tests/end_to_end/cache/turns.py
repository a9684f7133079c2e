"""What sequences with windows go through, whichever of a model's layers have them: next turns, and other groups' prefixes."""

from collections.abc import Callable
from contextlib import AbstractContextManager

from deploy import LLM
from scheduler.server.stats import EngineStats
from tests.end_to_end.engines import greedy, run, tokens
from tests.end_to_end.prompts import draw
from tests.end_to_end.waiting import nothing_left_behind, wait_idle

PROMPTS = [draw(450, seed=300), draw(7, seed=301), draw(300, seed=302)]
OUTPUT, FIRST = 160, 100
"""Tokens of each prompt in all, and of its first turn: even the shortest prompt's sequence is longer than the smallest pool."""


def take_turns(llm: LLM, expected: list[list[int]]) -> list[int]:
    """Each prompt runs by itself; then each comes again with what was said to it, and goes on as it did in `expected`. How many
    tokens each of these has that were not computed anew, less its own."""
    for prompt in PROMPTS:
        run(llm, [prompt], greedy(FIRST))
        wait_idle(llm)
    turns = [[*prompt, *output[:FIRST]] for prompt, output in zip(PROMPTS, expected, strict=True)]
    again = [run(llm, [turn], greedy(OUTPUT - FIRST))[0] for turn in turns]
    wait_idle(llm)
    assert [output.outputs[0].token_ids for output in again] == [output[FIRST:] for output in expected]
    return [(output.num_cached_tokens or 0) - len(turn) for output, turn in zip(again, turns, strict=True)]


def fetch_prefix(opened: Callable[[int], AbstractContextManager[LLM]]) -> EngineStats:
    """One of two groups has the prefix, and more to do than it can at once; tokens are those of one group. opened: so many."""
    prompts = [[*PROMPTS[0], *draw(12, seed=310 + number)] for number in range(12)]
    with opened(1) as llm:
        plain = tokens(run(llm, prompts, greedy(40)))
    with nothing_left_behind(), opened(2) as llm:
        run(llm, [PROMPTS[0]], greedy(2))
        assert tokens(run(llm, prompts, greedy(40))) == plain
        wait_idle(llm)
        return llm.stats()
