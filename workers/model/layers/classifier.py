"""What scores hidden states, of checkpoints that have such a thing. Imports torch and what reads weights."""

import torch

from workers.model.checkpoint.weights import Piece
from workers.model.config.architectures import ModelConfig

SCORE = "score.weight"


class Classifier:
    """Scores hidden states: weight [labels, hidden], whole on every rank, in float32 at least.

    Either `score.weight`, or, where a language model judges by its next token, what the head has for that token less what it
    has for the other: one label, the log-odds of the two. tokens: (no, yes), ids. table: the head's name in the checkpoint.
    """

    def __init__(
        self, config: ModelConfig, tokens: tuple[int, int] | None, table: str, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._config, self._tokens, self._table = config, tokens, table
        rows = config.labels if tokens is None else len(tokens)
        wide = torch.promote_types(dtype, torch.float32)
        self.weight = torch.empty(rows, config.hidden, dtype=wide, device=device)

    def pieces(self) -> list[Piece]:
        config = self._config
        if self._tokens is None:
            return [Piece(self.weight, SCORE, (config.labels, config.hidden))]
        whole = (config.vocab_size, config.hidden)
        return [Piece(self.weight[at : at + 1], self._table, whole, token) for at, token in enumerate(self._tokens)]

    def filled(self) -> None:
        if self._tokens is not None:
            self.weight = self.weight[1:] - self.weight[:1]
