"""One rank's shards of the resident adapters, beside the linear layers and the experts of its decoder. Imports torch and
safetensors."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from workers.config import LoraRoom, WorkerConfig
from workers.kernels.lora.weights import LoraWeights, stands_behind
from workers.model.config.architectures import ModelConfig, RankShape
from workers.model.decoders.native import Decoder, Layer
from workers.model.layers.experts import Mixture
from workers.model.layers.linear import Linear
from workers.model.layers.mlp import SwiGLU
from workers.model.lora.files import AdaptedLinear, AdapterFiles

if TYPE_CHECKING:
    from workers.model.decoders.transformers.decoder import TransformersDecoder

PARTS = {"q_proj": ("qkv", 0), "k_proj": ("qkv", 1), "v_proj": ("qkv", 2), "o_proj": ("o", 0),
         "gate_proj": ("gate_up", 0), "up_proj": ("gate_up", 1), "gate_up_proj": ("gate_up", 0), "down_proj": ("down", 0),
         "router": ("router", 0), "shared_expert_gate": ("router", 1)}  # fmt: skip
"""The product that each projection is a part of, or begins with."""

WHOLE = slice(None)


class ProjectionShare(NamedTuple):
    """What of a projection's weight [out, in] a rank has: these rows of B, these columns of A."""

    rows: slice
    columns: slice


class AdapterSlots:
    """Makes room for adapters beside each linear layer of `decoder`, and beside its experts if `room` says so, which use it
    from then on."""

    def __init__(self, decoder: Decoder, room: LoraRoom) -> None:
        self.config, self.room = decoder.config, room
        self.device = decoder.device
        self._shape = decoder.shape
        beside = _Beside(decoder, room)
        self._weights = []
        for layer in decoder.layers:
            self._weights.append(beside.layer(layer))
            if self.device.type == "cuda":
                torch.cuda.empty_cache()  # of weights that have moved, see `Linear.adapt`

    @property
    def nbytes(self) -> int:
        return sum(each.a.nbytes + each.b.nbytes for layer in self._weights for each in layer.values())

    @torch.inference_mode()
    def fill(self, slot: int, files: AdapterFiles) -> None:
        """This rank's share of an adapter, over what is there. Nobody else may use the slot. Errors: OSError, SafetensorError;
        ValueError for numbers that are not finite in the model's dtype."""
        for layer in self._weights:
            for weights in layer.values():
                weights.clear(slot)
        with safe_open(files.tensors, "pt") as opened:
            for linear in files.linears:
                self._fill(slot, linear, opened)

    def _fill(self, slot: int, linear: AdaptedLinear, opened: Any) -> None:
        """opened: the adapter's tensors."""
        (block, _, name), mixture = linear.projection.rpartition("."), self._shape.mixture
        product, first = PARTS[name]
        weights = self._weights[linear.layer][f"{block}.{product}" if block else product]
        ups: Sequence[Tensor]
        if linear.stacked:
            down, ups = _unstacked(linear, opened, len(weights.rows), self.config, self._shape)
        else:
            if linear.expert is not None and mixture is not None:
                if not 0 <= linear.expert - mixture.expert_start < mixture.experts:
                    return
                weights = weights.of(linear.expert - mixture.expert_start)
            share = share_of(linear.projection, self._shape)
            down, ups = opened.get_slice(linear.a)[:, share.columns], [opened.get_slice(linear.b)[share.rows]]
        for number, up in enumerate(ups, first):
            a, b = weights.part(number, slot)
            low, high = down.to(a.dtype), _scaled(linear, up, b.dtype).to(b.dtype)
            if not (low.isfinite().all() and high.isfinite().all()):  # nothing but NaN could come of them
                raise ValueError(f"{linear.projection} of layer {linear.layer} holds numbers that are not finite in {a.dtype}")
            a[..., : linear.rank, :].copy_(low)
            b[..., : linear.rank].copy_(high)


def adapter_slots(config: WorkerConfig, decoder: "Decoder | TransformersDecoder") -> AdapterSlots | None:
    """Room for the LoRA adapters of a decoder that has been loaded; None where none are served."""
    if not config.lora_slots:
        return None
    assert isinstance(decoder, Decoder), "refused before anything is started"
    return AdapterSlots(decoder, config.lora_room)


def _unstacked(
    linear: AdaptedLinear, opened: Any, parts: int, config: ModelConfig, shape: RankShape
) -> tuple[Tensor, Sequence[Tensor]]:
    """Of the experts and rows that the rank has: A [experts, rank, in], and B [experts, rows, rank] of each part."""
    assert config.mixture is not None
    assert shape.mixture is not None
    experts, held = config.mixture.experts, shape.mixture.expert_start
    down, up = opened.get_tensor(linear.a), opened.get_tensor(linear.b)
    down, up = down.view(experts, linear.rank, -1), up.view(len(up), linear.rank, experts).permute(2, 0, 1)
    if linear.turned:
        down, up = up.transpose(1, 2), down.transpose(1, 2)
    share = share_of(linear.projection, shape, in_turns=parts == 1)
    down, up = (each[held : held + shape.mixture.experts] for each in (down, up))
    return down[:, :, share.columns], [part[:, share.rows] for part in up.chunk(parts, 1)]


def _scaled(linear: AdaptedLinear, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded once."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return b.to(wide) * linear.scaling


def share_of(projection: str, shape: RankShape, in_turns: bool = False) -> ProjectionShare:
    """projection: as in `modules.shape_of`; of a stack's gates and ups either half, or with in_turns both."""
    (block, _, name), dim = projection.rpartition("."), shape.head_dim
    start, length = shape.intermediate_start, shape.intermediate
    if shape.mixture is not None and block == "experts":
        start, length = shape.mixture.intermediate_start, shape.mixture.intermediate
    elif shape.mixture is not None and block:
        start, length = shape.mixture.shared_start, shape.mixture.shared
    match name:
        case "router" | "shared_expert_gate":
            return ProjectionShare(WHOLE, WHOLE)
        case "q_proj" | "o_proj":
            start, length = shape.head_start * dim, shape.heads * dim
        case "k_proj" | "v_proj":
            start, length = shape.kv_head_start * dim, shape.kv_heads * dim
        case "gate_up_proj" if in_turns:
            start, length = 2 * start, 2 * length
    own = slice(start, start + length)
    return ProjectionShare(WHOLE, own) if name in ("o_proj", "down_proj") else ProjectionShare(own, WHOLE)


class _Beside:
    """Makes the room beside each product, by its name."""

    def __init__(self, decoder: Decoder, room: LoraRoom) -> None:
        self._decoder, self._room = decoder, room

    def layer(self, layer: Layer) -> dict[str, LoraWeights]:
        shape, hidden = self._decoder.shape, self._decoder.config.hidden
        width, kv_rows = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        qkv, o = self._linear(layer.qkv, hidden, width, kv_rows, kv_rows), self._linear(layer.o, width, hidden)
        of_mlp = self._mlp(layer.mlp, shape.intermediate) if isinstance(layer.mlp, SwiGLU) else self._mixture(layer.mlp)
        return {"qkv": qkv, "o": o} | of_mlp

    def _mlp(self, mlp: SwiGLU, width: int, block: str = "") -> dict[str, LoraWeights]:
        hidden = self._decoder.config.hidden
        gate_up, down = self._linear(mlp.gate_up, hidden, width, width), self._linear(mlp.down, width, hidden)
        return {f"{block}gate_up": gate_up, f"{block}down": down}

    def _mixture(self, mixture: Mixture) -> dict[str, LoraWeights]:
        shape, hidden = mixture.shape, self._decoder.config.hidden
        gates = (mixture.config.experts, 1) if mixture.shared is not None else (mixture.config.experts,)
        mixture.router.lora = router = self._of(hidden, *gates)
        shared = self._mlp(mixture.shared, shape.shared, "shared_expert.") if mixture.shared is not None else {}
        return {"router": router} | shared | (self._experts(mixture) if self._room.experts else {})

    def _experts(self, mixture: Mixture) -> dict[str, LoraWeights]:
        """A stack whose gates and ups are in turns has one A for both, as its adapters have."""
        shape, experts, hidden = mixture.shape, mixture.experts, self._decoder.config.hidden
        ups = (2 * shape.intermediate,) if experts.in_turns else (shape.intermediate, shape.intermediate)
        gate_up = self._of(hidden, *ups, experts=shape.experts)
        down = self._of(shape.intermediate, hidden, experts=shape.experts)
        experts.adapt(gate_up, down)
        return {"experts.gate_up": gate_up, "experts.down": down}

    def _linear(self, linear: Linear, columns: int, *rows: int) -> LoraWeights:
        """On one rank A stands behind the weight; with several the ranks' sums meet before a row's kernel could add its
        part."""
        lora = self._of(columns, *rows)
        linear.adapt(lora, self._decoder.shape.size == 1 and stands_behind(self._room.places, lora.rank))
        return lora

    def _of(self, columns: int, *rows: int, experts: int | None = None) -> LoraWeights:
        places, rank = self._room.places, self._room.rank
        return LoraWeights.empty(places, rank, columns, rows, self._decoder.dtype, self._decoder.device, experts)
