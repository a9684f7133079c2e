"""Lists of blocks that begin alike: against plain lists, and what they keep of blocks that begin like no other."""

import random

import pytest

from kvcache.heads import HeadLists
from kvcache.ids import NodeId


@pytest.mark.parametrize("seed", range(4))
def test_lists_are_those_of_a_model(seed: int) -> None:
    draw, heads = random.Random(seed), HeadLists()
    model: dict[int, list[NodeId]] = {}
    nodes = iter(range(1, 2000))
    for _ in range(600):
        key = draw.randrange(5)
        listed = model.setdefault(key, [])
        if listed and draw.random() < 0.45:
            node = listed.pop(draw.randrange(len(listed)))
            heads.remove(key, node)
        else:
            node = NodeId(next(nodes))
            listed.insert(0, node)
            heads.add(key, node)
        for other, expected in model.items():
            assert list(heads.listed(other, 99)) == expected
            assert list(heads.listed(other, 2)) == expected[:2]
            assert all(heads.has_others(each) == (len(expected) > 1) for each in expected)
    for key, listed in model.items():
        for node in listed:
            heads.remove(key, node)
    assert heads == HeadLists(), "nothing is left behind"


def test_a_block_that_begins_like_no_other_has_no_links() -> None:
    heads = HeadLists()
    for key in range(3):
        heads.add(key, NodeId(key + 1))
    assert not heads.older
    assert not heads.newer
