"""Few groups are looked at one by one, many through columns: on equal clusters both find the same way to serve a prompt."""

import random

import numpy as np
import pytest

from scheduler.placement.routing import FEW_GROUPS, PromptMatch
from tests.scheduler.cluster import Cluster


@pytest.mark.parametrize("seed", range(2))
def test_many_groups_are_placed_as_few_are(seed: int) -> None:
    draw = random.Random(seed)
    cluster = Cluster((12,) * (FEW_GROUPS + 2), fetch=True, hash_stride=2, host_blocks=12)
    routing, found = cluster.core.routing, 0
    for _ in range(60):
        prompt = [draw.randrange(2) for _ in range(draw.randint(1, 24))]
        stream = cluster.submit(prompt, max_tokens=draw.randint(1, 12))[0]
        if stream.finished is None and draw.random() < 0.3:
            cluster.abort(stream)
        if draw.random() < 0.7:
            cluster.step()
        for sequence in list(cluster.core.sequences.values()):
            tokens = np.array(sequence.tokens)
            limit = len(tokens) - 1
            sequence.hash_up_to(limit // 4, 4)
            match = cluster.core.table.match(tokens, sequence.hashes, sequence.salt, limit // 4)
            parts = cluster.core.table.parts(match, tokens, sequence.salt, limit)
            source = routing._best_source(match, parts)
            blocks = sequence.blocks_for(len(tokens) + cluster.core.resolved.grant_ahead, 4)
            placed = PromptMatch(sequence, match, parts, blocks, source, 4)
            few, many = (routing._choose(placed, bounds(placed)) for bounds in (routing._each, routing._promising))
            assert few == many
            found += few is not None and few.source is not None
    assert found, "some would be fetched or loaded"
