"""The sampler against a plain float64 reference: every parameter, every number of ranks, every place in a batch."""

import threading
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scheduler.protocol.messages import NO_TOKEN, TokenLogprobs
from scheduler.protocol.sampling import SamplingParams
from tests.shared.examples import examples
from workers.sampling import candidates, noise
from workers.sampling.sampler import Sampled, Sampler

T = TypeVar("T")
Floats = npt.NDArray[np.float64]
NO_TOKENS = np.zeros(0, np.int32)
CPU = torch.device("cpu")

# ---- ranks as threads ------------------------------------------------------------------------------------------------


class Peers:
    """What the ranks of one group share."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=60)
        self.tensors: list[Tensor] = [torch.empty(0)] * size


class Rank:
    """A communicator over threads."""

    peers = None

    def __init__(self, peers: Peers, rank: int) -> None:
        self._peers = peers
        self.rank = rank
        self.size = len(peers.tensors)

    def all_gather(self, tensor: Tensor) -> Tensor:
        self._peers.tensors[self.rank] = tensor
        self._peers.barrier.wait()
        gathered = torch.stack(self._peers.tensors)
        self._peers.barrier.wait()
        return gathered

    def all_reduce(self, tensor: Tensor) -> Tensor:
        gathered = self.all_gather(tensor)
        total = gathered[0]
        for rank in range(1, self.size):
            total = total + gathered[rank]
        return total

    def abort(self, reason: str) -> None:
        raise NotImplementedError(reason)

    def check(self) -> None:
        pass

    def close(self) -> None:
        pass


ALONE = Rank(Peers(1), 0)


def on_ranks(size: int, work: Callable[[Rank], T]) -> list[T]:
    """`work` on every rank of a group at once; the results in rank order."""
    peers = Peers(size)
    results: dict[int, T] = {}
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = work(Rank(peers, rank))
        except BaseException as error:
            errors.append(error)
            peers.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[rank] for rank in range(size)]


# ---- the reference ---------------------------------------------------------------------------------------------------


class Request(msgspec.Struct, frozen=True):
    params: SamplingParams
    seed: int = 7
    choice: int = 0
    stop_ids: tuple[int, ...] = ()
    prompt: tuple[int, ...] = (1, 2, 3)
    output: tuple[int, ...] = ()

    def admission(self) -> dict[str, Any]:
        """As both samplers' `admit` take it."""
        tokens = {name: np.array(getattr(self, name), np.int32) for name in ("prompt", "output")}
        return {"params": self.params, "seed": self.seed, "choice": self.choice, "stop_ids": self.stop_ids} | tokens


def reference(
    logits: Floats, request: Request, output: list[int], allowed: npt.NDArray[np.bool_] | None = None
) -> int:
    """The definition, one row at a time: [vocabulary] raw logits -> the next token. allowed: [vocabulary] by a grammar."""
    params = request.params
    x = logits.copy()
    for token, bias in params.logit_bias.items():
        x[token] += bias
    if len(output) < params.min_tokens:
        x[list(request.stop_ids)] = -np.inf
    for token in {*request.prompt, *output}:
        x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
    for token in set(output):
        x[token] -= params.frequency_penalty * output.count(token)
        x[token] -= params.presence_penalty
    if allowed is not None:
        x[~allowed] = -np.inf
    if params.temperature == 0:
        return int(x.argmax())
    x /= params.temperature
    order = np.lexsort((np.arange(len(x)), -x))[: params.top_k or None]
    weights = np.exp(x[order] - x[order[0]])
    sums = np.cumsum(weights)
    ahead = np.concatenate([[0.0], sums[:-1]])
    kept = order[((params.top_p >= 1) | (ahead < params.top_p * sums[-1])) & (weights >= params.min_p)]
    position = len(request.prompt) + len(output)
    scores = np.full(len(x), -np.inf)
    scores[kept] = x[kept] + noise_of(request, position, len(x))[kept]
    return int(scores.argmax())


def noise_of(request: Request, position: int, vocab: int, dtype: torch.dtype = torch.float64) -> Floats:
    streams = np.array([noise.stream(request.seed, request.choice)], np.uint64)
    keys = torch.from_numpy(noise.keys(streams, np.array([position])))
    return noise.gumbel(keys, torch.arange(vocab, dtype=torch.int32)[None], dtype)[0].double().numpy()


# ---- the sampler, driven ---------------------------------------------------------------------------------------------


def build(
    comm: Rank, requests: list[Request], vocab: int, rows: list[int] | None = None, dtype: torch.dtype = torch.float64
) -> Sampler:
    width = -(-vocab // comm.size)
    sampler = Sampler(vocab_size=vocab, local_vocab=width, comm=comm, max_num_seqs=64, device=CPU, dtype=dtype)
    for row, request in zip(rows or range(len(requests)), requests, strict=True):
        admit(sampler, row, request)
    return sampler


def admit(sampler: Sampler, row: int, request: Request) -> None:
    sampler.admit(row, **request.admission())


def shard(logits: Tensor, comm: Rank) -> Tensor:
    """This rank's columns of [samples, vocabulary]; ids past the end are padded with -inf."""
    width = -(-logits.shape[1] // comm.size)
    padded = torch.nn.functional.pad(logits, (0, width * comm.size - logits.shape[1]), value=-torch.inf)
    return padded[:, comm.rank * width :][:, :width].contiguous()


def generate(
    comm: Rank,
    requests: list[Request],
    steps: Floats,
    rows: list[int] | None = None,
    dtype: torch.dtype = torch.float64,
) -> list[list[int]]:
    """Each request's next tokens; `steps` [steps, requests, vocabulary] are raw logits."""
    sampler = build(comm, requests, steps.shape[2], rows, dtype)
    starts = np.array([len(request.prompt) + len(request.output) for request in requests])
    at = np.array(rows or range(len(requests)))
    columns = []
    for step, logits in enumerate(torch.from_numpy(steps).to(dtype)):
        columns.append(sampler.sample(shard(logits, comm), at, starts + step).tokens.tolist())
    return [list(tokens) for tokens in zip(*columns, strict=True)]


def expected(requests: list[Request], steps: Floats) -> list[list[int]]:
    outputs = [list(request.output) for request in requests]
    for logits in steps:
        for row, request in enumerate(requests):
            outputs[row].append(reference(logits[row], request, outputs[row]))
    return [output[len(request.output) :] for output, request in zip(outputs, requests, strict=True)]


def sample_many(params: SamplingParams, logits: Floats, draws: int, dtype: torch.dtype = torch.float64) -> list[int]:
    """One request's tokens at positions 0, 1, ... with the same logits at each."""
    sampler = build(ALONE, [Request(params)], len(logits), dtype=dtype)
    batch = torch.from_numpy(logits).to(dtype).expand(draws, -1).contiguous()
    tokens: list[int] = sampler.sample(batch, np.zeros(draws, np.int64), np.arange(draws)).tokens.tolist()
    return tokens


PARAMETERS = {
    "greedy": SamplingParams(temperature=0.0),
    "temperature": SamplingParams(temperature=0.7),
    "hot": SamplingParams(temperature=20.0),
    "as hot as can be": SamplingParams(temperature=1e308, min_tokens=4),
    "top_k": SamplingParams(top_k=5),
    "top_p": SamplingParams(top_p=0.6),
    "top_p hot": SamplingParams(top_p=0.37, temperature=3.0),
    "tiny top_p": SamplingParams(top_p=1e-6),
    "min_p": SamplingParams(min_p=0.123),
    "all filters": SamplingParams(top_k=20, top_p=0.81, min_p=0.0123, temperature=1.3),
    "top_p and min_p": SamplingParams(top_p=0.81, min_p=0.0123, temperature=1.3),
    "bias": SamplingParams(logit_bias={4: 3.0, 17: -100.0, 36: 2.5}),
    "min_tokens": SamplingParams(min_tokens=4, max_tokens=9, temperature=0.0),
    "repetition": SamplingParams(repetition_penalty=1.7),
    "greedy repetition": SamplingParams(repetition_penalty=1.7, temperature=0.0),
    "reward": SamplingParams(repetition_penalty=0.6, presence_penalty=-1.5),
    "presence": SamplingParams(presence_penalty=1.5),
    "frequency": SamplingParams(frequency_penalty=0.9, top_p=0.9),
    "everything": SamplingParams(
        temperature=0.9,
        top_k=30,
        top_p=0.87,
        min_p=0.011,
        repetition_penalty=1.2,
        presence_penalty=0.4,
        frequency_penalty=-0.3,
        logit_bias={0: 2.0, 36: 1.0},
        min_tokens=3,
        logprobs=2,
    ),
}
VOCAB = 37
STOPS = (0, 9, 36)


def every_request() -> list[Request]:
    return [
        Request(params, seed=row, choice=row % 3, stop_ids=STOPS, prompt=(5, 8, 8, 36)[: 1 + row % 4])
        for row, params in enumerate(PARAMETERS.values())
    ]


def random_logits(steps: int, rows: int, vocab: int, scale: float = 2.5, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).normal(size=(steps, rows, vocab)) * scale


# ---- each parameter, each number of ranks ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", PARAMETERS)
def test_each_parameter_against_the_reference(name: str) -> None:
    requests = [
        Request(PARAMETERS[name], seed=seed, stop_ids=STOPS, prompt=(5, 8), output=(3,) * (seed % 3))
        for seed in range(12)
    ]
    steps = random_logits(8, len(requests), VOCAB)
    assert generate(ALONE, requests, steps) == expected(requests, steps)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_agree_with_each_other_and_with_the_reference(size: int) -> None:
    requests = every_request()
    steps = random_logits(8, len(requests), VOCAB)
    steps[:, ::2] = np.round(steps[:, ::2])  # ties
    want = expected(requests, steps)
    for tokens in on_ranks(size, lambda comm: generate(comm, requests, steps)):
        assert tokens == want


@pytest.mark.parametrize("size", [1, 2])
def test_a_vocabulary_large_enough_for_blocks_and_pruning(size: int) -> None:
    requests = every_request()
    steps = random_logits(3, len(requests), 4_001, scale=4.0)
    steps[:, 1::2] = np.round(steps[:, 1::2] * 2) / 2
    want = expected(requests, steps)
    for tokens in on_ranks(size, lambda comm: generate(comm, requests, steps)):
        assert tokens == want


# Off round numbers, so that no boundary falls on a sum of tied probabilities where the last bit would decide.
off_round = st.integers(1, 98).map(lambda percent: percent / 100 + 0.00123457)
random_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.7]),
    top_k=st.sampled_from([0, 0, 1, 2, 7, 1000]),
    top_p=st.just(1.0) | off_round,
    min_p=st.just(0.0) | off_round,
    repetition_penalty=st.sampled_from([1.0, 1.0, 0.8, 1.5]),
    presence_penalty=st.sampled_from([0.0, 0.0, -1.0, 1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.0, -0.5, 0.5]),
    logit_bias=st.dictionaries(st.integers(0, 10), st.floats(-5, 5), max_size=3),
    min_tokens=st.integers(0, 4),
    logprobs=st.none() | st.integers(0, 3),
)
random_requests = st.builds(
    Request,
    params=random_params,
    seed=st.integers(0, 2**63 - 1),
    choice=st.integers(0, 127),
    stop_ids=st.lists(st.integers(0, 10), max_size=3, unique=True).map(tuple),
    prompt=st.lists(st.integers(0, 10), min_size=1, max_size=5).map(tuple),
    output=st.lists(st.integers(0, 10), max_size=5).map(tuple),
)


@settings(max_examples=examples(80))
@given(
    requests=st.lists(random_requests, min_size=1, max_size=5),
    size=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 10**6),
    tied=st.booleans(),
)
def test_random_batches_against_the_reference(requests: list[Request], size: int, seed: int, tied: bool) -> None:
    steps = random_logits(3, len(requests), 11, seed=seed)
    if tied:
        steps = np.round(steps)
    want = expected(requests, steps)
    for tokens in on_ranks(size, lambda comm: generate(comm, requests, steps)):
        assert tokens == want


# ---- independence ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_row_alone_draws_what_it_draws_in_a_batch_and_in_any_row(dtype: torch.dtype) -> None:
    requests = every_request()
    steps = random_logits(6, len(requests), 1_000)
    together = generate(ALONE, requests, steps, dtype=dtype)
    backwards = generate(ALONE, requests[::-1], steps[:, ::-1].copy(), list(range(40, 40 + len(requests))), dtype)
    assert backwards[::-1] == together
    for row, request in enumerate(requests):
        assert generate(ALONE, [request], steps[:, row : row + 1], [63], dtype) == [together[row]]


def test_seed_choice_and_position_each_make_other_noise() -> None:
    steps = np.zeros((32, 1, 50))
    once = generate(ALONE, [Request(SamplingParams())], steps)
    assert once == generate(ALONE, [Request(SamplingParams())], steps)
    assert once != generate(ALONE, [Request(SamplingParams(), seed=8)], steps)
    assert once != generate(ALONE, [Request(SamplingParams(), choice=1)], steps)
    assert once != generate(ALONE, [Request(SamplingParams(), prompt=(1,))], steps)


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_restart_goes_on_with_the_same_tokens(name: str) -> None:
    request = Request(PARAMETERS[name], stop_ids=STOPS)
    steps = random_logits(12, 1, VOCAB, scale=1.0)
    [tokens] = generate(ALONE, [request], steps)
    restarted = msgspec.structs.replace(request, output=tuple(tokens[:5]))
    assert generate(ALONE, [restarted], steps[5:], [33]) == [tokens[5:]]


def test_a_row_forgets_its_former_sequence() -> None:
    former = Request(PARAMETERS["everything"], stop_ids=STOPS, output=(4, 4, 4))
    later = Request(SamplingParams(temperature=0.0, presence_penalty=0.5), prompt=(1,))
    logits = torch.from_numpy(random_logits(1, 1, VOCAB)[0])
    sampler = build(ALONE, [former], VOCAB)
    sampler.sample(logits, np.array([0]), np.array([6]))
    sampler.release(0)
    admit(sampler, 0, later)
    sampled = sampler.sample(logits, np.array([0]), np.array([1]))
    assert sampled.tokens.tolist() == [int(logits.argmax())]
    assert sampled.payloads() == []


def test_more_penalised_rows_than_the_tables_first_hold() -> None:
    requests = [Request(PARAMETERS["frequency"], seed=seed) for seed in range(11)]
    steps = random_logits(5, len(requests), VOCAB)
    assert generate(ALONE, requests, steps) == expected(requests, steps)


# ---- pruning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", [0.1, 3.0, 8.0])
def test_pruning_never_changes_the_winner(scale: float, dtype: torch.dtype) -> None:
    logits = random_logits(1, 1, 20_000, scale=scale)[0, 0]
    for position, token in enumerate(sample_many(SamplingParams(temperature=0.9), logits, 12, dtype)):
        row = torch.from_numpy(logits).to(dtype) / torch.tensor(0.9, dtype=dtype)
        drawn = torch.from_numpy(noise_of(Request(SamplingParams()), position, len(logits), dtype)).to(dtype)
        assert token == int((row + drawn).argmax())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_without_pruning_as_on_an_accelerator(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = every_request()
    steps = random_logits(4, len(requests), 3_000, scale=4.0)
    everything = torch.arange(3_000, dtype=torch.int32)
    pruned = generate(ALONE, requests, steps, dtype=dtype)
    monkeypatch.setattr(
        candidates, "compact", lambda values, _floor, _first_id: (values, everything.expand(*values.shape))
    )
    monkeypatch.setattr(candidates, "argmax", lambda values: values.argmax(-1))
    monkeypatch.setattr(noise, "_PIECE", 1 << 40)
    assert generate(ALONE, requests, steps, dtype=dtype) == pruned


# ---- distributions: fixed seeds, so these pass or fail for good ------------------------------------------------------


def chi_square(tokens: list[int], probabilities: Floats) -> float:
    counts = np.bincount(tokens, minlength=len(probabilities))
    assert not counts[probabilities == 0].any()
    wanted = probabilities[probabilities > 0] * len(tokens)
    return float(((counts[probabilities > 0] - wanted) ** 2 / wanted).sum())


DISTRIBUTION = np.array([0.3, 0.02, 0.2, 0.13, 0.1, 0.05, 0.15, 0.05])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("params", "kept"),
    [
        (SamplingParams(), range(8)),
        (SamplingParams(top_k=3), (0, 2, 6)),
        (SamplingParams(top_p=0.7), (0, 2, 6, 3)),
        (SamplingParams(min_p=0.32), (0, 2, 6, 3, 4)),
        (SamplingParams(top_k=6, top_p=0.77), (0, 2, 6, 3)),
    ],
)
def test_frequencies_match_the_probabilities(params: SamplingParams, kept: Any, dtype: torch.dtype) -> None:
    probabilities = np.zeros(8)
    probabilities[list(kept)] = DISTRIBUTION[list(kept)]
    tokens = sample_many(params, np.log(DISTRIBUTION), 40_000, dtype)
    assert chi_square(tokens, probabilities / probabilities.sum()) < 24.3  # 7 degrees of freedom, p = 0.001


def test_a_large_flat_vocabulary_is_drawn_evenly() -> None:
    tokens = sample_many(SamplingParams(), np.zeros(500), 15_000, torch.float32)
    assert chi_square(tokens, np.full(500, 1 / 500)) < 602  # 499 degrees of freedom, p = 0.001


def test_neighbouring_positions_seeds_and_choices_are_independent() -> None:
    flat = np.full(16, 1 / 16)
    tokens = np.array(sample_many(SamplingParams(), np.zeros(4), 40_001))
    assert chi_square((tokens[:-1] * 4 + tokens[1:]).tolist(), flat) < 37.7  # 15 degrees of freedom, p = 0.001
    streams = np.array([[noise.stream(seed, choice) for choice in (0, 1)] for seed in range(20_000)], np.uint64)
    keys = torch.from_numpy(noise.keys(streams.reshape(-1), np.zeros(40_000, np.int64)))
    drawn = noise.gumbel(keys, torch.arange(4, dtype=torch.int32).expand(40_000, -1), torch.float32)
    pairs = drawn.argmax(-1).view(-1, 2).numpy()
    assert chi_square((pairs[:, 0] * 4 + pairs[:, 1]).tolist(), flat) < 37.7
    firsts = pairs[:, 0]
    assert chi_square((firsts[:-1] * 4 + firsts[1:]).tolist(), flat) < 37.7


# ---- corners ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_greedy_ties_go_to_the_lowest_id(size: int, dtype: torch.dtype) -> None:
    logits = torch.zeros(3, 16, dtype=dtype)
    logits[1, [6, 13]] = 2.0
    logits[2] = -torch.inf
    logits[2, 15] = -3.0
    requests = [Request(SamplingParams(temperature=0.0))] * 3
    mixed = [*requests[:2], Request(SamplingParams(top_k=1, top_p=0.5, logprobs=0))]
    for batch in (requests, mixed):

        def greedy(comm: Rank, batch: list[Request] = batch) -> list[int]:
            sampler = build(comm, batch, 16, dtype=dtype)
            tokens: list[int] = sampler.sample(shard(logits, comm), np.arange(3), np.arange(3)).tokens.tolist()
            return tokens

        assert on_ranks(size, greedy) == [[0, 6, 15]] * size


@pytest.mark.parametrize("size", [1, 4])
def test_padded_ids_are_never_sampled(size: int) -> None:
    requests = [Request(params, seed=seed) for seed, params in enumerate(PARAMETERS.values())]
    requests = [msgspec.structs.replace(r, params=msgspec.structs.replace(r.params, logit_bias={})) for r in requests]
    steps = np.full((10, len(requests), 5), -50.0)  # at 4 ranks the last one holds nothing but padding
    for tokens in on_ranks(size, lambda comm: generate(comm, requests, steps)):
        assert np.max(tokens) < 5
        assert np.min(tokens) >= 0


def test_the_stop_ids_wait_for_min_tokens() -> None:
    steps = np.zeros((6, 2, VOCAB))
    steps[:, :, 9] = 90.0
    steps[:, :, 4] = 50.0
    asked = SamplingParams(temperature=0.0, min_tokens=3)
    requests = [Request(asked, stop_ids=STOPS), Request(asked, stop_ids=STOPS, output=(4, 4))]
    assert generate(ALONE, requests, steps) == [[4, 4, 4, 9, 9, 9], [4, 9, 9, 9, 9, 9]]


def test_ids_that_no_rank_owns_are_ignored() -> None:
    params = SamplingParams(temperature=0.0, logit_bias={VOCAB + 9: 9.0, -2: 9.0}, min_tokens=2, presence_penalty=1.0)
    request = Request(params, stop_ids=(-1, 10**6), prompt=(0, 10**6))
    steps = random_logits(3, 1, VOCAB, scale=100.0)
    assert generate(ALONE, [request], steps) == [steps[:, 0].argmax(-1).tolist()]


def test_logits_are_left_as_they_were() -> None:
    requests = every_request()
    logits = torch.from_numpy(random_logits(1, len(requests), VOCAB)[0])
    before = logits.clone()
    build(ALONE, requests, VOCAB).sample(logits, np.arange(len(requests)), np.full(len(requests), 4))
    assert torch.equal(logits, before)


def test_no_sample_in_a_step_of_prefill_chunks() -> None:
    nothing = np.zeros(0, np.int64)
    sampled = build(ALONE, [], VOCAB).sample(torch.zeros(0, VOCAB), nothing, nothing)
    assert sampled.tokens.shape == (0,)
    assert sampled.payloads() == []


NAN_OF_OTHER_SIGN = np.array([0xFFC00000], np.uint32).view(np.float32).item()
"""As x86 makes it of inf - inf: as an integer it is below all others."""


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("value", [torch.nan, NAN_OF_OTHER_SIGN, torch.inf])
def test_a_row_with_a_logit_that_is_not_finite_gets_no_token_and_others_what_they_get_without_it(
    value: float, dtype: torch.dtype, size: int
) -> None:
    requests = [*every_request()[::2], *[Request(SamplingParams(top_k=VOCAB // 2, top_p=0.9))] * 2]
    every = np.arange(len(requests))
    broken = every % 2 == 1

    def tokens(comm: Rank, logits: Tensor) -> npt.NDArray[np.int64]:
        sampler = build(comm, requests, VOCAB, dtype=dtype)
        sampled: npt.NDArray[np.int64] = sampler.sample(shard(logits, comm), every, np.full(len(every), 9)).tokens.numpy()
        return sampled

    for step in range(3):
        logits = torch.from_numpy(random_logits(1, len(requests), VOCAB, seed=step)[0]).to(dtype)
        want = tokens(ALONE, logits)
        assert (want >= 0).all()
        logits[torch.from_numpy(broken), 5 + 9 * step] = value
        for got in on_ranks(size, partial(tokens, logits=logits)):
            assert got.tolist() == np.where(broken, NO_TOKEN, want).tolist()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("value", [torch.nan, -torch.inf, torch.inf])
def test_logits_without_one_finite_number_give_no_token(value: float, dtype: torch.dtype) -> None:
    for requests in (every_request(), [Request(SamplingParams(temperature=0.0))] * 3):
        sampler = build(ALONE, requests, VOCAB, dtype=dtype)
        logits = torch.full((len(requests), VOCAB), value, dtype=dtype)
        tokens = sampler.sample(logits, np.arange(len(requests)), np.full(len(requests), 9)).tokens
        assert (tokens == NO_TOKEN).all()


def test_admitting_and_sampling_inside_and_outside_inference_mode() -> None:
    sampler = build(ALONE, [], VOCAB)
    with torch.inference_mode():
        admit(sampler, 0, Request(PARAMETERS["everything"]))
        sampler.sample(torch.zeros(1, VOCAB, dtype=torch.float64), np.array([0]), np.array([3]))
    admit(sampler, 1, Request(PARAMETERS["everything"]))
    sampler.sample(torch.zeros(2, VOCAB, dtype=torch.float64), np.array([0, 1]), np.array([4, 3]))


# ---- log-probabilities -----------------------------------------------------------------------------------------------


def decode(sampled: Sampled) -> dict[int, TokenLogprobs]:
    payloads = dict(sampled.payloads())
    return {index: msgspec.msgpack.decode(payload, type=TokenLogprobs) for index, payload in payloads.items()}


@pytest.mark.parametrize("size", [1, 2, 4])
def test_logprobs_are_those_of_the_raw_logits(size: int) -> None:
    logits = np.round(random_logits(1, 5, VOCAB)[0])  # ties
    asked = [3, None, 0, 20, 1]
    edits = SamplingParams(temperature=0.5, logit_bias={7: 5.0}, presence_penalty=1.0, top_k=4)
    requests = [Request(msgspec.structs.replace(edits, logprobs=count), seed=row) for row, count in enumerate(asked)]

    def measure(comm: Rank) -> tuple[list[int], dict[int, TokenLogprobs]]:
        sampler = build(comm, requests, VOCAB)
        sampled = sampler.sample(shard(torch.from_numpy(logits), comm), np.arange(5), np.full(5, 3))
        return sampled.tokens.tolist(), decode(sampled)

    want = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    results = on_ranks(size, measure)
    assert all(result == results[0] for result in results)
    tokens, decoded = results[0]
    assert sorted(decoded) == [0, 2, 3, 4]
    for row, entry in decoded.items():
        order = np.lexsort((np.arange(VOCAB), -want[row]))[: asked[row]]
        assert entry.logprob == pytest.approx(want[row, tokens[row]], abs=1e-12)
        assert entry.top_ids == tuple(order)
        assert entry.top_logprobs == pytest.approx(want[row, order], abs=1e-12)


def test_more_logprobs_than_ids() -> None:
    sampler = build(ALONE, [Request(SamplingParams(logprobs=20))], 6, dtype=torch.float32)
    [entry] = decode(sampler.sample(torch.arange(6.0)[None], np.array([0]), np.array([3]))).values()
    assert entry.top_ids == (5, 4, 3, 2, 1, 0)
    assert sum(np.exp(entry.top_logprobs)) == pytest.approx(1, abs=1e-6)
