"""The common work under one setting, again and again until the setting has shown what it is for."""

from collections.abc import Iterator

from deploy import LLM, SamplingParams
from deploy.frontend.outputs import RequestOutput
from tests.end_to_end.agreement.settings import Setting
from tests.end_to_end.engines import run
from tests.end_to_end.prompts import PROMPTS
from tests.end_to_end.waiting import wait_idle

MOST_TURNS = 6
PREEMPTIONS = 2


def turns(llm: LLM, setting: Setting, params: list[SamplingParams]) -> Iterator[list[RequestOutput]]:
    """Yields the outputs of each turn: a second one where every prompt may hit, more until sequences were preempted.

    With several groups the routes depend on how threads take turns, so one turn may pass with fewer preemptions than
    another. At the end hits and preemptions have happened exactly where the setting wants them.
    """
    for turn in range(MOST_TURNS):
        yield run(llm, PROMPTS, params)
        wait_idle(llm)
        stats = llm.stats()
        if turn >= setting.caching and (not setting.small or stats.preemptions >= PREEMPTIONS):
            break
    assert (stats.cached_tokens > 0) == setting.caching, "prefix hits"
    assert stats.preemptions >= PREEMPTIONS if setting.small else stats.preemptions == 0
