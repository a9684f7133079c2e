"""The GPU's sampler draws what the CPU's draws: every mixture, any geometry, ties, NaN, grammars. Interpreted on a CPU."""

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scheduler.protocol.messages import NO_TOKEN
from scheduler.protocol.sampling import SamplingParams
from tests.workers.kernels.devices import CUDA
from tests.workers.sampling.test_masks import ANY, allow, pack, random_masks
from tests.workers.sampling.test_sampler import (
    ALONE,
    PARAMETERS,
    STOPS,
    Request,
    build,
    decode,
    every_request,
    random_logits,
    random_requests,
)
from workers.kernels.sampling.record import WORDS
from workers.sampling import logprobs
from workers.sampling.logprobs import Logprobs
from workers.sampling.sampler import Sampled

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if CUDA else "cpu")
ROWS = 64
Masks = npt.NDArray[np.bool_]


class Driven:
    """A `DeviceSampler` with what a runner would keep: records, last tokens, positions. Its last row is for padding."""

    def __init__(self, requests: Sequence[Request], vocab: int, dtype: torch.dtype, rows: Sequence[int] | None = None) -> None:
        from workers.sampling.device import DeviceSampler

        self.vocab = vocab
        self.rows = np.array(rows if rows is not None else range(len(requests)), np.int64)
        self.sampler = DeviceSampler(vocab_size=vocab, comm=ALONE, max_num_seqs=ROWS, samples=ROWS, device=DEVICE, dtype=dtype)
        self.table = torch.zeros(ROWS + 1, WORDS, dtype=torch.int32, device=DEVICE)
        self.last = torch.zeros(ROWS + 1, dtype=torch.int64, device=DEVICE)
        for row, request in zip(self.rows.tolist(), requests, strict=True):
            self.admit(row, request)

    def admit(self, row: int, request: Request) -> None:
        record = self.sampler.admit(row, **request.admission())
        self.table[row] = torch.from_numpy(record).to(DEVICE)

    def sample(self, logits: Tensor, positions: npt.NDArray[np.int64], padding: int = 0) -> list[int]:
        """Tokens of one step; `logits` [samples + padding, columns]."""
        rows = torch.from_numpy(np.append(self.rows, [ROWS] * padding).astype(np.int32)).to(DEVICE)
        at = torch.from_numpy(np.append(positions, [0] * padding).astype(np.int32)).to(DEVICE)
        out = torch.full((len(rows),), -7, dtype=torch.int64, device=DEVICE)
        self.sampler.sample(logits.to(DEVICE), rows, at, self.table, out, self.last)
        tokens: list[int] = out.tolist()
        kept = [max(token, 0) for token in tokens[: len(self.rows)]]
        assert self.last[torch.from_numpy(self.rows).to(DEVICE)].tolist() == kept
        return tokens


def starts(requests: Sequence[Request]) -> npt.NDArray[np.int64]:
    return np.array([len(request.prompt) + len(request.output) for request in requests])


def both(
    requests: Sequence[Request], steps: Tensor, masks: Masks | None = None, constrained: Sequence[int] = ()
) -> tuple[list[list[int]], list[list[int]]]:
    """Tokens of the device's and of the CPU's sampler: steps [steps, requests, vocabulary], masks [steps, constrained, ...]."""
    vocab = steps.shape[2]
    driven = Driven(requests, vocab, steps.dtype)
    cpu = build(ALONE, list(requests), vocab, dtype=torch.float32)
    got, want = [], []
    for step, logits in enumerate(steps):
        positions = starts(requests) + step
        allowed = None
        if masks is not None:
            allowed = allow(list(constrained), masks[step])
            driven.sampler.constrain(np.array(constrained), pack(masks[step]))
        got.append(driven.sample(logits, positions))
        want.append(cpu.sample(logits, np.arange(len(requests)), positions, allowed).tokens.tolist())
    return got, want


# ---- the same tokens -------------------------------------------------------------------------------------------------


@pytest.mark.few(1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_mixture_of_all_settings_over_steps_that_count_their_tokens(dtype: torch.dtype) -> None:
    requests = every_request()
    steps = torch.from_numpy(random_logits(2, len(requests), 137)).to(dtype)
    got, want = both(requests, steps)
    assert got == want


def test_a_vocabulary_of_several_blocks_that_ends_inside_one() -> None:
    requests = every_request()[1::4]
    steps = torch.from_numpy(random_logits(1, len(requests), 9_001, scale=3.0)).to(torch.bfloat16)
    got, want = both(requests, steps)
    assert got == want


@settings(max_examples=8)
@given(
    requests=st.lists(random_requests, min_size=1, max_size=3),
    seed=st.integers(0, 10**6),
    tied=st.booleans(),
    share=st.sampled_from([0.0, 0.2, 0.9]),
)
def test_random_batches(requests: list[Request], seed: int, tied: bool, share: float) -> None:
    steps = torch.from_numpy(random_logits(2, len(requests), 43, seed=seed)).float()
    steps = steps.round() if tied else steps
    constrained = list(range(seed % 2, len(requests), 2))
    requests = [
        msgspec.structs.replace(request, params=msgspec.structs.replace(request.params, grammar=ANY, min_tokens=0))
        if at in constrained
        else request
        for at, request in enumerate(requests)
    ]
    masks = random_masks((2, len(constrained), 43), share, seed)
    got, want = both(requests, steps, masks if constrained else None, constrained)
    assert got == want


FILTERED = [
    Request(params, seed=seed)
    for seed, params in enumerate(
        [
            SamplingParams(top_p=0.6),
            SamplingParams(top_p=0.05, temperature=3.0),
            SamplingParams(min_p=0.2),
            SamplingParams(top_p=0.4, min_p=0.01),
            SamplingParams(top_k=7),
            SamplingParams(top_k=90, top_p=0.8, min_p=0.001),
            SamplingParams(top_k=120, top_p=0.5),
        ]
    )
]


@pytest.mark.few(2)
@pytest.mark.parametrize("capacity", [2048, 16])
@pytest.mark.parametrize(("splits", "block", "rounds"), [(1, 256, 1), (4, 32, 2), (2, 64, 0)])
def test_any_geometry_draws_the_same(splits: int, block: int, rounds: int, capacity: int) -> None:
    """capacity 16: more candidates than can be collected, so that they are found in passes over the row."""
    from workers.kernels.sampling.sample import SampleGeometry, Tables, Workspace, sample

    vocab = 141
    logits = torch.from_numpy(random_logits(1, len(FILTERED), vocab, scale=1.0)[0]).to(torch.bfloat16)
    logits[4] = logits[4].float().round().bfloat16()  # many ties at the k-th
    driven = Driven(FILTERED, vocab, logits.dtype)
    out = torch.full((len(FILTERED),), -7, dtype=torch.int64, device=DEVICE)
    sample(
        logits.to(DEVICE),
        torch.arange(len(FILTERED), dtype=torch.int32, device=DEVICE),
        torch.full((len(FILTERED),), 3, dtype=torch.int32, device=DEVICE),
        driven.table,
        Tables(),
        out,
        driven.last,
        vocab_size=vocab,
        workspace=Workspace(len(FILTERED), DEVICE, capacity=capacity),
        plan=SampleGeometry(splits=splits, block=block, rounds=rounds, finish_block=128),
    )
    every = np.arange(len(FILTERED))
    want = build(ALONE, FILTERED, vocab, dtype=torch.float32).sample(logits, every, np.full(len(every), 3)).tokens
    assert out.tolist() == want.tolist()


def test_a_row_alone_draws_what_it_draws_in_a_batch_and_in_any_row() -> None:
    requests = every_request()[::4]
    logits = torch.from_numpy(random_logits(1, len(requests), 3_001)[0]).float()
    together = Driven(requests, 3_001, logits.dtype).sample(logits, starts(requests))
    for at, request in enumerate(requests):
        alone = Driven([request], 3_001, logits.dtype, rows=[63])
        assert alone.sample(logits[at : at + 1], starts([request])) == [together[at]]


def test_scores_that_are_close_are_compared_exactly() -> None:
    """Many ids with one logit and few bits of noise between the best: a rough score alone would flip some."""
    requests = [Request(SamplingParams(), seed=seed) for seed in range(2)]
    steps = torch.zeros(1, len(requests), 60_000)
    got, want = both(requests, steps)
    assert got == want


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_ties_go_to_the_lowest_id(dtype: torch.dtype) -> None:
    logits = torch.zeros(4, 3_000, dtype=dtype)
    logits[1, [600, 1300]] = 2.0
    logits[2] = -torch.inf
    logits[2, 2_999] = -3.0
    logits[3, :7] = -1.0
    requests = [Request(SamplingParams(temperature=0.0))] * 4
    assert Driven(requests, 3_000, dtype).sample(logits, starts(requests)) == [0, 600, 2_999, 7]


# ---- what happens around it ------------------------------------------------------------------------------------------


def test_columns_past_the_vocabulary_are_not_read_and_logits_are_left_as_they_were() -> None:
    requests = every_request()[::3]
    real = torch.from_numpy(random_logits(1, len(requests), 100)[0]).float()
    padded = torch.full((len(requests), 128), torch.nan)
    padded[:, :100] = real
    before = padded.clone()
    assert Driven(requests, 100, real.dtype).sample(padded, starts(requests)) == Driven(requests, 100, real.dtype).sample(
        real, starts(requests)
    )
    assert torch.equal(padded.nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf])
def test_a_row_with_a_logit_that_is_not_finite_gets_no_token_and_the_others_theirs(value: float) -> None:
    requests = every_request()[::2]
    logits = torch.from_numpy(random_logits(1, len(requests), 150)[0]).float()
    driven = Driven(requests, 150, logits.dtype)
    want = Driven(requests, 150, logits.dtype).sample(logits, starts(requests))
    broken = np.arange(len(requests)) % 3 == 0
    logits[torch.from_numpy(broken), 149] = value
    assert driven.sample(logits, starts(requests)) == np.where(broken, NO_TOKEN, want).tolist()
    logits[torch.from_numpy(broken)] = -torch.inf
    assert driven.sample(logits, starts(requests))[:4:3] == [NO_TOKEN, NO_TOKEN]


def test_padding_changes_nothing_but_the_scratch_row() -> None:
    requests = every_request()[-4:]
    logits = torch.from_numpy(random_logits(1, 7, 150)[0]).float()
    driven, plain = (Driven(requests, 150, logits.dtype) for _ in range(2))
    tokens = driven.sample(logits, starts(requests), padding=3)
    assert tokens[:4] == plain.sample(logits[:4], starts(requests))
    assert tokens[4:] == logits[4:].argmax(-1).tolist()
    for ours, theirs in zip(tables(driven), tables(plain), strict=True):
        assert torch.equal(ours[:ROWS], theirs[:ROWS])
    assert torch.equal(driven.last[:ROWS], plain.last[:ROWS])


def tables(driven: Driven) -> tuple[Tensor, Tensor, Tensor]:
    sampler = driven.sampler
    return sampler._marks, sampler._bias, driven.table


def test_a_row_forgets_its_former_sequence() -> None:
    former = Request(PARAMETERS["everything"], stop_ids=STOPS, output=(4, 4, 4))
    later = [
        Request(SamplingParams(temperature=0.0, presence_penalty=0.5), prompt=(1,)),
        Request(SamplingParams(temperature=0.0, logit_bias={3: 1.5})),
        Request(SamplingParams(temperature=0.0, min_tokens=2), stop_ids=(7,)),
    ]
    logits = torch.from_numpy(random_logits(1, 3, 50)[0]).float()
    driven = Driven([former] * 3, 50, logits.dtype)
    driven.sample(logits, starts([former] * 3))
    for row, request in enumerate(later):
        driven.sampler.release(row)
        driven.admit(row, request)
    assert driven.sample(logits, starts(later)) == Driven(later, 50, logits.dtype).sample(logits, starts(later))


def test_a_restart_goes_on_with_the_same_tokens() -> None:
    requests = every_request()[10:]
    steps = torch.from_numpy(random_logits(4, len(requests), 60, scale=1.0)).float()
    driven = Driven(requests, 60, steps.dtype)
    outputs = [driven.sample(logits, starts(requests) + step) for step, logits in enumerate(steps)]
    early = [tuple(tokens) for tokens in zip(*outputs[:2], strict=True)]
    again = [
        msgspec.structs.replace(request, output=request.output + tokens)
        for request, tokens in zip(requests, early, strict=True)
    ]
    restarted = Driven(again, 60, steps.dtype)
    assert [restarted.sample(logits, starts(again) + step) for step, logits in enumerate(steps[2:])] == outputs[2:]


def test_ids_that_do_not_exist_are_ignored() -> None:
    params = SamplingParams(temperature=0.0, logit_bias={59: 9.0, -2: 9.0}, min_tokens=2, presence_penalty=1.0)
    request = Request(params, stop_ids=(-1, 10**6, 2**40), prompt=(0, 10**6))
    logits = torch.from_numpy(random_logits(1, 1, 50, scale=100.0)[0]).float()
    assert Driven([request], 50, logits.dtype).sample(logits, starts([request])) == logits.argmax(-1).tolist()


class Halves:
    """The first of two ranks; the other's logits are known."""

    rank, size = 0, 2

    def __init__(self, other: Tensor) -> None:
        self._other = other

    def all_gather(self, tensor: Tensor) -> Tensor:
        return torch.stack([tensor, self._other])


def test_ranks_put_their_columns_together() -> None:
    from workers.sampling.device import DeviceSampler

    requests = every_request()[::2]
    logits = torch.nn.functional.pad(torch.from_numpy(random_logits(1, len(requests), 51)[0]).float(), (0, 1)).to(DEVICE)
    driven = Driven(requests, 51, logits.dtype)
    want = driven.sample(logits, starts(requests))
    comm: Any = Halves(logits[:, 26:].contiguous())
    driven = Driven(requests, 51, logits.dtype)
    again = Driven([], 51, logits.dtype)
    again.sampler = DeviceSampler(vocab_size=51, comm=comm, max_num_seqs=ROWS, samples=ROWS, device=DEVICE, dtype=logits.dtype)
    again.rows = driven.rows
    for row, request in enumerate(requests):
        again.admit(row, request)
    assert again.sample(logits[:, :26].contiguous(), starts(requests)) == want


def test_log_probabilities_are_those_of_the_cpu() -> None:
    asked = [3, None, 0, 20]
    edits = SamplingParams(temperature=0.5, logit_bias={7: 5.0}, top_k=4)
    requests = [Request(msgspec.structs.replace(edits, logprobs=count), seed=row) for row, count in enumerate(asked)]
    logits = torch.from_numpy(random_logits(1, 4, 70)[0]).float()
    driven = Driven(requests, 70, logits.dtype)
    tokens = torch.tensor(driven.sample(logits, starts(requests)), device=DEVICE)
    measured = driven.sampler.measure([(logits.to(DEVICE), tokens)], driven.rows)
    assert isinstance(measured, Logprobs)
    if CUDA:
        torch.cuda.synchronize()
    cpu = build(ALONE, requests, 70, dtype=torch.float32)
    want = decode(cpu.sample(logits, np.arange(4), starts(requests)))
    got = decode(Sampled(tokens, measured))
    assert sorted(got) == sorted(want) == [0, 2, 3]
    for row, entry in got.items():
        assert entry.top_ids == want[row].top_ids
        assert entry.logprob == pytest.approx(want[row].logprob, abs=1e-5)
        assert entry.top_logprobs == pytest.approx(want[row].top_logprobs, abs=1e-5)
    nobody = Driven([Request(SamplingParams())], 70, logits.dtype)
    assert nobody.sampler.measure([(logits[:1].to(DEVICE), tokens[:1])], nobody.rows) is None


def test_log_probabilities_are_made_of_a_few_samples_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what they take does not grow with the batch, and they are the same, of decodes and chunks."""
    asked = [3, None, 0, 20, 1, 2, None, 5]
    requests = [Request(SamplingParams(logprobs=count), seed=row) for row, count in enumerate(asked)]
    logits = torch.from_numpy(random_logits(1, len(asked), 70)[0]).float().to(DEVICE)
    driven = Driven(requests, 70, logits.dtype)
    tokens = torch.tensor(driven.sample(logits, starts(requests)), device=DEVICE)
    whole = driven.sampler.measure([(logits, tokens)], driven.rows)
    widened, measure = list[int](), logprobs.measure

    def note(comm: Any, some: Tensor, *others: Any) -> Tensor:
        widened.append(len(some))
        return measure(comm, some, *others)

    monkeypatch.setattr(logprobs, "measure", note)
    monkeypatch.setattr(logprobs, "MEASURED_AT_ONCE", 2)
    parts = [(logits[:6], tokens[:6]), (logits[6:7], tokens[6:7]), (logits[7:], tokens[7:])]
    found = driven.sampler.measure(parts, driven.rows)
    assert widened == [2, 2, 1, 1]
    if CUDA:
        torch.cuda.synchronize()
    assert whole is not None
    assert found is not None
    assert (found.indices, found.counts) == (whole.indices, whole.counts)
    torch.testing.assert_close(found.numbers, whole.numbers)


# ---- on a GPU --------------------------------------------------------------------------------------------------------

VOCAB = 151_936


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_real_vocabulary_on_the_gpu(dtype: torch.dtype, scale: float) -> None:
    """Tokens differ from the CPU's only where scores lie so near to each other that the two devices' logarithms decide."""
    requests = every_request() * 2
    requests = [msgspec.structs.replace(request, seed=seed) for seed, request in enumerate(requests)]
    steps = torch.from_numpy(random_logits(3, len(requests), VOCAB, scale=scale)).to(dtype)
    driven = Driven(requests, VOCAB, dtype)
    cpu = build(ALONE, requests, VOCAB, dtype=torch.float32)
    different = 0
    for step, logits in enumerate(steps):
        got = driven.sample(logits, starts(requests) + step)
        want = cpu.sample(logits, np.arange(len(requests)), starts(requests) + step).tokens.tolist()
        different += sum(a != b for a, b in zip(got, want, strict=True))
    assert different <= 1, f"{different} of {3 * len(requests)} tokens differ"


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_in_a_graph_without_waiting_for_the_device() -> None:
    requests = every_request() * 3
    logits = torch.from_numpy(random_logits(1, len(requests), VOCAB)[0]).bfloat16().to(DEVICE)
    eager, captured = (Driven(requests, VOCAB, logits.dtype) for _ in range(2))
    rows = torch.arange(len(requests), dtype=torch.int32, device=DEVICE)
    positions = torch.from_numpy(starts(requests).astype(np.int32)).to(DEVICE)
    out, other = (torch.zeros(len(requests), dtype=torch.int64, device=DEVICE) for _ in range(2))
    warm = Driven(requests, VOCAB, logits.dtype)
    warm.sampler.sample(logits, rows, positions, warm.table, out, warm.last)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.sampler.sample(logits, rows, positions, captured.table, out, captured.last)
        positions += 1
    at = positions.clone()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = []
        for _ in range(4):
            graph.replay()
            eager.sampler.sample(logits, rows, at, eager.table, other, eager.last)
            at = at + 1
            results.append((out.clone(), other.clone()))
            eager.sampler.measure([(logits, other)], eager.rows)
        eager.sampler.admit(0, **requests[-1].admission())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for ours, theirs in results:
        assert torch.equal(ours, theirs)
