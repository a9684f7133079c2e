"""Conversations inferred from a trace, and workloads that are what they say."""

import numpy as np

from benchmarks.study.models.prefixes import common
from benchmarks.study.models.streams import Workload, chat, infer_conversations, random_prompts, workloads
from benchmarks.study.questions.fragmentation import continued_prefixes
from tests.study.requests import ask, workload


def test_a_conversation_is_a_prefix_beyond_the_preamble() -> None:
    preamble = 0
    prompts = [[preamble, 1], [preamble, 2], [preamble, 1, 3], [preamble, 2, 4], [preamble, 1, 3, 5]]
    prompts += [[preamble, 100 + number] for number in range(400)]
    found = infer_conversations([np.array(prompt, np.uint64) for prompt in prompts])
    assert found[:5] == [0, 1, 0, 1, 0]
    assert len(set(found)) == 402


def test_a_turn_that_continues_reaches_to_the_end_of_the_answer_before() -> None:
    first = ask([7, 1, 2], 100, unit=512, tokens=1100)  # two full blocks, then 76 tokens and an answer of 100
    turn = ask([7, 1, 9], 10, unit=512, tokens=1500)
    short = ask([7, 1, 8], 10, unit=512, tokens=1150)
    other = ask([7, 5], 10, unit=512, tokens=900)
    found = continued_prefixes(workload(first, turn, short, other, unit=512))
    assert found == [0, 1199, 1149, 512]  # one block is a preamble, and does not make a conversation


def test_a_chat_repeats_its_history() -> None:
    made = chat(60, 0)
    last: dict[int, np.ndarray[tuple[int], np.dtype[np.uint64]]] = {}
    turns = 0
    for request in made.requests:
        if (before := last.get(request.conversation)) is not None:
            assert common(before, request.asked.names) == len(before)
            turns += 1
        last[request.conversation] = np.concatenate([request.asked.names, request.answer])
    assert turns > 20


def test_random_prompts_share_nothing_and_seeds_repeat() -> None:
    def firsts(made: Workload) -> list[int]:
        return [int(request.asked.names[0]) for request in made.requests]

    one, other = random_prompts(50, 3), random_prompts(50, 3)
    assert len(set(firsts(one))) == 50
    assert firsts(one) == firsts(other)


def test_times_run_forward() -> None:
    for made in workloads(None, 0, quick=True):
        times = [request.asked.arrived_s for request in made.requests]
        assert times == sorted(times)
        assert made.prompt_tokens == sum(len(request.asked.tokens()) for request in made.requests)
