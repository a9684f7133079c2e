"""One rank's shards of the resident adapters, beside the linear layers of its decoder. Imports torch and safetensors."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import Tensor

from workers.config import WorkerConfig
from workers.kernels.lora.weights import LoraWeights
from workers.model.config.architectures import RankShape
from workers.model.decoders.native import Decoder, Layer
from workers.model.layers.linear import Linear
from workers.model.layers.mlp import SwiGLU
from workers.model.lora.files import AdaptedLinear, AdapterFiles

if TYPE_CHECKING:
    from workers.model.decoders.transformers.decoder import TransformersDecoder

PARTS = {"q_proj": ("qkv", 0), "k_proj": ("qkv", 1), "v_proj": ("qkv", 2), "o_proj": ("o", 0),
         "gate_proj": ("gate_up", 0), "up_proj": ("gate_up", 1), "down_proj": ("down", 0)}  # fmt: skip
"""The product that each projection is a part of."""


@dataclass(frozen=True, slots=True)
class ProjectionShare:
    """What of a projection a rank has. rows: it is divided by rows, hence B is; otherwise by columns, hence A."""

    start: int
    length: int
    rows: bool


class AdapterSlots:
    """Makes room for `slots` adapters of `rank` at most beside each linear layer of `decoder`, which uses it from then on."""

    def __init__(self, decoder: Decoder, slots: int, rank: int) -> None:
        self.config = decoder.config
        self.rank = rank
        self.device = decoder.device
        self._shape = decoder.shape
        self._weights = [_beside(layer, decoder, slots, rank) for layer in decoder.layers]

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
                name, number = PARTS[linear.projection]
                a, b = self._weights[linear.layer][name].part(number, slot)
                share = share_of(linear.projection, self._shape)
                columns = slice(None) if share.rows else slice(share.start, share.start + share.length)
                rows = slice(share.start, share.start + share.length) if share.rows else slice(None)
                down = opened.get_slice(linear.a)[:, columns].to(a.dtype)
                up = _scaled(linear, opened.get_slice(linear.b)[rows], b.dtype).to(b.dtype)
                if not (down.isfinite().all() and up.isfinite().all()):  # nothing but NaN could come of them
                    where = f"{linear.projection} of layer {linear.layer}"
                    raise ValueError(f"{where} holds numbers that are not finite in {a.dtype}")
                a[: linear.rank].copy_(down)
                b[:, : linear.rank].copy_(up)


def adapter_slots(config: WorkerConfig, decoder: "Decoder | TransformersDecoder") -> AdapterSlots | None:
    """Room for the LoRA adapters of a decoder that has been loaded; None where none are served."""
    if not config.lora_slots:
        return None
    assert isinstance(decoder, Decoder), "refused before anything is started"
    return AdapterSlots(decoder, config.lora_slots, config.max_lora_rank)


def _scaled(linear: AdaptedLinear, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded once."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return b.to(wide) * linear.scaling


def share_of(projection: str, shape: RankShape) -> ProjectionShare:
    dim = shape.head_dim
    match projection:
        case "q_proj" | "o_proj":
            return ProjectionShare(shape.head_start * dim, shape.heads * dim, projection == "q_proj")
        case "k_proj" | "v_proj":
            return ProjectionShare(shape.kv_head_start * dim, shape.kv_heads * dim, True)
        case _:
            return ProjectionShare(shape.intermediate_start, shape.intermediate, projection != "down_proj")


def _beside(layer: Layer, decoder: Decoder, slots: int, rank: int) -> dict[str, LoraWeights]:
    config, shape, dim = decoder.config, decoder.shape, decoder.shape.head_dim
    kv_rows, width = shape.kv_heads * dim, shape.heads * dim
    sizes: dict[str, tuple[Linear, int, tuple[int, ...]]] = {
        "qkv": (layer.qkv, config.hidden, (width, kv_rows, kv_rows)),
        "o": (layer.o, width, (config.hidden,)),
    }
    if isinstance(layer.mlp, SwiGLU):  # of experts none are adapted
        sizes["gate_up"] = layer.mlp.gate_up, config.hidden, (shape.intermediate, shape.intermediate)
        sizes["down"] = layer.mlp.down, shape.intermediate, (config.hidden,)
    beside = {}
    for name, (linear, columns, rows) in sizes.items():
        linear.lora = beside[name] = LoraWeights(slots, rank, columns, rows, decoder.dtype, decoder.device)
    return beside
