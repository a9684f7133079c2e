"""Which experts a token goes through, and the pairs in the order of their experts."""

import pytest
import torch
from torch import Tensor

from tests.workers.kernels.devices import DEVICES
from tests.workers.kernels.experts.mixtures import exact_route
from workers.kernels.experts.route import Routing, Rule, choose, most_tiles, route


def _route(scores: Tensor, experts: int, per_token: int, **asked: object) -> tuple[Routing, Tensor]:
    load = torch.zeros(experts, dtype=torch.int64, device=scores.device)
    rule = Rule(per_token, bool(asked.pop("of_all", True)), bool(asked.pop("normalized", True)))
    return route(scores, load, rule, **{"held": experts, "size": 8} | asked), load  # type: ignore[arg-type]


def _groups(routing: Routing) -> dict[int, list[int]]:
    """By held expert the pairs of its tiles."""
    found: dict[int, list[int]] = {}
    for expert, first, count in sorted(routing.tiles[: int(routing.count)].tolist()):
        assert 0 < count <= routing.size
        found.setdefault(expert, []).extend(routing.pairs[first : first + count].tolist())
    return found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("of_all", "normalized"), [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize(("tokens", "experts", "per_token"), [(1, 8, 2), (5, 7, 3), (40, 12, 4), (3, 4, 4)])
def test_choices_and_weights(device: str, of_all: bool, normalized: bool, tokens: int, experts: int, per_token: int) -> None:
    scores = 2 * torch.randn(tokens, experts, device=device)
    routing, load = _route(scores, experts, per_token, of_all=of_all, normalized=normalized)
    chosen, weights = exact_route(scores, per_token, of_all, normalized)
    assert torch.equal(routing.chosen.long(), chosen)
    torch.testing.assert_close(routing.weights.double(), weights, rtol=1e-5, atol=0)
    assert torch.equal(load, chosen.flatten().bincount(minlength=experts))
    expected = {
        expert: [pair for pair, whose in enumerate(chosen.flatten().tolist()) if whose == expert] for expert in range(experts)
    }
    assert _groups(routing) == {expert: pairs for expert, pairs in expected.items() if pairs}


@pytest.mark.parametrize("device", DEVICES)
def test_of_equal_scores_the_first_expert_is_chosen(device: str) -> None:
    scores = torch.tensor([[1.0, 3.0, 3.0, 1.0, 1.0], [0.0] * 5, [-0.0, 0.0, -1.0, -torch.inf, -torch.inf]], device=device)
    routing, _ = _route(scores, 5, 3)
    assert routing.chosen[:2].tolist() == [[1, 2, 0], [0, 1, 2]]
    assert sorted(routing.chosen[2].tolist()) == [0, 1, 2]
    assert torch.allclose(routing.weights[1], torch.full((3,), 1 / 3, device=device))


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_no_number_still_chooses_experts(device: str) -> None:
    """A broken token harms nobody else, and nothing is read or written beyond the tables."""
    scores = torch.randn(3, 6, device=device)
    scores[1] = torch.nan
    routing, load = _route(scores, 6, 2)
    assert bool(((routing.chosen >= 0) & (routing.chosen < 6)).all())
    assert len(set(routing.chosen[1].tolist())) == 2
    assert int(load.sum()) == 6
    assert routing.weights[[0, 2]].isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
def test_padding_goes_nowhere(device: str) -> None:
    scores = torch.randn(9, 6, device=device)
    live = torch.tensor([True, False, True, True, False, True, False, False, True], device=device)
    routing, load = _route(scores, 6, 2, live=live)
    expected, _ = exact_route(scores, 2, True, True)
    assert routing.chosen[~live].eq(-1).all()
    assert torch.equal(routing.chosen[live].long(), expected[live])
    pairs = [pair for group in _groups(routing).values() for pair in group]
    assert sorted(pairs) == [2 * token + place for token in live.nonzero().flatten().tolist() for place in (0, 1)]
    assert int(load.sum()) == 2 * int(live.sum())


@pytest.mark.parametrize("device", DEVICES)
def test_a_choice_that_is_not_sorted_is_the_same_and_counted_as_well(device: str) -> None:
    scores = torch.randn(5, 7, device=device)
    live = torch.tensor([True, True, False, True, True], device=device)
    routing, load = _route(scores, 7, 3, live=live)
    counted = torch.zeros_like(load)
    choice = choose(scores, counted, Rule(3, True, True), live=live)
    assert torch.equal(choice.chosen, routing.chosen)
    assert torch.equal(choice.weights, routing.weights)
    assert torch.equal(counted, load)


@pytest.mark.parametrize("device", DEVICES)
def test_padding_alone(device: str) -> None:
    routing, load = _route(torch.randn(4, 6, device=device), 6, 2, live=torch.zeros(4, dtype=torch.bool, device=device))
    assert int(routing.count) == 0
    assert not load.any()


@pytest.mark.parametrize("device", DEVICES)
def test_a_rank_sorts_its_own_experts_and_counts_all(device: str) -> None:
    scores = torch.randn(20, 8, device=device)
    whole, load = _route(scores, 8, 3)
    groups = _groups(whole)
    for first in (0, 4):
        part, counted = _route(scores, 8, 3, held=4, first_held=first)
        assert _groups(part) == {expert - first: pairs for expert, pairs in groups.items() if first <= expert < first + 4}
        assert torch.equal(counted, load)
        assert torch.equal(part.chosen, whole.chosen)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [1, 8, 9, 150])
def test_all_tokens_on_one_expert(device: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than a program looks at at a time, too: 150 tokens are 300 pairs."""
    monkeypatch.setattr("workers.kernels.experts.route.PAIRS_AT_ONCE", (128,))
    scores = torch.full((tokens, 5), -9.0, device=device)
    scores[:, 3], scores[:, 1] = 5.0, 4.0
    routing, load = _route(scores, 5, 2)
    assert load.tolist() == [0, tokens, 0, tokens, 0]
    assert _groups(routing) == {3: list(range(0, 2 * tokens, 2)), 1: list(range(1, 2 * tokens, 2))}
    assert int(routing.count) <= len(routing.tiles)


@pytest.mark.parametrize("device", DEVICES)
def test_the_shared_experts_gate_is_no_expert(device: str) -> None:
    scores = torch.randn(6, 5, device=device)
    scores[:, 4] = torch.tensor([90.0, -90.0, 0.0, 1.0, 2.0, 3.0], device=device)
    routing, _ = _route(scores, 4, 2)
    assert int(routing.chosen.max()) < 4
    assert routing.gates is not None
    torch.testing.assert_close(routing.gates, scores[:, 4].sigmoid())


def test_tiles_never_outnumber_their_room() -> None:
    for size in (1, 8, 16):
        for experts in (1, 3, 8):
            for counts in ([0] * experts, [1] * experts, [size + 1] * experts, [9] + [0] * (experts - 1), [size] * experts):
                assert sum(-(-count // size) for count in counts) <= most_tiles(sum(counts), experts, size)
    assert most_tiles(8, 128, 8) == 8, "one token: as many tiles as it has experts"
