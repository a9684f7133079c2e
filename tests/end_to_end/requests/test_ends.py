"""How requests end, what they report, and what the prefix cache gives them, to the token."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from deploy import LLM, SamplingParams
from deploy.config.load import EMBEDDED_MODEL
from deploy.doors.python.sources import Source
from deploy.frontend.errors import Fault
from deploy.frontend.outputs import GenerationError
from tests.end_to_end.engines import LLAMA, QWEN3, greedy, open_llm, run, tokens
from tests.end_to_end.prompts import VOCAB, draw
from tests.end_to_end.reference import Reference
from tests.end_to_end.waiting import wait_idle

BLOCK = 16
PROMPT = draw(40, seed=21)
CODE = "def add(a, b):\n"


@pytest.fixture(scope="module")
def llm(checkpoints: dict[str, Path]) -> Iterator[LLM]:
    """One group, ids only; chunks of 33 tokens."""
    with open_llm(checkpoints[QWEN3], block=BLOCK, dtype="float64", max_num_batched_tokens=33) as engine:
        yield engine


@pytest.fixture(scope="module")
def writer() -> Iterator[LLM]:
    """The example checkpoint, which has a tokenizer."""
    with open_llm(EMBEDDED_MODEL, block=BLOCK, dtype="float32", size=2) as engine:
        yield engine


# ---- ends


def test_a_stop_id_ends_the_output_and_is_its_last_token(llm: LLM) -> None:
    free = tokens(run(llm, [PROMPT], greedy(40)))[0][0]
    stop = free[7]
    output = run(llm, [PROMPT], greedy(40, stop_token_ids=(stop, VOCAB - 1)))[0].outputs[0]
    assert output.token_ids == free[: free.index(stop) + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)


def test_no_stop_id_is_sampled_before_min_tokens(llm: LLM) -> None:
    free = tokens(run(llm, [PROMPT], greedy(40)))[0][0]
    stops = tuple(set(free[:10]))
    output = run(llm, [PROMPT], greedy(40, stop_token_ids=stops, min_tokens=20))[0].outputs[0]
    assert not set(output.token_ids[:20]) & set(stops)
    assert len(output.token_ids) >= 20
    every = tuple(range(1, VOCAB))
    output = run(llm, [PROMPT], greedy(40, stop_token_ids=every, min_tokens=5))[0].outputs[0]
    assert output.token_ids[:5] == [0] * 5, "the one id that may not stop"
    assert (len(output.token_ids), output.finish_reason) == (6, "stop")


def test_the_models_own_end_stops_unless_ignored(llm: LLM, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    free = tokens(run(llm, [PROMPT], greedy(30)))[0][0]
    folder = tmp_path / "with-end"
    shutil.copytree(checkpoints[QWEN3], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": free[9]}))
    with open_llm(folder, block=BLOCK, dtype="float64") as other:
        stopped, ignored = run(other, [PROMPT] * 2, [greedy(30), greedy(30, ignore_eos=True)])
    assert stopped.outputs[0].token_ids == free[: free.index(free[9]) + 1]
    assert (stopped.outputs[0].finish_reason, stopped.outputs[0].stop_reason) == ("stop", None)
    assert (ignored.outputs[0].token_ids, ignored.outputs[0].finish_reason) == (free, "length")


@pytest.mark.few(5)
@pytest.mark.parametrize("max_tokens", [1, 15, 16, 17, 33, 18, 32, 34])
def test_max_tokens_at_a_block_border(llm: LLM, max_tokens: int) -> None:
    prompt = draw(16, seed=22)
    free = tokens(run(llm, [prompt], greedy(48)))[0][0]
    output = run(llm, [prompt], greedy(max_tokens))[0].outputs[0]
    assert (output.token_ids, output.finish_reason) == (free[:max_tokens], "length")


def test_the_last_token_needs_no_block(checkpoints: dict[str, Path]) -> None:
    """16 prompt tokens and 17 of output fill 32 slots: the last token's KV is never written."""
    prompt = draw(16, seed=22)
    with open_llm(checkpoints[QWEN3], block=BLOCK, blocks=2) as small:
        assert len(run(small, [prompt] * 3, greedy(17))[0].outputs[0].token_ids) == 17
        most = run(small, [prompt], SamplingParams(temperature=0.0, max_tokens=None))[0].outputs[0]
        assert (len(most.token_ids), most.finish_reason) == (17, "length"), "all that the pool allows"
        with pytest.raises(GenerationError, match="need 3 blocks of 16 tokens, but the largest pool has 2"):
            run(small, [prompt], greedy(18))
        wait_idle(small)


def test_a_deadline_that_has_passed_ends_one_request_and_spares_the_others(llm: LLM) -> None:
    expired, other = llm.stats().expired, draw(40, seed=23)
    prompts: list[Source] = [PROMPT, {"prompt_token_ids": other, "deadline_s": 0.0}]
    with pytest.raises(GenerationError, match="1 of 2 requests failed: the request did not end within 0 s") as caught:
        llm.generate(prompts, greedy(8), progress=False)
    fine, failed = caught.value.outputs
    assert (len(fine.outputs[0].token_ids), fine.fault) == (8, None)
    assert (failed.outputs[0].token_ids, failed.fault) == ([], Fault.TIMED_OUT)
    assert llm.stats().expired == expired + 1, "the scheduler itself ended it"
    wait_idle(llm)


def test_stop_strings_cut_the_text_across_token_borders(writer: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=48)
    free = writer.generate(CODE, params, progress=False)[0].outputs[0]
    assert len(free.text) > 20
    for start, length in ((3, 1), (8, 5), (12, 8)):
        stop = free.text[start : start + length]
        output = writer.generate(CODE, stopping(params, stop), progress=False)[0].outputs[0]
        assert output.text == free.text[: free.text.index(stop)]
        assert (output.finish_reason, output.stop_reason) == ("stop", stop)
        assert output.token_ids == free.token_ids[: len(output.token_ids)]
        assert len(output.token_ids) < len(free.token_ids), "the engine was told to stop"
    wait_idle(writer)


def test_of_several_stop_strings_the_first_in_the_text_wins(writer: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=48)
    free = writer.generate(CODE, params, progress=False)[0].outputs[0].text
    late, early = free[15:20], free[6:9]
    output = writer.generate(CODE, stopping(params, late, "never in it", early), progress=False)[0].outputs[0]
    first = min((late, early), key=free.index)
    assert (output.stop_reason, output.text) == (first, free[: free.index(first)])


def stopping(params: SamplingParams, *stop: str) -> SamplingParams:
    return SamplingParams(temperature=params.temperature, max_tokens=params.max_tokens, stop=stop)


# ---- choices


def test_choices_differ_and_do_not_depend_on_how_many_there_are(llm: LLM) -> None:
    def choices(n: int) -> list[list[int]]:
        return tokens(run(llm, [PROMPT], SamplingParams(temperature=1.0, seed=5, n=n, max_tokens=20)))[0]

    five = choices(5)
    assert len({tuple(choice) for choice in five}) == 5
    assert choices(2) == five[:2]
    wait_idle(llm)


def test_requests_without_a_seed_differ(llm: LLM) -> None:
    outputs = tokens(run(llm, [PROMPT] * 4, SamplingParams(temperature=1.0, max_tokens=20)))
    assert len({tuple(output[0]) for output in outputs}) == 4


# ---- log-probabilities


@pytest.mark.parametrize("size", [1, 2])
def test_logprobs_are_those_of_transformers(size: int, checkpoints: dict[str, Path], references: dict[str, Reference]) -> None:
    """Of the model's own distribution, whatever is done to it before sampling."""
    params = [
        greedy(20, logprobs=5),
        SamplingParams(temperature=2.0, seed=3, top_k=30, max_tokens=20, logprobs=20, logit_bias={9: 5.0}),
        SamplingParams(temperature=1.0, seed=4, max_tokens=20, logprobs=0, repetition_penalty=1.5),
    ]
    prompts = [PROMPT, draw(257, seed=23), draw(17, seed=24)]
    with open_llm(checkpoints[LLAMA], block=BLOCK, size=size, max_num_batched_tokens=64) as llm:
        outputs = run(llm, prompts, params)
    for prompt, each, output in zip(prompts, params, outputs, strict=True):
        choice = output.outputs[0]
        expected = torch.log_softmax(references[LLAMA].logits(prompt, choice.token_ids).double(), -1)
        assert choice.logprobs is not None
        for token, entries, row in zip(choice.token_ids, choice.logprobs, expected, strict=True):
            assert next(iter(entries)) == token
            for entry, value in entries.items():
                assert value.logprob == pytest.approx(float(row[entry]), abs=2e-4)
            top = sorted(value.logprob for value in entries.values() if value.rank is not None)[::-1]
            assert len(top) == each.logprobs
            assert top == pytest.approx(row.topk(len(top)).values.tolist(), abs=2e-4)


# ---- the prefix cache


@pytest.mark.parametrize(("length", "cached"), [(300, 299), (256, 255), (257, 256), (16, 15), (17, 16), (1, 0)])
def test_cached_tokens_are_exact(llm: LLM, length: int, cached: int) -> None:
    """All but the last token, which is computed even if its KV is there."""
    prompt = draw(length, seed=100 + length)
    first, second = (run(llm, [prompt], greedy(20))[0] for _ in range(2))
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, cached)
    assert first.outputs[0].token_ids == second.outputs[0].token_ids


def test_what_was_generated_is_cached_too(llm: LLM) -> None:
    prompt = draw(40, seed=31)
    output = tokens(run(llm, [prompt], greedy(25)))[0][0]
    follow_up = [*prompt, *output, 1, 2, 3]
    again = run(llm, [follow_up], greedy(10))[0]
    assert again.num_cached_tokens == 64, "64 of the 65 tokens so far have KV"
    elsewhere = {"prompt_token_ids": follow_up, "cache_salt": "another tenant"}
    salted = llm.generate(elsewhere, greedy(10), progress=False)[0]
    assert salted.num_cached_tokens == 0
    assert salted.outputs[0].token_ids == again.outputs[0].token_ids


def test_one_new_prefix_in_one_batch_is_computed_once(llm: LLM) -> None:
    prefix = draw(64, seed=32)
    prompts = [[*prefix, *draw(9, seed=seed)] for seed in range(40, 46)]
    together = run(llm, prompts, greedy(12))
    assert [output.num_cached_tokens for output in together] == [0, *[64] * 5]
    for prompt, output in zip(prompts, together, strict=True):
        salted = {"prompt_token_ids": prompt, "cache_salt": f"{prompt[-1]} alone"}
        alone = llm.generate(salted, greedy(12), progress=False)[0]
        assert (alone.num_cached_tokens, alone.outputs[0].token_ids) == (0, output.outputs[0].token_ids)


def test_twins_share_the_blocks_that_they_generate(checkpoints: dict[str, Path]) -> None:
    """Equal sequences in step: each adopts the block published first, and its own copy is soon another's."""
    twin, counts = draw(20, seed=34), [60, 40, 50, 20, 60, 45]
    others = [draw(9, seed=35 + i) for i in range(6)]
    with open_llm(checkpoints[QWEN3], block=BLOCK, dtype="float64") as roomy:
        expected = [output[0] for output in tokens(run(roomy, [twin, *others], greedy(60)))]
    with open_llm(checkpoints[QWEN3], block=BLOCK, blocks=14, dtype="float64") as tight:
        for _ in range(2):
            outputs = tokens(run(tight, [twin] * 6 + others, [*map(greedy, counts), *[greedy(60)] * 6]))
            assert [output[0] for output in outputs] == [*(expected[0][:count] for count in counts), *expected[1:]]
            wait_idle(tight)


def test_nothing_is_cached_where_it_is_switched_off(checkpoints: dict[str, Path]) -> None:
    prompt = draw(64, seed=33)
    with open_llm(checkpoints[QWEN3], block=BLOCK, enable_prefix_caching=False) as plain:
        outputs = [run(plain, [prompt] * 2, greedy(8)) for _ in range(2)]
        stats = plain.stats()
    assert all(output.num_cached_tokens == 0 for turn in outputs for output in turn)
    assert stats.groups[0].cached_blocks == 0
