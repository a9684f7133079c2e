"""Masks of grammars on sampling: the reference's definition with forbidden ids left out, for every parameter and rank."""

import numpy as np
import numpy.typing as npt
import pytest
import torch

from scheduler.protocol.sampling import Grammar, SamplingParams
from tests.workers.sampling.test_sampler import (
    ALONE,
    VOCAB,
    Rank,
    Request,
    build,
    decode,
    every_request,
    on_ranks,
    random_logits,
    reference,
    shard,
)
from workers.sampling.constraints import Allowed, Constraint

Masks = npt.NDArray[np.bool_]
ANY = Grammar("regex", ".*")


def pack(masks: Masks) -> npt.NDArray[np.int32]:
    """[n, vocabulary] -> [n, words], as a grammar's mask comes."""
    words = np.zeros((len(masks), -(-masks.shape[1] // 32) * 32), np.bool_)
    words[:, : masks.shape[1]] = masks
    return np.packbits(words, axis=1, bitorder="little").view(np.int32)


def allow(samples: list[int], masks: Masks) -> Allowed:
    bits = pack(masks)
    return Allowed([Constraint(sample, row) for sample, row in zip(samples, bits, strict=True)], np.array(samples), bits)


def random_masks(shape: tuple[int, ...], share: float, seed: int = 0) -> Masks:
    """At least one id is allowed in each."""
    numbers = np.random.default_rng(seed)
    masks = numbers.random(shape) < share
    masks[..., 3] = True
    return masks


@pytest.mark.few
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("every", [1, 2])
def test_the_tokens_are_those_of_the_definition(size: int, share: float, every: int) -> None:
    """every: 2 constrains every other row of the batch."""
    requests = every_request()
    steps = random_logits(4, len(requests), VOCAB)
    constrained = list(range(0, len(requests), every))
    masks = random_masks((len(steps), len(requests), VOCAB), share)
    starts = np.array([len(request.prompt) for request in requests])

    def sample(comm: Rank) -> list[list[int]]:
        sampler = build(comm, requests, VOCAB)
        tokens = []
        for step, logits in enumerate(torch.from_numpy(steps)):
            allowed = allow(constrained, masks[step, constrained])
            sampled = sampler.sample(shard(logits, comm), np.arange(len(requests)), starts + step, allowed)
            tokens.append(sampled.tokens.tolist())
        return tokens

    outputs: list[list[int]] = [[] for _ in requests]
    for step, logits in enumerate(steps):
        for row, request in enumerate(requests):
            mask = masks[step, row] if row in constrained else None
            outputs[row].append(reference(logits[row], request, outputs[row], mask))
    want = [list(tokens) for tokens in zip(*outputs, strict=True)]
    assert on_ranks(size, sample) == [want] * size


def test_a_greedy_row_with_a_grammar_takes_the_best_of_what_is_allowed() -> None:
    """Greedy rows have a short way of their own, which knows no masks."""
    request = Request(SamplingParams(temperature=0.0, grammar=ANY))
    mask = np.zeros((1, VOCAB), np.bool_)
    mask[0, [4, 30]] = True
    logits = torch.arange(VOCAB, dtype=torch.float64)[None]
    sampled = build(ALONE, [request], VOCAB).sample(logits, np.array([0]), np.array([3]), allow([0], mask))
    assert sampled.tokens.tolist() == [30]


def test_log_probabilities_stay_those_of_the_model() -> None:
    request = Request(SamplingParams(temperature=0.0, logprobs=2, grammar=ANY))
    mask = np.zeros((1, VOCAB), np.bool_)
    mask[0, 4] = True
    logits = torch.from_numpy(random_logits(1, 1, VOCAB)[0])
    before = logits.clone()
    sampled = build(ALONE, [request], VOCAB).sample(logits, np.array([0]), np.array([3]), allow([0], mask))
    want = logits[0].log_softmax(0)
    entry = decode(sampled)[0]
    assert sampled.tokens.tolist() == [4]
    assert entry.logprob == pytest.approx(float(want[4]), abs=1e-12)
    assert entry.top_ids == tuple(want.argsort(descending=True)[:2].tolist())
    assert torch.equal(logits, before)
