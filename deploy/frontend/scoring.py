"""From pooled prompts to embeddings and scores, for every door: what is asked of the engine, and the arithmetic behind it.

Imports prompts, what the checkpoint is good for, and NumPy.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

import numpy as np

from deploy.frontend.outputs import (
    EmbeddingOutput,
    EmbeddingRequestOutput,
    RequestOutput,
    ScoringOutput,
    ScoringRequestOutput,
    Vector,
)
from deploy.text.content import Content, Conversation, PromptError, TextPair
from deploy.text.tokenizer import Tokenizer
from workers.model.pooling import Uses

NO_HEAD = "this checkpoint has no head for next tokens, so it generates nothing: ask for embeddings, or for scores"


def embedding_of(pooled: Vector, uses: Uses, dimensions: int | None = None) -> Vector:
    """dimensions: the first so many alone, as Matryoshka embeddings are cut; None: all."""
    return unit(pooled[:dimensions]) if uses.normalized else pooled[:dimensions]


def unit(vector: Vector) -> Vector:
    """Of length 1; a vector of zeros as it is."""
    norm = float(np.linalg.norm(vector.astype(np.float64)))
    return vector if norm == 0.0 else (vector / norm).astype(np.float32)


def need_embedding(uses: Uses, dimensions: int | None = None) -> Literal["last", "mean"]:
    """How prompts are pooled. Errors: PromptError if they cannot be, or if the model has fewer dimensions."""
    if uses.embedding is None:
        raise PromptError(f"no embeddings here: {uses.no_embedding}")
    if dimensions is not None and not (isinstance(dimensions, Integral) and 1 <= dimensions <= uses.hidden):
        raise PromptError(f"dimensions={dimensions!r} is outside [1, {uses.hidden}], what the model has", "dimensions")
    return uses.embedding


def need_scores(uses: Uses) -> Literal["embeddings", "classifier"]:
    """How pairs are scored. Errors: PromptError."""
    if uses.scores is None:
        raise PromptError(f"no scores here: {uses.no_scores}")
    return uses.scores


def pairs_of(
    firsts: str | Sequence[str], seconds: str | Sequence[str], names: tuple[str, str] = ("text_1", "text_2")
) -> list[tuple[str, str]]:
    """One on the left goes with each on the right; otherwise there are as many on each side. names: of the sides. Errors:
    PromptError with a side as its field."""
    left, right = ([side] if isinstance(side, str) else [*side] for side in (firsts, seconds))
    for name, texts in zip(names, (left, right), strict=True):
        if not texts:
            raise PromptError(f"{name} is an empty list: give at least one text", name)
    if len(left) == 1:
        return [(left[0], text) for text in right]
    if len(left) != len(right):
        said = f"{names[0]} has {len(left)} texts and {names[1]} {len(right)}"
        raise PromptError(f"{said}: give one of {names[0]}, or as many as of {names[1]}", names[1])
    return [*zip(left, right, strict=True)]


@dataclass(frozen=True, slots=True)
class Scoring:
    """How some pairs are scored: `contents` are pooled, all alike, and `scores` makes of them a number for each pair.

    places: of each pair's parts among the contents: one that holds both texts, or one for each text. origins: of each content
    the pair, and which of its texts (0 or 1), where it stands first.
    """

    contents: Sequence[Content]
    pooling: Literal["last", "mean", "score"]
    places: list[tuple[int, ...]]
    origins: list[tuple[int, int]]

    @classmethod
    def of(
        cls, pairs: Sequence[tuple[str, str]], uses: Uses, tokenizer: Tokenizer | None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> "Scoring":  # fmt: skip
        """template_kwargs: what the checkpoint's template for pairs can be told. Errors: PromptError."""
        together = need_scores(uses) == "classifier"
        has_template = together and tokenizer is not None and tokenizer.has_pair_template
        if template_kwargs and not has_template:
            said = "no template for pairs could be told of chat_template_kwargs: leave them out"
            raise PromptError(said, "chat_template_kwargs")
        if together:
            contents = [_in_template(pair, template_kwargs) if has_template else TextPair(*pair) for pair in pairs]
            return cls(contents, "score", [(place,) for place in range(len(pairs))], [(pair, 1) for pair in range(len(pairs))])
        origins: dict[str, tuple[int, int]] = {}
        for number, pair in enumerate(pairs):
            for side, text in enumerate(pair):
                origins.setdefault(text, (number, side))
        texts = {text: place for place, text in enumerate(origins)}
        places: list[tuple[int, ...]] = [(texts[first], texts[second]) for first, second in pairs]
        return cls([*texts], need_embedding(uses), places, [*origins.values()])

    def outputs(self, pooled: Sequence[RequestOutput]) -> list[ScoringRequestOutput]:
        """Of each pair. pooled: the output of each content."""
        scores = self.scores([vector_of(output) for output in pooled])
        return [
            ScoringRequestOutput(
                pooled[places[0]].request_id,
                ScoringOutput(score),
                [token for place in places for token in pooled[place].prompt_token_ids],
                sum(pooled[place].num_cached_tokens or 0 for place in places),
            )
            for places, score in zip(self.places, scores, strict=True)
        ]

    def scores(self, pooled: Sequence[Vector]) -> list[float]:
        """pooled: what was made of each content. Of a classifier the probability that it stands for, 0 to 1; of embeddings
        their cosine, -1 to 1."""
        if self.pooling == "score":
            return [_probability(float(pooled[place][0])) for (place,) in self.places]
        units = [unit(vector).astype(np.float64) for vector in pooled]
        return [float(np.clip(units[first] @ units[second], -1.0, 1.0)) for first, second in self.places]


def vector_of(output: RequestOutput) -> Vector:
    """What was made of a prompt that has ended."""
    assert output.pooled is not None, "it has ended without"
    return output.pooled


def embedding_output(output: RequestOutput, uses: Uses, dimensions: int | None) -> EmbeddingRequestOutput:
    """dimensions: as in `embedding_of`."""
    embedding = EmbeddingOutput(embedding_of(vector_of(output), uses, dimensions).tolist())
    return EmbeddingRequestOutput(output.request_id, embedding, output.prompt_token_ids, output.num_cached_tokens or 0)


def _in_template(pair: tuple[str, str], template_kwargs: Mapping[str, Any] | None) -> Conversation:
    query, document = pair
    return Conversation(
        [{"role": "query", "content": query}, {"role": "document", "content": document}], None, template_kwargs
    )


def _probability(logit: float) -> float:
    """The logistic function."""
    return float(0.5 * (1.0 + np.tanh(0.5 * logit)))
