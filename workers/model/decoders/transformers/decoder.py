"""One rank's decoder of transformers' own class, as a CPU's runner calls it; a GPU has `gpu.paged`.

Imports torch, transformers and what is known of its classes. A step is a ragged batch, which the class takes for one sequence:
everything but attention looks at tokens one by one, and attention is ours. Its head computes the wanted rows alone.
"""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcache.pool import KVPool
from workers.attention.base import AttentionBackend
from workers.attention.cpu.varied import VariedAttention
from workers.attention.forms import Form, HeadShape
from workers.attention.select import select_backend
from workers.model.checkpoint.weights import Checkpoint
from workers.model.decoders.transformers.loading import load
from workers.model.layers.linear import can_pack
from workers.model.layers.padding import padded, padded_rows
from workers.model.sources.progress import Progress
from workers.model.transformers.attention import Attends, AttentionSlot
from workers.model.transformers.classes import build
from workers.model.transformers.config import TransformersConfig
from workers.model.transformers.rotary import hold_still
from workers.model.transformers.running import hidden_of, logits_of
from workers.model.transformers.sharding import share_out, shares
from workers.parallel.communicator import Communicator
from workers.step import StepInput

logger = logging.getLogger(__name__)


class TransformersDecoder:
    """One rank's shard of the model. `load_transformers` makes a filled one.

    Invariant: every rank makes the same calls, since the ranks meet in the collectives.
    """

    def __init__(
        self, config: TransformersConfig, model: Any, comm: Communicator, dtype: torch.dtype, device: torch.device,
        positions: int,
    ) -> None:  # fmt: skip
        """model: filled. positions: a sequence has so many at most."""
        survey = config.survey(comm.size)
        self.shape = config.shard(comm.rank, comm.size)
        self.dtype, self.device = dtype, device
        self.heads = survey.heads
        self.forms = [form.within(positions) for form in survey.forms]
        """Of each layer, without what sequences of so many positions cannot notice."""
        self._pads = can_pack(dtype, device)
        self._model = model
        self._slot = AttentionSlot(model)
        self._shared_head = survey.shared_head
        self.attention: AttentionBackend | None = None
        """Set before the first `forward`."""

    def attention_over(self, pool: KVPool, backend: str, layers: Iterable[int]) -> AttentionBackend:
        """Of these layers, whose blocks the pool has. backend: as in `select_backend`, for those that it can compute."""
        own = HeadShape(self.shape.heads, self.shape.kv_heads, self.shape.head_dim, self.shape.head_dim)
        heads, forms = zip(*((self.heads[layer], self.forms[layer]) for layer in layers), strict=True)
        usual = None
        if own in heads:
            usual = select_backend(backend, pool=pool, heads=own.heads, forms=forms, dtype=self.dtype)
        return VariedAttention(pool, heads, forms, usual, own)

    @torch.inference_mode()
    def forward(self, step: StepInput) -> Tensor:
        """This rank's logits of the tokens at `step.sample_at`, [samples, shape.vocab] in the model's dtype.

        Column i is token shape.vocab_start + i; padding is -inf. The KV of all the step's tokens has been written.
        """
        assert self.attention is not None, "a decoder without attention holds weights alone"
        attends = _Varied(self.attention, step, self.attention.plan(step))
        if not self._pads:
            return self.logits(step.tokens, step.positions, step.sample_at, attends)
        width, samples = padded_rows(step.tokens.shape[0]), step.sample_at.shape[0]
        tokens, positions = padded(step.tokens, width), padded(step.positions, width)
        return self.logits(tokens, positions, padded(step.sample_at, padded_rows(samples)), attends)[:samples]

    def logits(self, tokens: Tensor, positions: Tensor, rows: Tensor, attends: Attends) -> Tensor:
        """tokens, positions [tokens] int64, rows [wanted] int64 -> [wanted, shape.vocab]."""
        self._slot.attends = attends
        try:
            logits = logits_of(self._model, hidden_of(self._model, tokens, positions, rows))
        finally:
            self._slot.attends = None
        shape = self.shape
        if not self._shared_head:
            logits = logits[:, shape.vocab_start : shape.vocab_start + shape.vocab]
        return F.pad(logits[:, : shape.vocab_real].to(self.dtype), (0, shape.vocab - shape.vocab_real), value=-torch.inf)


class _Varied:
    """A step's attention on a CPU, layer by layer."""

    def __init__(self, attention: AttentionBackend, step: StepInput, plan: Any) -> None:
        self._attention, self._step, self._plan = attention, step, plan

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, form: Form, sinks: Tensor | None  # noqa: ARG002
    ) -> Tensor:
        tokens = self._step.tokens.shape[0]  # what lies behind them is padding, which attention does not see
        out = self._attention.attend(layer, query[:tokens], key[:tokens], value[:tokens], self._step, self._plan, sinks)
        return padded(out, query.shape[0])


@torch.inference_mode()
def load_transformers(
    path: str | Path, config: TransformersConfig, comm: Communicator, dtype: torch.dtype, device: torch.device,
    progress: Progress | None = None, max_model_len: int | None = None,
) -> TransformersDecoder:  # fmt: skip
    """Read this rank's shard of the checkpoint at `path`, converted to `dtype`. Raises CheckpointError.

    max_model_len: positions that will be used; None: as many as the model has.
    """
    positions = max_model_len or config.max_position
    if comm.rank == 0:
        for remark in config.remarks(comm.size):
            logger.warning("%s: %s", config.architecture, remark)
        if config.scheme is not None:
            logger.info("quantised weights: %s, kept as plain numbers", config.scheme)
    model = build(config.text)
    found = shares(model, comm.size)
    with Checkpoint(path, config.scheme) as checkpoint:
        load(model, found, checkpoint, comm, dtype, device, progress, config.part_of)
    hold_still(model, positions)
    share_out(model, found, comm)
    return TransformersDecoder(config, model, comm, dtype, device, positions)
