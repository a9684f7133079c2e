"""Few groups are looked at one by one, many through columns: on equal clusters both find the same way to serve a prompt."""

import random

import pytest

from scheduler.placement.routing import FEW_GROUPS, Newcomer
from tests.scheduler.cluster import Cluster


@pytest.mark.few(1)
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("window", [None, 6])
def test_many_groups_are_placed_as_few_are(seed: int, window: int | None) -> None:
    draw = random.Random(seed)
    cluster = Cluster(
        (12,) * (FEW_GROUPS + 2), fetch=True, hash_stride=2, host_blocks=12, window=window,
        max_num_batched_tokens=64 if window is None else 4,
    )  # fmt: skip
    routing, found = cluster.core.routing, 0
    for _ in range(60):
        prompt = [draw.randrange(2) for _ in range(draw.randint(1, 24))]
        stream = cluster.submit(prompt, max_tokens=draw.randint(1, 12))[0]
        if stream.finished is None and draw.random() < 0.3:
            cluster.abort(stream)
        if draw.random() < 0.7:
            cluster.step()
        for sequence in list(cluster.core.sequences.values()):
            tokens = sequence.buffer[: sequence.committed].copy()
            limit = len(tokens) - 1
            if len(sequence.hashes) < limit // 4:
                sequence.hash_up_to(limit // 4, 4)
            match = cluster.core.table.index.match(tokens, sequence.hashes, sequence.salt, limit // 4)
            parts = cluster.core.table.index.parts(match, tokens, sequence.salt, limit)
            blocks = min(-(-(len(tokens) + cluster.core.resolved.grant_ahead) // 4), sequence.blocks_at_most)
            newcomer = Newcomer(sequence, tokens, limit, match, [], None, blocks, parts)
            few, many = (routing.cheapest(newcomer, few=few) for few in (len(routing.groups), 0))
            assert few == many
            found += few is not None and few[1] is not None
    assert found, "some would be fetched or loaded"
