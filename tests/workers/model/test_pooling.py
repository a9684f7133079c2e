"""What a checkpoint's files say its hidden states are good for."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.shared.checkpoints import make_checkpoint
from tests.shared.tokenizers import byte_level, save
from workers.model.config.architectures import ModelConfig, read_config
from workers.model.config.fields import CheckpointError
from workers.model.pooling import Uses, read_uses

TRANSFORMER = "sentence_transformers.models.Transformer"
SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 419}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(byte_level(), make_checkpoint(tmp_path / "model", **SMALL))


@pytest.fixture
def model(folder: Path) -> ModelConfig:
    return read_config(folder)


def add_modules(folder: Path, *kinds: str, **pooling: Any) -> None:
    """kinds: of the modules behind the decoder, each with a folder. pooling: what the first of them is told."""
    modules = [{"path": "", "type": TRANSFORMER}]
    for number, kind in enumerate(kinds, start=1):
        (folder / f"{number}_{kind}").mkdir()
        (folder / f"{number}_{kind}" / "config.json").write_text(json.dumps(pooling))
        modules.append({"path": f"{number}_{kind}", "type": f"sentence_transformers.models.{kind}"})
    (folder / "modules.json").write_text(json.dumps(modules))


def test_a_language_model_by_itself(folder: Path, model: ModelConfig) -> None:
    assert read_uses(folder, model) == Uses(32, True, "last", normalized=True, scores="embeddings")
    assert read_uses(folder, model, "mean").embedding == "mean"


@pytest.mark.parametrize(
    ("mode", "embedding"), [("pooling_mode_lasttoken", "last"), ("pooling_mode_mean_tokens", "mean")]
)
@pytest.mark.parametrize("normalized", [False, True])
def test_pooling_as_sentence_transformers_has_it(
    folder: Path, model: ModelConfig, mode: str, embedding: str, normalized: bool
) -> None:
    more = ("Normalize",) if normalized else ()
    add_modules(folder, "Pooling", *more, **{"pooling_mode_cls_token": False, mode: True, "include_prompt": True})
    uses = read_uses(folder, model)
    assert (uses.embedding, uses.normalized) == (embedding, normalized)


def test_what_is_not_computed_is_named(folder: Path, model: ModelConfig) -> None:
    add_modules(folder, "Pooling", pooling_mode_cls_token=True, pooling_mode_mean_tokens=False)
    uses = read_uses(folder, model)
    assert (uses.embedding, uses.scores) == (None, None)
    assert "pools by pooling_mode_cls_token" in uses.no_embedding == uses.no_scores
    assert read_uses(folder, model, "last").embedding == "last", "who says how is believed"


def test_a_projection_behind_it_is_not_computed(folder: Path, model: ModelConfig) -> None:
    add_modules(folder, "Pooling", "Dense", pooling_mode_mean_tokens=True)
    assert "a module 'Dense' behind its decoder" in read_uses(folder, model).no_embedding


def test_modules_without_pooling(folder: Path, model: ModelConfig) -> None:
    add_modules(folder)
    assert "choose one with --pooling" in read_uses(folder, model).no_embedding


def test_a_judge(folder: Path, model: ModelConfig) -> None:
    add_modules(folder, "LogitScore", true_token_id=8, false_token_id=9)
    uses = read_uses(folder, model)
    assert (uses.scores, uses.score_tokens, uses.embedding, uses.generates) == ("classifier", (9, 8), None, True)


@pytest.mark.parametrize(
    ("tokens", "words"), [({"true_token_id": 8, "false_token_id": None}, "one against the other"),
                          ({"true_token_id": 8, "false_token_id": 419}, "outside the vocabulary of 419")]
)  # fmt: skip
def test_a_judge_whose_tokens_cannot_be(folder: Path, model: ModelConfig, tokens: dict[str, Any], words: str) -> None:
    add_modules(folder, "LogitScore", **tokens)
    with pytest.raises(CheckpointError, match=words):
        read_uses(folder, model)


def test_tokens_by_their_names(folder: Path, model: ModelConfig) -> None:
    uses = read_uses(folder, model, score_tokens="n, y")
    assert uses.scores == "classifier"
    assert uses.score_tokens is not None
    assert len({*uses.score_tokens}) == 2
    for given, words in (("yes", 'give them as "no,yes"'), ("n,ŷ", "'ŷ' is no token")):
        with pytest.raises(CheckpointError, match=words):
            read_uses(folder, model, score_tokens=given)


def test_classifiers_and_decoders_without_a_head(folder: Path, model: ModelConfig) -> None:
    one = read_uses(folder, replace(model, head="labels", labels=1))
    assert (one.generates, one.embedding, one.scores) == (False, None, "classifier")
    two = read_uses(folder, replace(model, head="labels", labels=2))
    assert (two.scores, "2 labels" in two.no_scores) == (None, True)
    bare = replace(model, head="none")
    assert read_uses(folder, bare) == Uses(32, False, "last", normalized=True, scores="embeddings")
    with pytest.raises(CheckpointError, match="no logits of next tokens"):
        read_uses(folder, bare, score_tokens="n,y")


def test_files_that_cannot_be_read(folder: Path, model: ModelConfig) -> None:
    (folder / "modules.json").write_text('[{"type": 3}]')
    with pytest.raises(CheckpointError, match=r"modules\.json cannot be read"):
        read_uses(folder, model)


@pytest.mark.parametrize(("labels", "found"), [(1, 1), (2, 2), (3, 3)])
def test_labels(labels: int, found: int, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "Qwen3ForSequenceClassification", num_labels=labels, **SMALL)
    config = read_config(path)
    assert (config.head, config.labels) == ("labels", found)


@pytest.mark.parametrize("field", [{"is_causal": False}, {"use_bidirectional_attention": True}])
def test_attention_to_later_tokens_is_refused(field: dict[str, bool], folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text()) | field
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="attention to later tokens"):
        read_config(folder)
