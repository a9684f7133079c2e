"""What happens to sequences in the middle of graph replay makes no difference to their tokens, nor to anybody else's."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from scheduler.protocol.leaders import Copy
from scheduler.protocol.messages import FinishReason
from scheduler.protocol.sampling import SamplingParams
from tests.end_to_end.prompts import draw
from tests.gpu.works import GPU, REGEX, constrained, loop, mixture
from tests.workers.stepping import Lease, Stepped, Work
from workers.execution.gpu.runner import GpuRunner
from workers.loop.batch import Launched, ResidentBatch
from workers.loop.rank import Pending

pytestmark = GPU

TOKENS = 40
ROUNDING = 1e-4


def tokens_of(leases: list[Lease]) -> list[list[int]]:
    return [lease.tokens for lease in leases]


@pytest.fixture(scope="module")
def undisturbed(shared: Stepped) -> list[list[int]]:
    return tokens_of(shared.generate(mixture(12, TOKENS)))


@pytest.fixture(params=["graphs", "eager"])
def stepped(rank: Stepped, request: pytest.FixtureRequest) -> Iterator[Stepped]:
    with rank.eager() if request.param == "eager" else contextlib.nullcontext():
        yield rank


def midway(rank: Stepped, count: int = 12) -> list[Lease]:
    """So many of the mixture, each some tokens old, with a step under way."""
    leases = [rank.start(work) for work in mixture(count, TOKENS)]
    rank.prefill(leases)
    for _ in range(7):
        rank.turn()
    return leases


def test_an_abort_leaves_the_others_alone(stepped: Stepped, undisturbed: list[list[int]]) -> None:
    """And its row and blocks go to newcomers with the very same turn."""
    leases = midway(stepped)
    for at in (1, 4, 9):
        stepped.drop(leases[at])
        newcomer = stepped.start(leases[at].work)
        assert newcomer.row == leases[at].row
        assert newcomer.blocks[0] == leases[at].blocks[0]
        leases[at] = newcomer
        stepped.turn()
    stepped.run()
    assert tokens_of(leases) == undisturbed


def test_a_preempted_sequence_goes_on_where_it_was(stepped: Stepped, undisturbed: list[list[int]]) -> None:
    leases = midway(stepped)
    victims = {at: leases[at] for at in (0, 3, 6, 7)}
    for lease in victims.values():
        stepped.drop(lease)
    for _ in range(5):
        stepped.turn()
    for at, lease in victims.items():
        leases[at] = stepped.start(lease.work, output=lease.tokens)
    stepped.run()
    assert tokens_of(leases) == undisturbed


def test_a_block_that_is_remapped(stepped: Stepped, undisturbed: list[list[int]]) -> None:
    """Its twin is read from now on; the former block has somebody else's numbers at once."""
    leases = midway(stepped)
    moved = [lease for lease in leases if len(lease.blocks) > 2]
    assert len(moved) > 4
    for index in (0, 1):
        former = [stepped.remap(lease, index) for lease in moved]
        stepped.turn()
        stepped.pool.data[[block for block in former if block in stepped.free_blocks]] = torch.nan
        stepped.turn()
    stepped.run()
    assert tokens_of(leases) == undisturbed


def test_a_prefix_that_is_copied_on_write(stepped: Stepped) -> None:
    """A newcomer begins with part of a block of one that decodes, and with whole blocks that both read."""
    prompt = draw(60, seed=3)
    how: dict[str, Any] = {"max_tokens": TOKENS, "ignore_eos": True, "temperature": 1.0}
    first = Work(prompt, SamplingParams(**how), 1)
    second = Work([*prompt[:41], *draw(9, seed=4)], SamplingParams(**how), 2)
    alone = [stepped.generate([work])[0].tokens for work in (first, second)]
    source = stepped.start(first)
    stepped.prefill([source])
    for _ in range(3):
        stepped.turn()
    target = stepped.free_blocks.popleft()
    stepped.say(Copy(source.blocks[2], target, 41 - 2 * stepped.block))
    copy = stepped.start(second, cached=41, own=[*source.blocks[:2], target])
    stepped.turn()
    stepped.run()
    assert tokens_of([source, copy]) == alone


def step_both(one: Stepped, other: Stepped) -> None:
    for _ in range(20):
        one.turn()
        other.turn()


def test_an_executor_that_fails_in_the_middle_takes_nobody_else_down(
    model: Path, rank: Stepped, undisturbed: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rank dies between two replays, with a step under way; another on the same device goes on with its tokens."""
    execute, broken = GpuRunner.execute, loop(model, max_num_seqs=4)
    steps = 0

    def failing(self: GpuRunner, batch: ResidentBatch, step: Launched) -> Pending:
        nonlocal steps
        steps += self is broken.rank.executor
        if self is broken.rank.executor and steps > 9:
            raise RuntimeError("burnt down")
        return execute(self, batch, step)

    monkeypatch.setattr(GpuRunner, "execute", failing)
    leases = midway(rank)
    victims = [broken.start(work) for work in mixture(4, TOKENS)]
    with pytest.raises(RuntimeError, match="burnt down"):
        step_both(broken, rank)
    broken.close()
    assert all(0 < len(lease.tokens) < TOKENS for lease in victims)
    rank.run()
    assert tokens_of(leases) == undisturbed
    monkeypatch.undo()
    with contextlib.closing(loop(model, max_num_seqs=4)) as successor:
        again = [successor.start(lease.work, output=lease.tokens) for lease in victims]
        successor.run()
        assert tokens_of(again) == undisturbed[:4]


# ---- grammars


def test_a_row_with_a_grammar_holds_up_nobody(stepped: Stepped, model: Path, undisturbed: list[list[int]]) -> None:
    """Every step has every row, and the grammar is followed to its end."""
    how = [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9}]
    works = [constrained(TOKENS, seed=seed, **how[seed]) for seed in range(3)]
    alone = [stepped.generate([work])[0].tokens for work in works]
    free = [stepped.start(work) for work in mixture(9, TOKENS)]
    following = [stepped.start(work) for work in works]
    leases = [*free, *following]
    stepped.prefill(leases)
    while stepped.leases:
        decoding = set(stepped.leases)
        result = stepped.turn()
        assert result is not None
        assert set(result.step.leases[result.live].tolist()) == decoding, "nobody has sat out"
        assert result.step.samples.all()
    stepped.run()
    assert tokens_of(free) == undisturbed[:9]
    assert tokens_of(following) == alone
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    for lease in following:
        text = tokenizer.decode(lease.tokens)
        if lease.finish is FinishReason.STOP:
            assert re.fullmatch(REGEX.text, text)
        else:
            assert len(lease.tokens) == TOKENS


# ---- log-probabilities


@pytest.fixture(scope="module")
def on_cpu(model: Path) -> Iterator[Stepped]:
    stepped = Stepped(model, device="cpu", depth=0, attention="cpu")
    yield stepped
    stepped.close()


def test_log_probabilities_are_those_of_a_cpu(stepped: Stepped, on_cpu: Stepped) -> None:
    works = [
        Work(draw(3 + 23 * at, seed=at), SamplingParams(max_tokens=12, ignore_eos=True, temperature=at % 2, logprobs=at,
             prompt_logprobs=4 - at, presence_penalty=0.5 * (at == 3)), at) for at in range(5)
    ]  # fmt: skip
    beside = [stepped.start(work) for work in mixture(5, TOKENS)]
    leases = stepped.generate(works)
    assert all(len(lease.tokens) == TOKENS for lease in beside)
    for lease, expected in zip(leases, on_cpu.generate(works), strict=True):
        assert lease.tokens == expected.tokens
        assert len(lease.logprobs) == len(lease.tokens)
        assert len(lease.prompt_logprobs) == len(lease.work.prompt) - 1
        told = zip([*lease.prompt_logprobs, *lease.logprobs], [*expected.prompt_logprobs, *expected.logprobs], strict=True)
        for ours, theirs in told:
            assert ours.logprob == pytest.approx(theirs.logprob, abs=ROUNDING)
            assert ours.top_logprobs == pytest.approx(theirs.top_logprobs, abs=ROUNDING)
            near = any(a - b < ROUNDING for a, b in zip(theirs.top_logprobs, theirs.top_logprobs[1:], strict=False))
            assert near or ours.top_ids == theirs.top_ids or set(ours.top_ids[:-1]) == set(theirs.top_ids[:-1])


def test_the_tokens_of_every_setting_are_those_of_a_cpu(stepped: Stepped, on_cpu: Stepped) -> None:
    works = [*mixture(20, 24), constrained(TOKENS, temperature=0.0), constrained(TOKENS, temperature=1.0)]
    assert tokens_of(stepped.generate(works)) == tokens_of(on_cpu.generate(works))


# ---- numbers that are none


POISON = 7


@pytest.fixture(scope="module")
def poisoned(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model, but for one token whose embedding is NaN."""
    folder = tmp_path_factory.mktemp("poisoned")
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][POISON] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_logits_that_are_not_finite_end_their_sequence_as_failed(poisoned: Path, stepped: Stepped) -> None:
    """Whoever has met the poison ends, in its prompt or in its output; the others go on as if nothing were."""
    how: dict[str, Any] = {"temperature": 0.0, "max_tokens": 30, "ignore_eos": True}
    well = SamplingParams(logit_bias={POISON: -100.0}, **how)
    healthy = [Work([token for token in draw(30, seed=seed) if token != POISON], well) for seed in range(3)]
    expected = tokens_of(stepped.generate(healthy))
    ill = [
        Work([*draw(20, seed=9), POISON, *draw(3, seed=8)], SamplingParams(**how)),
        Work(healthy[0].prompt, SamplingParams(logit_bias={POISON: 100.0}, **how)),
    ]
    with contextlib.closing(loop(poisoned, max_num_seqs=5)) as rank:
        leases = rank.generate([healthy[0], ill[0], healthy[1], ill[1], healthy[2]])
    assert tokens_of([leases[0], leases[2], leases[4]]) == expected
    assert [leases[at].finish for at in (1, 3)] == [FinishReason.FAILED] * 2
    assert leases[1].tokens == []
    assert leases[3].tokens == [POISON]
    assert {lease.finish for lease in (leases[0], leases[2], leases[4])} == {FinishReason.LENGTH}
