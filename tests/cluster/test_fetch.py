"""A prefix goes from group to group on a real Ray cluster, over sockets between the ranks' processes."""

from pathlib import Path
from typing import Any

import pytest

from deploy import LLM, SamplingParams
from tests.cluster.test_ray import TINY, tokens

pytestmark = pytest.mark.ray

PREFIX = list(range(300, 620))
PROMPTS = [[*PREFIX, *range(700 + 12 * number, 712 + 12 * number)] for number in range(16)]
OUTPUT = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


def open_llm(path: Path = TINY, **options: Any) -> LLM:
    asked: dict[str, Any] = {"kv_memory": "64MiB", "max_num_batched_tokens": 32, "check_invariants": True}
    return LLM(path, dtype="float64", block_size=16, **asked | options)


def test_two_groups_of_two_ranks_with_a_fetch() -> None:
    """One group has the prefix and more work than it can do at once; the other fetches the prefix and takes its share."""
    with open_llm(local=True) as llm:
        expected = tokens(llm.generate(PROMPTS, OUTPUT, progress=False))
    with open_llm(groups=2, tensor_parallel_size=2) as llm:
        llm.generate([PREFIX], SamplingParams(max_tokens=2, ignore_eos=True), progress=False)
        assert tokens(llm.generate(PROMPTS, OUTPUT, progress=False)) == expected
        stats = llm.stats()
    assert stats.fetches >= 1
    assert stats.failed_transfers == 0
    assert stats.fetched_tokens >= 304, "all full blocks of the prefix"
    assert all(group.steps for group in stats.groups)
