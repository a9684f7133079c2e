"""Embeddings and scores are those of transformers, however prompts are cut, shared, preempted, or who computes them."""

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers

from deploy import LLM, SamplingParams
from deploy.doors.python.sources import Source
from deploy.frontend.outputs import EmbeddingRequestOutput
from deploy.text.content import PromptError
from tests.end_to_end.engines import ARCHITECTURES, LLAMA, QWEN3, open_llm, run, tokens
from tests.end_to_end.prompts import PROMPTS, SHARED, draw
from tests.end_to_end.reference import embeddings
from tests.end_to_end.waiting import wait_idle
from tests.shared.checkpoints import make_checkpoint
from tests.shared.tokenizers import EOS, byte_level, save

ROUNDING = 2e-5
TEXTS = [SHARED, [*SHARED[:256], *draw(5, seed=30)], draw(257, seed=31), draw(16, seed=32), draw(1, seed=33), SHARED[:33]]
"""Whole blocks and not, one with a beginning of another's, a single token."""


def embed(llm: LLM, prompts: Sequence[list[int]], **how: Any) -> list[EmbeddingRequestOutput]:
    sources: list[Source] = list(prompts)
    outputs = llm.embed(sources, progress=False, **how)
    wait_idle(llm)
    return outputs


def vectors(outputs: Sequence[EmbeddingRequestOutput]) -> npt.NDArray[np.float64]:
    return np.array([output.outputs.embedding for output in outputs])


@pytest.mark.few
@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize(("size", "block", "budget"), [(1, 256, 2048), (1, 16, 100), (2, 16, 100), (2, 256, 2048)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_they_are_those_of_transformers(
    architecture: str, size: int, block: int, budget: int, pooling: str, checkpoints: dict[str, Path]
) -> None:
    """Twice: the second time what can be hit is."""
    path = checkpoints[architecture]
    with open_llm(path, size=size, block=block, pooling=pooling, max_num_batched_tokens=budget) as llm:
        runs = [embed(llm, TEXTS) for _ in range(2)]
    for outputs in runs:
        np.testing.assert_allclose(vectors(outputs), embeddings(path, TEXTS, pooling), atol=ROUNDING)
    cached = [output.num_cached_tokens for output in runs[1]]
    if pooling == "mean":
        assert cached == [0] * len(TEXTS), "what is cached has no hidden states"
    else:
        parts = [len(text) - 1 for text in TEXTS]
        assert all(block - block // 2 >= most - found >= 0 for found, most in zip(cached, parts, strict=True))
        assert sum(cached) > sum(parts) // 2


def test_the_cache_is_one_for_all(checkpoints: dict[str, Path]) -> None:
    """What a mean has computed others hit, generations too; a last token hits what was generated."""
    with open_llm(checkpoints[QWEN3], pooling="mean") as llm:
        embed(llm, [SHARED])
        wait_idle(llm)
        [answer] = run(llm, [SHARED], SamplingParams(temperature=0.0, max_tokens=40))
        assert answer.num_cached_tokens == len(SHARED) - 1
    with open_llm(checkpoints[QWEN3]) as llm:
        [answer] = run(llm, [SHARED], SamplingParams(temperature=0.0, max_tokens=46))
        wait_idle(llm)
        whole = [*SHARED, *answer.outputs[0].token_ids]
        [output] = embed(llm, [whole])
        assert output.num_cached_tokens == len(whole) - 1
        np.testing.assert_allclose(vectors([output]), embeddings(checkpoints[QWEN3], [whole], "last"), atol=ROUNDING)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_among_others_in_a_pool_that_is_too_small(pooling: str, checkpoints: dict[str, Path]) -> None:
    """Sequences give way to each other, and nobody's numbers or tokens change."""
    path, how = checkpoints[LLAMA], SamplingParams(temperature=0.0, max_tokens=30)
    with open_llm(path) as llm:
        undisturbed = tokens(run(llm, PROMPTS, how))
    with open_llm(path, blocks=35, pooling=pooling, max_num_batched_tokens=100) as llm:
        generated: list[list[list[list[int]]]] = []
        thread = threading.Thread(target=lambda: generated.append(tokens(run(llm, PROMPTS, how))))
        thread.start()
        rounds = 0
        while thread.is_alive() or not rounds:
            outputs = llm.embed([*TEXTS], progress=False)
            np.testing.assert_allclose(vectors(outputs), embeddings(path, TEXTS, pooling), atol=ROUNDING)
            rounds += 1
        thread.join()
        wait_idle(llm)
        assert llm.stats().preemptions > 0
    assert generated == [undisturbed]


def test_dimensions_cut_and_the_rest_has_length_1(checkpoints: dict[str, Path]) -> None:
    path = checkpoints[QWEN3]
    with open_llm(path) as llm:
        whole, cut = vectors(embed(llm, TEXTS)), vectors(embed(llm, TEXTS, dimensions=10))
        assert cut.shape == (len(TEXTS), 10)
        np.testing.assert_allclose(np.linalg.norm(cut, axis=1), 1.0, atol=1e-6)
        np.testing.assert_allclose(cut, whole[:, :10] / np.linalg.norm(whole[:, :10], axis=1, keepdims=True), atol=1e-5)
        with pytest.raises(PromptError, match=r"dimensions=65 is outside \[1, 64\]"):
            embed(llm, TEXTS, dimensions=65)


def test_a_prompt_may_fill_the_model_and_no_more(checkpoints: dict[str, Path]) -> None:
    """No room is needed for an output."""
    with open_llm(checkpoints[QWEN3], max_model_len=64) as llm:
        full = draw(64, seed=3)
        np.testing.assert_allclose(
            vectors(embed(llm, [full])), embeddings(checkpoints[QWEN3], [full], "last"), atol=ROUNDING
        )
        with pytest.raises(PromptError, match="length is 64 tokens, and the prompt has 65: shorten it to 64 or fewer"):
            embed(llm, [draw(65, seed=3)])
        with pytest.raises(PromptError, match="the prompt is empty"):
            embed(llm, [[]])


def with_tokenizer(path: Path, architecture: str, **fields: Any) -> Path:
    """A checkpoint that reads text."""
    make_checkpoint(path, architecture, vocab_size=419, eos_token_id=EOS, pad_token_id=EOS, **fields)
    return save(byte_level(), path)


PAIRS = [("hello world", "niño says hello"), ("hello world", "stop !"), ("and again", "the café")]


def test_a_classifiers_scores_are_those_of_transformers(tmp_path: Path) -> None:
    """Of one label; texts are joined as the tokenizer joins pairs. Nothing else is served of it."""
    path = with_tokenizer(tmp_path / "judge", "Qwen3ForSequenceClassification", num_labels=1)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    with torch.inference_mode():
        logits = [float(model(**tokenizer(*pair, return_tensors="pt")).logits[0, 0]) for pair in PAIRS]
    with open_llm(path) as llm:
        outputs = llm.score([first for first, _ in PAIRS], [second for _, second in PAIRS], progress=False)
        scores = [output.outputs.score for output in outputs]
        np.testing.assert_allclose(scores, 1 / (1 + np.exp(-np.array(logits))), atol=1e-4)
        assert len({round(score, 3) for score in scores}) == len(PAIRS)
        with pytest.raises(PromptError, match="the checkpoint is a classifier"):
            llm.embed("hello", progress=False)
        with pytest.raises(PromptError, match="it generates nothing"):
            llm.generate("hello", progress=False)


def test_a_classifier_of_several_labels_scores_nothing(tmp_path: Path) -> None:
    with (
        open_llm(with_tokenizer(tmp_path / "three", "LlamaForSequenceClassification", num_labels=3)) as llm,
        pytest.raises(PromptError, match="has 3 labels, and a score is of one"),
    ):
        llm.score("hello", "world", progress=False)


JUDGE = (
    "{% for message in messages %}{% if message.role == 'query' %}<|im_start|>{{ instruction or 'find' }} "
    "{{ message.content }}{% elif message.role == 'document' %} : {{ message.content }}<|im_end|>{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("size", [1, 2])
def test_a_judges_scores_are_its_odds_of_yes(size: int, tmp_path: Path) -> None:
    """As Qwen3-Reranker has them: a template for pairs, and one next token against another. Documents share the query."""
    path = with_tokenizer(tmp_path / "judge", QWEN3, tied=True)
    (path / "chat_template.jinja").write_text(JUDGE)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    no, yes = (tokenizer.convert_tokens_to_ids(token) for token in ("n", "y"))
    assert None not in (no, yes)
    query, documents = "hello world " * 20, ["niño says hello", "stop !", "the café"]

    def odds(instruction: str) -> list[float]:
        texts = [f"<|im_start|>{instruction} {query} : {document}<|im_end|>" for document in documents]
        ids = [tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids for text in texts]
        with torch.inference_mode():
            logits = [model(each).logits[0, -1] for each in ids]
        return [float(each[yes] - each[no]) for each in logits]

    with open_llm(path, size=size, score_tokens="n,y") as llm:
        for instruction, told in (("find", None), ("seek", {"instruction": "seek"})):
            outputs = llm.score(query, documents, chat_template_kwargs=told, progress=False)
            scores = [output.outputs.score for output in outputs]
            np.testing.assert_allclose(scores, 1 / (1 + np.exp(-np.array(odds(instruction)))), atol=1e-4)
        assert outputs[-1].num_cached_tokens > len(tokenizer(query).input_ids) // 2
        assert llm.generate("hello", SamplingParams(max_tokens=3), progress=False)[0].outputs[0].token_ids


def test_what_sentence_transformers_say_is_done(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Its files choose the mean, and no length."""
    for file in checkpoints[QWEN3].iterdir():
        (tmp_path / file.name).symlink_to(file)
    kinds = [("", "sentence_transformers.models.Transformer"), ("1_Pooling", "sentence_transformers.models.Pooling")]
    (tmp_path / "modules.json").write_text(json.dumps([{"path": folder, "type": kind} for folder, kind in kinds]))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    with open_llm(tmp_path) as llm:
        found = vectors(embed(llm, TEXTS))
    lengths = np.linalg.norm(found, axis=1, keepdims=True)
    assert (np.abs(lengths - 1.0) > 0.1).all()
    np.testing.assert_allclose(found / lengths, embeddings(tmp_path, TEXTS, "mean"), atol=ROUNDING)


def test_scores_of_embeddings_are_their_cosine(tmp_path: Path) -> None:
    path = with_tokenizer(tmp_path / "embedder", QWEN3)
    with open_llm(path) as llm:
        [first, *others] = vectors(llm.embed(["hello world", "the café", "and again"], progress=False))
        outputs = llm.score("hello world", ["the café", "and again", "hello world"], progress=False)
        scores = [output.outputs.score for output in outputs]
        np.testing.assert_allclose(scores, [*(first @ other for other in others), 1.0], atol=1e-5)
        with pytest.raises(PromptError, match="text_1 has 2 texts and text_2 3"):
            llm.score(["a", "b"], ["c", "d", "e"], progress=False)
        with pytest.raises(PromptError, match="leave them out"):
            llm.score("a", "b", chat_template_kwargs={"instruction": "x"}, progress=False)
