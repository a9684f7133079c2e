"""The decoder: one class for all native families, dense or with experts, of which each rank holds its shard.

Imports torch, the layers, the weights, and the interfaces of attention and communicator. Knows nothing of scheduling:
a step is a ragged batch, and only the rows of `sample_at` get logits. All collectives are inside the row-parallel
linears and the embedding (the spirit of gpt-fast's tp.py).
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workers.attention.base import AttentionBackend
from workers.model.checkpoint.kv_scales import scale_names
from workers.model.checkpoint.weights import Checkpoint, ModelPart, Piece, Target
from workers.model.config.architectures import ModelConfig, RankShape
from workers.model.layers.classifier import Classifier
from workers.model.layers.experts import Mixture, count_experts, expert_modules
from workers.model.layers.linear import Linear, RowParallelLinear, can_pack
from workers.model.layers.mlp import SwiGLU
from workers.model.layers.norm import RMSNorm
from workers.model.layers.padding import padded, padded_rows
from workers.model.layers.rotary import Rotary, Turns
from workers.model.layers.vocabulary import Head, VocabParallelEmbedding
from workers.model.quantization.forms import Forms, keeps_fewer_bits
from workers.model.sources.progress import Progress
from workers.parallel.communicator import Communicator
from workers.step import StepInput

logger = logging.getLogger(__name__)

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Layer:
    """One decoder layer: attention and MLP (or a mixture of experts), each behind a norm and added to the residual stream."""

    def __init__(
        self,
        number: int,
        config: ModelConfig,
        shape: RankShape,
        rotary: Rotary,
        comm: Communicator,
        dtype: torch.dtype,
        device: torch.device,
        forms: Forms,
    ) -> None:
        self._number, self._config, self._shape, self._rotary = number, config, shape, rotary
        self._qk_heads = shape.heads + shape.kv_heads
        hidden, dim = config.hidden, shape.head_dim
        qkv_rows, o_columns = (shape.heads + 2 * shape.kv_heads) * dim, shape.heads * dim
        self.input_norm = RMSNorm((hidden,), config.rms_eps, dtype, device)
        attention, mlp = f"model.layers.{number}.self_attn", f"model.layers.{number}.mlp"
        qkv_form = forms.of(attention, "q_proj", "k_proj", "v_proj", columns=hidden)
        self.qkv = Linear(qkv_rows, hidden, dtype, device, config.attention_bias, qkv_form)
        self.qk_norm = RMSNorm((self._qk_heads, dim), config.rms_eps, dtype, device) if config.qk_norm else None
        self.sinks = torch.empty(shape.heads, dtype=dtype, device=device) if config.forms[number].sinks else None
        o_form = forms.of(attention, "o_proj", columns=o_columns)
        self.o = RowParallelLinear(hidden, o_columns, dtype, device, comm, config.o_bias, o_form)
        self.mlp_norm = RMSNorm((hidden,), config.rms_eps, dtype, device)
        self.mlp: SwiGLU | Mixture
        if config.mixture is not None and shape.mixture is not None and config.mixture.sparse[number]:
            ups, downs = expert_modules(config.mixture, f"model.layers.{number}")
            of_experts = forms.of_experts(ups, hidden), forms.of_experts(downs, shape.mixture.intermediate)
            self.mlp = Mixture(config.mixture, shape.mixture, hidden, comm, dtype, device, of_experts)
        else:
            up_form = forms.of(mlp, "gate_proj", "up_proj", columns=hidden)
            down_form = forms.of(mlp, "down_proj", columns=shape.intermediate)
            self.mlp = SwiGLU(
                Linear(2 * shape.intermediate, hidden, dtype, device, config.mlp_bias, up_form),
                RowParallelLinear(hidden, shape.intermediate, dtype, device, comm, config.mlp_bias, down_form),
            )

    def forward(
        self,
        hidden: Tensor,
        turns: Turns,
        attention: AttentionBackend,
        step: StepInput,
        plan: Any,
        rows: Tensor | None,
    ) -> Tensor:
        """hidden [rows, hidden], which is overwritten -> the same, or only its `rows` (what the last layer needs).

        Rows beyond the step's tokens are padding, which attention does not see.
        """
        shape, tokens, adapters = self._shape, step.tokens.shape[0], step.adapters
        qkv = self.qkv(self.input_norm(hidden), adapters).view(hidden.shape[0], -1, shape.head_dim)
        qk, value = qkv.split_with_sizes((self._qk_heads, shape.kv_heads), 1)
        if self.qk_norm is not None:
            qk = self.qk_norm(qk)
        turned = self._rotary.turn(qk, turns)[:tokens]
        query, key = turned.split_with_sizes((shape.heads, shape.kv_heads), 1)
        attended = attention.attend(self._number, query, key, value[:tokens], step, plan, self.sinks).flatten(1)
        if rows is None:
            attended = padded(attended, hidden.shape[0])
        else:
            attended, hidden = attended.index_select(0, rows), hidden.index_select(0, rows)
            adapters = adapters.at(rows) if adapters is not None else None
        hidden = hidden.add_(self.o(attended, adapters))
        normed = self.mlp_norm(hidden)
        if isinstance(self.mlp, SwiGLU):
            return hidden.add_(self.mlp(normed, adapters))
        return hidden.add_(self.mlp(normed, tokens if rows is None else step.sample_at.shape[0], adapters))

    def head_norms(self) -> tuple[Tensor | None, Tensor | None]:
        """The norms of each query head and of each key head, [head_dim], where the model has them."""
        if self.qk_norm is None:
            return None, None
        return self.qk_norm.weight[0], self.qk_norm.weight[self._shape.heads]

    def operands(self) -> Iterator[object]:
        """What its products read: weights, in whatever form they are kept, and biases."""
        mlp = self.mlp
        if isinstance(mlp, Mixture):
            yield from (mlp.experts.gate_up, mlp.experts.down, mlp.experts.gate_up_bias)
        dense = mlp.shared if isinstance(mlp, Mixture) else mlp
        for linear in (self.qkv, self.o, *((dense.gate_up, dense.down) if dense is not None else ())):
            yield from (linear.operand, linear.bias)

    def pieces(self) -> list[Piece]:
        name = f"model.layers.{self._number}"
        norms = [
            Piece(self.input_norm.weight, f"{name}.input_layernorm.weight", (self._config.hidden,)),
            Piece(self.mlp_norm.weight, f"{name}.post_attention_layernorm.weight", (self._config.hidden,)),
        ]
        mlp = self.mlp.pieces(name) if isinstance(self.mlp, Mixture) else self._mlp_pieces(f"{name}.mlp", self.mlp)
        return norms + self._attention_pieces(f"{name}.self_attn") + mlp

    def filled(self) -> None:
        for part in (self.qkv, self.o, self.mlp):
            part.pack()
        if self.qk_norm is not None:  # read into the first query and key head; all others use the same
            weight, heads = self.qk_norm.weight, self._shape.heads
            weight[:heads] = weight[0].clone()
            weight[heads:] = weight[heads].clone()

    def _attention_pieces(self, name: str) -> list[Piece]:
        config, shape, dim = self._config, self._shape, self._shape.head_dim
        q_rows, kv_rows = shape.heads * dim, shape.kv_heads * dim
        targets = _split_rows(self.qkv, (q_rows, kv_rows, kv_rows))
        starts = (shape.head_start, shape.kv_head_start, shape.kv_head_start)
        totals = (config.heads, config.kv_heads, config.kv_heads)
        pieces = []
        for proj, target, start, total in zip(("q_proj", "k_proj", "v_proj"), targets, starts, totals, strict=True):
            pieces += _column_pieces(f"{name}.{proj}", target, start * dim, total * dim, config.hidden)
        pieces += _row_pieces(f"{name}.o_proj", self.o, shape.head_start * dim, config.heads * dim, config.o_bias)
        if self.qk_norm is not None:
            pieces.append(Piece(self.qk_norm.weight[0], f"{name}.q_norm.weight", (dim,)))
            pieces.append(Piece(self.qk_norm.weight[shape.heads], f"{name}.k_norm.weight", (dim,)))
        if self.sinks is not None:
            pieces.append(Piece(self.sinks, f"{name}.sinks", (config.heads,), shape.head_start))
        return pieces

    def _mlp_pieces(self, name: str, mlp: SwiGLU) -> list[Piece]:
        config, shape = self._config, self._shape
        pieces = []
        targets = _split_rows(mlp.gate_up, (shape.intermediate, shape.intermediate))
        for proj, target in zip(("gate_proj", "up_proj"), targets, strict=True):
            start, total = shape.intermediate_start, config.intermediate
            pieces += _column_pieces(f"{name}.{proj}", target, start, total, config.hidden)
        down = _row_pieces(f"{name}.down_proj", mlp.down, shape.intermediate_start, config.intermediate, config.mlp_bias)
        return pieces + down


class Outer:
    """What surrounds the layers: embedding, final norm and head. Tied weights are read once.

    tables: what the embedding and the head are called in the checkpoint; one name for both where they are tied.
    """

    def __init__(
        self, config: ModelConfig, shape: RankShape, comm: Communicator, dtype: torch.dtype, device: torch.device,
        tables: tuple[str, str],
    ) -> None:  # fmt: skip
        self._config, self._shape, self._tables = config, shape, tables
        self.embedding = VocabParallelEmbedding(shape.vocab, shape.vocab_start, config.hidden, dtype, device, comm)
        self.norm = RMSNorm((config.hidden,), config.rms_eps, dtype, device)
        linear = Linear(shape.vocab, config.hidden, dtype, device)
        if len(set(tables)) == 1:
            linear.weight = self.embedding.weight
        self.head = Head(linear, shape.vocab_real)

    def pieces(self) -> list[Piece]:
        config, shape = self._config, self._shape
        assert self.head.linear.weight is not None
        weights = {self._tables[1]: self.head.linear.weight, self._tables[0]: self.embedding.weight}
        pieces = [Piece(self.norm.weight, "model.norm.weight", (config.hidden,))]
        for name, weight in weights.items():
            weight[shape.vocab_real :] = 0.0  # padding: looked up by no token, masked by the head
            real = weight[: shape.vocab_real]
            pieces.append(Piece(real, name, (config.vocab_size, config.hidden), shape.vocab_start))
        return pieces

    def filled(self) -> None:
        self.head.linear.pack()  # drops the head's reference to a tied table, which the embedding keeps


class Decoder:
    """One rank's shard of the model. `load_model` makes a filled one.

    Invariant: every rank calls `forward` with the same step, since the ranks meet in the collectives.
    """

    def __init__(
        self,
        config: ModelConfig,
        comm: Communicator,
        attention: AttentionBackend | None,
        dtype: torch.dtype,
        device: torch.device,
        positions: int,
        tables: tuple[str, str],
        score_tokens: tuple[int, int] | None = None,
        forms: Forms | None = None,
    ) -> None:
        """positions: a sequence has so many at most. tables: as in `Outer`. score_tokens: as in `Classifier`, None where the
        model judges nothing by a token. forms: of the layers' weights, None where all are plain."""
        self.config = config
        self.shape = config.shard(comm.rank, comm.size)
        self.comm = comm
        self.dtype, self.device = dtype, device
        self.attention = attention
        self._pads = can_pack(dtype, device)
        self.forms = [form.within(positions) for form in config.forms]
        """Of each layer, without what sequences of so many positions cannot notice; its attention is made for them."""
        self.rotary = Rotary(config.rope, config.head_dim, positions, dtype, device)
        self.outer = Outer(config, self.shape, comm, dtype, device, tables)
        judges = config.head == "labels" or score_tokens is not None
        self.classifier = Classifier(config, score_tokens, tables[1], dtype, device) if judges else None
        self.layers = [
            Layer(number, config, self.shape, self.rotary, comm, dtype, device, forms or Forms(None, keeps=False))
            for number in range(config.layers)
        ]
        mixtures = {number: layer.mlp for number, layer in enumerate(self.layers) if isinstance(layer.mlp, Mixture)}
        self.expert_counts = count_experts(mixtures)

    @torch.inference_mode()
    def forward(self, step: StepInput) -> Tensor:
        """This rank's logits of the tokens at `step.sample_at`, [samples, shape.vocab] in the model's dtype.

        Column i is token shape.vocab_start + i; padding is -inf. The KV of all the step's tokens has been written.
        """
        return self.outer.head(self._hidden(step))[: step.sample_at.shape[0]]

    @torch.inference_mode()
    def hidden(self, step: StepInput) -> Tensor:
        """As `forward`, but what the head would be given: [samples, hidden], behind the final norm, equal on all ranks."""
        return self._hidden(step)[: step.sample_at.shape[0]]

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """What `forward` makes of hidden [samples, hidden]."""
        samples = hidden.shape[0]
        return self.outer.head(padded(hidden, padded_rows(samples)) if self._pads else hidden)[:samples]

    def _hidden(self, step: StepInput) -> Tensor:
        """With rows of padding behind those that are wanted."""
        assert self.attention is not None, "a decoder without attention holds weights alone"
        tokens, samples = step.tokens.shape[0], step.sample_at.shape[0]
        width = padded_rows(tokens) if self._pads else tokens
        hidden = self.outer.embedding(padded(step.tokens, width))
        turns = self.rotary.at(padded(step.positions, width))
        plan = self.attention.plan(step)
        last = len(self.layers) - 1
        sample_at = padded(step.sample_at, padded_rows(samples)) if self._pads else step.sample_at
        for number, layer in enumerate(self.layers):
            rows = sample_at if number == last else None
            hidden = layer.forward(hidden, turns, self.attention, step, plan, rows)
        return self.outer.norm(hidden)

    def parts(self) -> list[ModelPart]:
        """What `Checkpoint.load` fills, one after another."""
        parts: list[ModelPart] = [self.outer, *self.layers]
        return parts if self.classifier is None else [*parts, self.classifier]


@torch.inference_mode()
def load_model(
    path: str | Path,
    config: ModelConfig,
    comm: Communicator,
    dtype: torch.dtype,
    device: torch.device,
    attention: AttentionBackend | None,
    progress: Progress | None = None,
    max_model_len: int | None = None,
    score_tokens: tuple[int, int] | None = None,
) -> Decoder:
    """Read this rank's shard of the checkpoint at `path`, converted to `dtype`. Raises CheckpointError.

    attention: None where others run the layers (`gpu.fused`), or until it is set. max_model_len: positions that will be used;
    None: as many as the model has. score_tokens: as in `Classifier`.
    """
    shape = config.shard(comm.rank, comm.size)
    with Checkpoint(path, config.scheme) as checkpoint:
        tables = _table_names(checkpoint, config, shape, dtype)
        positions = max_model_len or config.max_position
        forms = Forms(config.scheme, keeps_fewer_bits(device), checkpoint.is_quantised)
        decoder = Decoder(config, comm, attention, dtype, device, positions, tables, score_tokens, forms)
        if config.scheme is not None and comm.rank == 0:
            logger.info("quantised weights: %s, %s", config.scheme, forms.says())
        checkpoint.load(decoder.parts(), progress, scale_names(checkpoint.names()))
    return decoder


def _table_names(checkpoint: Checkpoint, config: ModelConfig, shape: RankShape, dtype: torch.dtype) -> tuple[str, str]:
    """What the embedding and the head are read from. Of a tied pair a file may have either, or both: then they are one only if
    this rank's rows are equal. The same as transformers does with such files. A model without a head is given the embedding for
    one, which nobody asks."""
    if config.head != "vocabulary":
        return EMBEDDING, EMBEDDING
    if not config.tied:
        return EMBEDDING, HEAD
    if EMBEDDING not in checkpoint or HEAD not in checkpoint:
        return (HEAD, HEAD) if HEAD in checkpoint else (EMBEDDING, EMBEDDING)
    if checkpoint.same_rows(EMBEDDING, HEAD, shape.vocab_start, shape.vocab_start + shape.vocab_real, dtype):
        return EMBEDDING, EMBEDDING
    logger.warning("config.json ties the head to the embedding, but the checkpoint's %s differs: it is used", HEAD)
    return EMBEDDING, HEAD


def _split_rows(linear: Linear, rows: tuple[int, ...]) -> list[tuple[Target, Tensor | None]]:
    """The shares of a merged matrix and of its bias."""
    biases = linear.bias.split_with_sizes(rows) if linear.bias is not None else [None] * len(rows)
    return list(zip(linear.shares(*rows), biases, strict=True))


def _column_pieces(
    name: str, target: tuple[Target, Tensor | None], start: int, total: int, in_features: int
) -> list[Piece]:
    weight, bias = target
    pieces = [Piece(weight, f"{name}.weight", (total, in_features), start)]
    if bias is not None:
        pieces.append(Piece(bias, f"{name}.bias", (total,), start))
    return pieces


def _row_pieces(name: str, linear: Linear, start: int, total: int, bias: bool) -> list[Piece]:
    """bias: the checkpoint has one. A rank that does not hold it has an empty share of it."""
    (weight,) = linear.shares(linear.out_features)
    pieces = [Piece(weight, f"{name}.weight", (linear.out_features, total), start, dim=1)]
    if bias:
        target = linear.bias if linear.bias is not None else torch.empty(0)
        pieces.append(Piece(target, f"{name}.bias", (linear.out_features,)))
    return pieces
