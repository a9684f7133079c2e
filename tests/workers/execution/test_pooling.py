"""Prompts that are pooled instead of continued: what transformers makes of their hidden states, however they are cut."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers

from scheduler.protocol.messages import FinishReason, Pooling
from scheduler.protocol.sampling import SamplingParams
from tests.shared.checkpoints import make_checkpoint
from tests.workers.stepping import Lease, Stepped, Work
from workers.execution.gpu import chunks
from workers.execution.gpu import runner as gpu_runner
from workers.process import build

Vector = npt.NDArray[np.float32]

NO, YES = 7, 11
GREEDY = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
PROMPTS = [[5], [1, 2], list(range(1, 16)), list(range(20, 37)), [3, 9] * 13]
"""One token, a whole block of 16, a little more, and more than a step's tokens."""

KINDS: dict[str, dict[str, Any]] = {
    "Qwen3ForCausalLM": {},
    "MistralModel": {"num_hidden_layers": 1},
    "LlamaForSequenceClassification": {"num_labels": 1, "pad_token_id": 0, "num_hidden_layers": 1},
    "Qwen2ForSequenceClassification": {"num_labels": 3, "pad_token_id": 0, "num_hidden_layers": 1},
}
"""Two layers where tests look at steps; the interpreter takes its time for each."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pooled")
    few: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 48}
    return {
        name: make_checkpoint(folder / name, name, seed=seed, **few, **more)
        for seed, (name, more) in enumerate(KINDS.items())
    }


@cache
def reference(path: Path) -> torch.nn.Module:
    model: torch.nn.Module = transformers.AutoModel.from_pretrained(path, dtype=torch.float32).eval()
    return model


@torch.inference_mode()
def hidden_states(path: Path, prompt: Sequence[int]) -> torch.Tensor:
    """[tokens, hidden] behind the final norm, as transformers has them."""
    states: torch.Tensor = reference(path)(torch.tensor([prompt])).last_hidden_state[0]
    return states


def expected(path: Path, prompt: Sequence[int], pooling: Pooling) -> Vector:
    states = hidden_states(path, prompt)
    vector: Vector = (states.mean(0) if pooling == "mean" else states[-1]).numpy()
    return vector


def pooled(stepped: Stepped, prompts: Sequence[Sequence[int]], pooling: Pooling) -> list[Vector]:
    leases = stepped.generate([Work([*prompt], GREEDY, pooling=pooling) for prompt in prompts])
    return [vector_of(lease) for lease in leases]


def vector_of(lease: Lease) -> Vector:
    assert (lease.finish, lease.tokens) == (FinishReason.STOP, [])
    assert lease.pooled is not None
    return lease.pooled


@pytest.fixture(params=["cpu", "gpu"])
def runner(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """How ranks are built: for a CPU, and as for a GPU, under Triton's interpreter."""
    few = {"max_num_seqs": 4, "max_num_batched_tokens": 12, "max_model_len": 64}
    if request.param == "cpu":
        return few
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("where there is a GPU, tests/gpu runs on it")
    monkeypatch.setattr(build, "_cpu_runner", build._gpu_runner)
    for module in (chunks, gpu_runner):
        monkeypatch.setattr(module, "PADDED_CHUNKS", 4)
    return {**few, "attention": "triton", "cuda_graphs": False}


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("runner", "pooling", "depth"),
    [("cpu", "last", 0), ("cpu", "mean", 1), ("gpu", "last", 1), ("gpu", "mean", 0)],
    indirect=["runner"],
)
def test_they_are_those_of_transformers(
    pooling: Pooling, depth: int, runner: dict[str, Any], checkpoints: dict[str, Path]
) -> None:
    """In chunks of 12 tokens, several prompts together, the mean over all chunks."""
    path = checkpoints["Qwen3ForCausalLM"]
    stepped = Stepped(path, device="cpu", depth=depth, **runner)
    try:
        for vector, prompt in zip(pooled(stepped, PROMPTS, pooling), PROMPTS, strict=True):
            np.testing.assert_allclose(vector, expected(path, prompt, pooling), rtol=2e-4, atol=2e-4)
    finally:
        stepped.close()


@pytest.mark.few(1)
def test_beside_sequences_that_decode_and_are_measured(runner: dict[str, Any], checkpoints: dict[str, Path]) -> None:
    """Neither disturbs the other, also where one token of the prompt is left to compute."""
    path = checkpoints["Qwen3ForCausalLM"]
    stepped = Stepped(path, device="cpu", depth=1, **runner)
    params = SamplingParams(temperature=0.0, max_tokens=8, prompt_logprobs=1, ignore_eos=True)
    talk = [Work([4, 5, 6], GREEDY), Work([8, 9, 10, 11], params)]
    try:
        alone = stepped.generate(talk)
        wants: list[tuple[list[int], Pooling]] = [([3, 4, 5], "last"), ([6], "last"), ([7, 8], "mean"), ([9], "mean")]
        leases = stepped.generate([talk[0], *(Work(prompt, GREEDY, pooling=how) for prompt, how in wants), talk[1]])
        assert [leases[0].tokens, leases[-1].tokens] == [lease.tokens for lease in alone]
        measured, undisturbed = leases[-1].prompt_logprobs, alone[1].prompt_logprobs
        assert [entry.logprob for entry in measured] == pytest.approx([entry.logprob for entry in undisturbed], abs=1e-4)
        for lease, (prompt, how) in zip(leases[1:-1], wants, strict=True):
            np.testing.assert_allclose(vector_of(lease), expected(path, prompt, how), rtol=2e-4, atol=2e-4)
    finally:
        stepped.close()


@pytest.mark.few(1)
@pytest.mark.parametrize("cached", [0, 15, 16])
def test_the_last_token_needs_no_more_than_itself(cached: int, runner: dict[str, Any], checkpoints: dict[str, Path]) -> None:
    """What another sequence has computed stands for the rest, up to all but the last token."""
    path, prompt = checkpoints["Qwen3ForCausalLM"], list(range(1, 18))
    stepped = Stepped(path, device="cpu", depth=0, **runner)
    try:
        first = stepped.start(Work([*prompt], SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)))
        stepped.prefill([first])
        turns = stepped.turns
        lease = stepped.start(Work([*prompt], GREEDY, pooling="last"), cached=cached, own=first.blocks[:2])
        while lease.finish is None:
            stepped.turn()
        assert cached < 15 or stepped.turns == turns + 1, "one step computes what is left"
        np.testing.assert_allclose(vector_of(lease), expected(path, prompt, "last"), rtol=2e-4, atol=2e-4)
        stepped.drop_all()
    finally:
        stepped.close()


@pytest.mark.few(1)
def test_a_mean_that_was_given_up_leaves_nothing_to_the_next(runner: dict[str, Any], checkpoints: dict[str, Path]) -> None:
    """The row is another sequence's, or the same one's again, whose sum begins anew."""
    path, prompt = checkpoints["Qwen3ForCausalLM"], [3, 9] * 13
    stepped = Stepped(path, device="cpu", depth=1, **runner)
    try:
        for _ in range(2):
            begun = stepped.start(Work([*prompt], GREEDY, pooling="mean"))
            for _ in range(2):
                stepped.turn()
            assert begun.finish is None
            stepped.drop(begun)
        (vector,) = pooled(stepped, [prompt], "mean")
        np.testing.assert_allclose(vector, expected(path, prompt, "mean"), rtol=2e-4, atol=2e-4)
    finally:
        stepped.close()


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("runner", "name"),
    [
        ("cpu", "LlamaForSequenceClassification"),
        ("cpu", "Qwen2ForSequenceClassification"),
        ("gpu", "Qwen2ForSequenceClassification"),
    ],
    indirect=["runner"],
)
def test_a_classifiers_labels(name: str, runner: dict[str, Any], checkpoints: dict[str, Path]) -> None:
    path = checkpoints[name]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    stepped = Stepped(path, device="cpu", depth=0, **runner)
    try:
        with torch.inference_mode():
            for vector, prompt in zip(pooled(stepped, PROMPTS, "score"), PROMPTS, strict=True):
                logits = model(torch.tensor([prompt])).logits[0].numpy()
                np.testing.assert_allclose(vector, logits, rtol=5e-4, atol=5e-4)
    finally:
        stepped.close()


@pytest.mark.few(1)
@pytest.mark.parametrize(("runner", "tied"), [("cpu", False), ("cpu", True), ("gpu", True)], indirect=["runner"])
def test_one_token_against_the_other(tied: bool, runner: dict[str, Any], tmp_path: Path) -> None:
    """As Qwen3-Reranker judges: the log-odds of yes. sentence-transformers' files say which tokens those are."""
    few: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    path = make_checkpoint(tmp_path / "judge", tied=tied, **few)
    transformer, judge = "sentence_transformers.base.modules.transformer.Transformer", "sentence_transformers.LogitScore"
    (path / "modules.json").write_text(
        f'[{{"idx": 0, "path": "", "type": "{transformer}"}}, {{"idx": 1, "path": "1_LogitScore", "type": "{judge}"}}]'
    )
    (path / "1_LogitScore").mkdir()
    (path / "1_LogitScore" / "config.json").write_text(f'{{"true_token_id": {YES}, "false_token_id": {NO}}}')
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    stepped = Stepped(path, device="cpu", depth=0, **runner)
    try:
        with torch.inference_mode():
            for vector, prompt in zip(pooled(stepped, PROMPTS, "score"), PROMPTS, strict=True):
                logits = model(torch.tensor([prompt])).logits[0, -1]
                np.testing.assert_allclose(vector, [float(logits[YES] - logits[NO])], rtol=1e-3, atol=1e-3)
    finally:
        stepped.close()


def test_a_decoder_without_a_head(runner: dict[str, Any], checkpoints: dict[str, Path]) -> None:
    """As models for embeddings are saved: their tensors' names begin with the layers'."""
    path = checkpoints["MistralModel"]
    stepped = Stepped(path, device="cpu", depth=0, **runner)
    try:
        for vector, prompt in zip(pooled(stepped, PROMPTS, "last"), PROMPTS, strict=True):
            np.testing.assert_allclose(vector, expected(path, prompt, "last"), rtol=2e-4, atol=2e-4)
    finally:
        stepped.close()
