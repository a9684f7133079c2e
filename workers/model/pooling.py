"""What a checkpoint's hidden states are good for: embeddings, scores of pairs, or neither; read from its own files.

As sentence-transformers leaves them (`modules.json` and a folder for each module), else by the architecture.
Imports the checkpoint's fields; transformers only where tokens are given by their names.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from workers.model.config.architectures import ModelConfig
from workers.model.config.fields import CheckpointError, Fields, read_json
from workers.model.reading import DecoderConfig
from workers.model.sources.files import MODULES_FILE
from workers.sampling.tokenizer_files import has_tokenizer, open_tokenizer

MODES: dict[str, Literal["last", "mean"]] = {"pooling_mode_lasttoken": "last", "pooling_mode_mean_tokens": "mean"}
"""What of sentence-transformers' ways to pool is computed."""


@dataclass(frozen=True, slots=True)
class Uses:
    """hidden: numbers of a hidden state. generates: it has logits of next tokens. embedding: how hidden states become one;
    None: not at all, and `no_embedding` says why. normalized: it is then given length 1. scores: "embeddings", by their
    cosine; "classifier", which looks at both texts of a pair together; None: not at all, and `no_scores` says why.
    score_tokens: ids, (no, yes), of a language model that judges by its next token.
    """

    hidden: int
    generates: bool
    embedding: Literal["last", "mean"] | None
    normalized: bool = True
    scores: Literal["embeddings", "classifier"] | None = None
    score_tokens: tuple[int, int] | None = None
    no_embedding: str = ""
    no_scores: str = ""


def read_uses(folder: Path, model: DecoderConfig, pooling: str = "auto", score_tokens: str | None = None) -> Uses:
    """pooling: "auto", as the checkpoint says, "last" or "mean". score_tokens: the two tokens of a judge, "no,yes".
    Errors: CheckpointError."""
    if not isinstance(model, ModelConfig):
        return _only_continues(score_tokens)
    modules = _modules(folder)
    tokens = _token_ids(folder, score_tokens) if score_tokens is not None else _judging_tokens(modules)
    if tokens is not None and model.head != "vocabulary":
        raise CheckpointError(f"{folder} has no logits of next tokens to score with: leave score_tokens out")
    if tokens is not None and max(tokens) >= model.vocab_size:
        raise CheckpointError(f"a token that judges, {max(tokens)}, is outside the vocabulary of {model.vocab_size} entries")
    if model.head == "labels":
        return _classifier(model)
    mode, why = (pooling, "") if pooling != "auto" else _pooling(folder, modules)
    embedding = next((known for known in MODES.values() if known == mode), None)
    normalized = not modules or any(kind == "Normalize" for kind, _ in modules)
    scores: Literal["embeddings", "classifier"] | None = None if embedding is None else "embeddings"
    if tokens is not None:
        scores = "classifier"
    return Uses(model.hidden, model.head == "vocabulary", embedding, normalized, scores, tokens, why, why)


def _only_continues(score_tokens: str | None) -> Uses:
    """A class of transformers, of which this server asks for logits alone."""
    if score_tokens is not None:
        raise CheckpointError("scores are not computed through transformers' classes: leave score_tokens out")
    why = "its layers are transformers' own, through which neither embeddings nor scores are computed (docs/models.md)"
    return Uses(0, True, None, no_embedding=why, no_scores=why)


def _classifier(model: ModelConfig) -> Uses:
    one = model.labels == 1
    return Uses(
        hidden=model.hidden,
        generates=False,
        embedding=None,
        scores="classifier" if one else None,
        no_embedding="the checkpoint is a classifier, and its hidden states are made for its labels",
        no_scores="" if one else f"the checkpoint's classifier has {model.labels} labels, and a score is of one",
    )


def _modules(folder: Path) -> list[tuple[str, Path]]:
    """(kind, folder) of each of sentence-transformers' modules; none where it has not written any."""
    path = folder / MODULES_FILE
    if not path.exists():
        return []
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
        return [(str(module["type"]).rpartition(".")[2], folder / str(module["path"])) for module in listed]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error!r}): repair or download the file again") from error


def _pooling(folder: Path, modules: list[tuple[str, Path]]) -> tuple[str, str]:
    """How the checkpoint's hidden states are pooled, or "" and why they are not."""
    if not modules:
        return "last", ""
    others = [kind for kind, _ in modules if kind not in ("Transformer", "Pooling", "Normalize", "LogitScore")]
    if others:
        where = folder / MODULES_FILE
        return "", f"the checkpoint has a module {others[0]!r} behind its decoder, which is not computed ({where})"
    path = next((path for kind, path in modules if kind == "Pooling"), None)
    if path is None:
        return "", f"the checkpoint says of no way to pool ({folder / MODULES_FILE}): choose one with --pooling"
    settings = read_json(path / "config.json")
    modes = [name for name, value in settings.items() if name.startswith("pooling_mode_") and value is True]
    if len(modes) == 1 and modes[0] in MODES:
        return MODES[modes[0]], ""
    named = ", ".join(modes) or settings.get("pooling_mode") or "none"
    return "", f"the checkpoint pools by {named}, and only the last token and the mean are computed: see --pooling"


def _judging_tokens(modules: list[tuple[str, Path]]) -> tuple[int, int] | None:
    """As sentence-transformers names them."""
    path = next((path / "config.json" for kind, path in modules if kind == "LogitScore"), None)
    if path is None:
        return None
    fields = Fields(read_json(path), path)
    yes, no = fields.get("true_token_id"), fields.get("false_token_id")
    if not isinstance(yes, int) or not isinstance(no, int):
        raise fields.error(f"true_token_id={yes!r}, false_token_id={no!r}: only scores of one against the other are computed")
    return no, yes


def _token_ids(folder: Path, tokens: str) -> tuple[int, int]:
    names = [name.strip() for name in tokens.split(",")]
    if len(names) != 2 or not all(names):
        raise CheckpointError(f'score_tokens={tokens!r} are not two tokens: give them as "no,yes"')
    if not has_tokenizer(folder):
        raise CheckpointError(f"score_tokens={tokens!r} needs a tokenizer, and {folder} has none")
    tokenizer: Any = open_tokenizer(folder)
    vocabulary = tokenizer.get_vocab()
    for name in names:
        if name not in vocabulary:
            raise CheckpointError(f"score_tokens={tokens!r}: {name!r} is no token of the checkpoint in {folder}")
    return vocabulary[names[0]], vocabulary[names[1]]
