"""A mixture of experts in the place of a layer's MLP, of which each rank holds whole experts or a part of each.

    router   scores of all experts in float32, the same on every rank: `per_token` experts a token, each with a weight
    experts  SwiGLU each; what a token's experts give is added up, times their weights
    shared   an expert that every token goes through, behind a gate of its own, by width as a dense MLP

Here are the weights, and how a CPU computes with them: expert by expert, those that have tokens. A GPU runs
`gpu.fused_experts`.
Imports torch, the layers, and what reads weights. Shapes beside tensors are per rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.kernels.experts.stacked import Stacked, Weight
from workers.kernels.lora.weights import LoraWeights, StepAdapters
from workers.kernels.reduced import Microscaled, Reduced
from workers.model.checkpoint.weights import Piece, Target
from workers.model.config.mixtures import Gating, MixtureConfig, MixtureShape
from workers.model.layers.linear import Linear, can_pack
from workers.model.layers.mlp import SwiGLU
from workers.model.layers.padding import padded, padded_rows
from workers.model.quantization.filling import FillingStack, Keeping, Rounding
from workers.model.quantization.forms import PLAIN, LinearForm
from workers.parallel.communicator import Communicator


class Router:
    """weight [experts, hidden], and behind these rows that of the shared expert's gate, where there is one. lora: adapters
    beside it; None: none are served."""

    def __init__(self, config: MixtureConfig, hidden: int, dtype: torch.dtype, device: torch.device) -> None:
        self.config = config
        rows = config.experts + (config.shared_intermediate > 0)
        self.weight = torch.empty(rows, hidden, dtype=dtype, device=device)
        self.bias = torch.empty(rows, dtype=dtype, device=device) if config.family.bias else None
        self.lora: LoraWeights | None = None

    def filled(self) -> None:
        """On a CPU it is widened to what its scores are in; a GPU's kernels add up in float32."""
        if self.weight.device.type == "cpu":
            wide = torch.promote_types(self.weight.dtype, torch.float32)
            self.weight, self.bias = self.weight.to(wide), None if self.bias is None else self.bias.to(wide)

    def __call__(self, x: Tensor, adapters: StepAdapters | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """x [tokens, hidden] -> experts [tokens, per_token] int64, their weights, and the shared expert's [tokens, 0 or 1].
        adapters: of the tokens; None: no token has one."""
        config = self.config
        scores = F.linear(x.to(self.weight.dtype), self.weight, self.bias)
        if adapters is not None and self.lora is not None:
            adapters.add(self.lora, scores, x)
        scores, gate = scores.split_with_sizes((config.experts, len(self.weight) - config.experts), 1)
        if config.family.scoring == "chosen":
            best, chosen = scores.topk(config.per_token, -1)
            return chosen, best.softmax(-1), gate.sigmoid()
        weights, chosen = scores.softmax(-1).topk(config.per_token, -1)
        if config.normalized:
            weights = weights / weights.sum(-1, keepdim=True)
        return chosen, weights, gate.sigmoid()

    def pieces(self, name: str) -> list[Piece]:
        """name: of the layer."""
        config, block = self.config, f"{name}.{self.config.family.block}"
        experts, hidden = config.experts, self.weight.shape[1]
        pieces = [Piece(self.weight[:experts], f"{block}.{config.family.router}.weight", (experts, hidden))]
        if self.bias is not None:
            pieces.append(Piece(self.bias[:experts], f"{block}.{config.family.router}.bias", (experts,)))
        if config.shared_intermediate:
            pieces.append(Piece(self.weight[experts:], f"{block}.shared_expert_gate.weight", (1, hidden)))
        return pieces


def expert_modules(config: MixtureConfig, name: str) -> tuple[list[str], list[str]]:
    """What the modules of a layer's experts are called that are multiplied first, gates and ups, and downs. name: of the
    layer."""
    family = config.family
    block = f"{name}.{family.block}.experts"
    experts = [block] if family.packed else [f"{block}.{number}" for number in range(config.experts)]
    *ups, down = family.names
    return [f"{expert}.{each}" for expert in experts for each in ups], [f"{expert}.{down}" for expert in experts]


class Experts:
    """gate_up [experts, 2 * intermediate, hidden]: the gate's rows first, or in turns with the other's where the family packs
    them so. down [experts, hidden, intermediate]. Either may be in fewer bits, with which a GPU alone computes. A down bias
    that ranks would add several times rank 0 adds. lora: adapters beside both; None: none are served."""

    def __init__(
        self, config: MixtureConfig, shape: MixtureShape, hidden: int, dtype: torch.dtype, device: torch.device, first: bool,
        forms: tuple[LinearForm, LinearForm] = (PLAIN, PLAIN),
    ) -> None:  # fmt: skip
        """first: of the ranks that hold a part of the same experts. forms: in which both are kept."""
        self.config, self.shape = config, shape
        up_size, down_size = (shape.experts, 2 * shape.intermediate, hidden), (shape.experts, hidden, shape.intermediate)
        self.gate_up = _empty(up_size, forms[0], dtype, device)
        self.down = _empty(down_size, forms[1], dtype, device)
        self._rounded = forms[0].rounded
        self._nothing = torch.empty(0, dtype=dtype, device=device)
        bias = config.family.bias
        self.gate_up_bias = self._nothing.new_empty(up_size[:2]) if bias else None
        self.down_bias = self._nothing.new_empty(down_size[:2]) if bias and first else None
        self._pads = can_pack(dtype, device)
        self._each: list[tuple[Linear, Linear]] = []
        self.lora: tuple[LoraWeights, LoraWeights] | None = None

    def adapt(self, gate_up: LoraWeights, down: LoraWeights) -> None:
        """Adapters stand beside these experts from now on, whose rows are in the order of the weights' own."""
        self.lora = gate_up, down
        for number, each in enumerate(self._each):
            each[0].lora, each[1].lora = gate_up.of(number), down.of(number)

    @property
    def in_turns(self) -> bool:
        """Rows of `gate_up` are gate, up, gate, up."""
        return self.config.family.packed

    def filled(self) -> None:
        """On a CPU each expert is a matrix by itself, in the CPU's own layout where there is one."""
        if self._nothing.device.type != "cpu" or isinstance(self.gate_up, Stacked) or isinstance(self.down, Stacked):
            return
        for number in range(self.shape.experts):
            gate_up, down = (
                Linear.of(weight[number], bias[number] if bias is not None else None)
                for weight, bias in ((self.gate_up, self.gate_up_bias), (self.down, self.down_bias))
            )
            gate_up.pack()
            down.pack()
            self._each.append((gate_up, down))
        if self._pads:  # the plain numbers are read by nobody
            self.gate_up = self.down = self._nothing

    def __call__(
        self, x: Tensor, chosen: Tensor, weights: Tensor, adapters: StepAdapters | None = None
    ) -> tuple[Tensor, Tensor]:
        """x [tokens, hidden]; chosen, weights [tokens, per_token], experts of the whole model -> [tokens, hidden] in the dtype
        of `weights`, this rank's share of the sum; and the tokens of each of the model's experts. adapters: of the tokens;
        None: no token has one."""
        order = chosen.flatten().argsort(stable=True)
        counts = chosen.flatten().bincount(minlength=self.config.experts)
        out = weights.new_zeros(x.shape)
        held = slice(self.shape.expert_start, self.shape.expert_start + self.shape.experts)
        ends = counts.cumsum(0).tolist()
        begins = [0, *ends]
        for (gate_up, down), begin, end in zip(self._each, begins[held], ends[held], strict=True):
            if begin < end:
                pairs = order[begin:end]
                tokens = pairs // chosen.shape[1]
                rows, own = x[tokens], adapters.at(tokens) if adapters is not None else None
                product = gate_up(padded(rows, padded_rows(end - begin)) if self._pads else rows, own)
                product = down(gated(product, self.config.gating, self.in_turns), own)[: end - begin]
                out.index_add_(0, tokens, product * weights.flatten()[pairs, None])
        return out, counts

    def pieces(self, name: str) -> list[Piece]:
        """name: of the layer. Experts of other ranks are named as well, with nothing to fill."""
        block = f"{name}.{self.config.family.block}.experts"
        if self.config.family.packed:
            return self._packed_pieces(block)
        return [piece for number in range(self.config.experts) for piece in self._pieces_of(block, number)]

    def _pieces_of(self, block: str, number: int) -> list[Piece]:
        shape, total, hidden = self.shape, self.config.intermediate, self.down.shape[1]
        gate, up, down = (f"{block}.{number}.{name}.weight" for name in self.config.family.names)
        wide, narrow = (total, hidden), (hidden, total)
        held = number - shape.expert_start
        if not 0 <= held < shape.experts:
            nothing = self._nothing
            return [Piece(nothing, gate, wide), Piece(nothing, up, wide), Piece(nothing, down, narrow)]
        gates, ups = (self._rows(self.gate_up, held, half, 2) for half in range(2))
        start = shape.intermediate_start
        return [
            Piece(gates, gate, wide, start), Piece(ups, up, wide, start),
            Piece(self._rows(self.down, held, 0, 1), down, narrow, start, dim=1),
        ]  # fmt: skip

    def _rows(self, weight: Weight, expert: int, part: int, parts: int) -> Target:
        """One of so many equal parts of an expert's rows."""
        count = weight.shape[1] // parts
        if isinstance(weight, Tensor):
            plain = weight[expert].narrow(0, part * count, count)
            return Rounding(plain) if self._rounded else plain
        matrix, first = weight.matrix, (expert * parts + part) * count
        assert isinstance(matrix, Reduced), "MXFP4 is stored in stacks"
        return Keeping(matrix.rows(first, first + count))

    def _stack(self, weight: Weight) -> Target:
        """Of all experts, inputs first."""
        if isinstance(weight, Stacked) or self._rounded:
            return FillingStack(weight)
        return weight.transpose(1, 2)

    def _packed_pieces(self, block: str) -> list[Piece]:
        """Of one tensor for all experts, inputs first: [experts, hidden, 2 * intermediate], [experts, intermediate, hidden]."""
        config, shape, hidden = self.config, self.shape, self.down.shape[1]
        gate_up, down = (f"{block}.{name}" for name in config.family.names)
        whole_up, whole_down = (config.experts, hidden, 2 * config.intermediate), (config.experts, config.intermediate, hidden)
        up_at, down_at = (2 * shape.intermediate_start, 2), (shape.intermediate_start, 1)
        if config.parallel:
            up_at = down_at = (shape.expert_start, 0)
        pieces = [
            Piece(self._stack(self.gate_up), gate_up, whole_up, *up_at),
            Piece(self._stack(self.down), down, whole_down, *down_at),
        ]
        if self.gate_up_bias is not None:
            bias_at = up_at if config.parallel else (up_at[0], 1)
            pieces.append(Piece(self.gate_up_bias, f"{gate_up}_bias", (config.experts, 2 * config.intermediate), *bias_at))
            target = self.down_bias if self.down_bias is not None else self._nothing
            start = shape.expert_start if config.parallel else 0
            pieces.append(Piece(target, f"{down}_bias", (config.experts, hidden), start))
        return pieces


def _empty(size: tuple[int, int, int], form: LinearForm, dtype: torch.dtype, device: torch.device) -> Weight:
    """size: experts, rows, columns."""
    experts, rows, columns = size
    if form.bits == 16:
        return torch.empty(size, dtype=dtype, device=device)
    if form.scale == torch.float8_e8m0fnu:
        return Stacked(Microscaled.empty(experts * rows, columns, device), experts)
    return Stacked(Reduced.empty(experts * rows, columns, form.bits, form.group or columns, form.scale, device), experts)


class Mixture:
    """Router, experts and a shared expert; the ranks' shares meet in one sum. load: [experts] int64, tokens that each expert of
    the model has had."""

    def __init__(
        self, config: MixtureConfig, shape: MixtureShape, hidden: int, comm: Communicator, dtype: torch.dtype,
        device: torch.device, forms: tuple[LinearForm, LinearForm] = (PLAIN, PLAIN),
    ) -> None:  # fmt: skip
        """forms: of the experts, as in `Experts`."""
        self.config, self.shape = config, shape
        self.comm = comm
        self.router = Router(config, hidden, dtype, device)
        self.experts = Experts(config, shape, hidden, dtype, device, config.parallel or comm.rank == 0, forms)
        self.shared = None
        if shape.shared:
            self.shared = SwiGLU(
                Linear(2 * shape.shared, hidden, dtype, device), Linear(hidden, shape.shared, dtype, device)
            )
        self.load = torch.zeros(config.experts, dtype=torch.int64, device=device)

    def __call__(self, x: Tensor, tokens: int | None = None, adapters: StepAdapters | None = None) -> Tensor:
        """x [rows, hidden], of which those from `tokens` on are padding -> [rows, hidden], equal on all ranks, padding zero.
        adapters: of the rows, or of those that are no padding; None: no token has one."""
        chosen, weights, gate = (each[:tokens] for each in self.router(x, adapters))
        out, counts = self.experts(x[:tokens], chosen, weights, adapters)
        self.load += counts
        if self.shared is not None:
            out += gate * self.shared(x, adapters)[:tokens]
        return self.comm.all_reduce(padded(out.to(x.dtype), x.shape[0]))

    def pack(self) -> None:
        self.router.filled()
        self.experts.filled()
        if self.shared is not None:
            self.shared.pack()

    def pieces(self, name: str) -> list[Piece]:
        """name: of the layer."""
        pieces = [*self.router.pieces(name), *self.experts.pieces(name)]
        if self.shared is not None:
            total, start, hidden = self.config.shared_intermediate, self.shape.shared_start, self.router.weight.shape[1]
            gate, up = self.shared.gate_up.shares(self.shape.shared, self.shape.shared)
            (down,) = self.shared.down.shares(hidden)
            prefix = f"{name}.{self.config.family.block}.shared_expert"
            pieces += [
                Piece(gate, f"{prefix}.gate_proj.weight", (total, hidden), start),
                Piece(up, f"{prefix}.up_proj.weight", (total, hidden), start),
                Piece(down, f"{prefix}.down_proj.weight", (hidden, total), start, dim=1),
            ]
        return pieces


@dataclass(frozen=True, slots=True)
class ExpertCounts:
    """Tokens that each expert of a model has had, the same on every rank. layers: that have any. tokens [layers, experts]
    int64."""

    layers: tuple[int, ...]
    tokens: Tensor


def count_experts(mixtures: Mapping[int, Mixture]) -> ExpertCounts | None:
    """By layer; None without any. They count into one tensor from here on."""
    if not mixtures:
        return None
    tokens = torch.stack([mixture.load for mixture in mixtures.values()])
    for mixture, load in zip(mixtures.values(), tokens, strict=True):
        mixture.load = load
    return ExpertCounts(tuple(mixtures), tokens)


def gated(product: Tensor, gating: Gating, in_turns: bool) -> Tensor:
    """product [rows, 2 * intermediate], gate and up in halves or in turns -> [rows, intermediate]."""
    gate, up = (product[:, ::2], product[:, 1::2]) if in_turns else product.chunk(2, -1)
    if gating.limit is None:
        return F.silu(gate).mul_(up)
    gate, up = gate.clamp(max=gating.limit), up.clamp(-gating.limit, gating.limit)
    return (up + 1) * gate * torch.sigmoid(gating.alpha * gate)
