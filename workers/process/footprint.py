"""What a rank of a decoder takes, weights and KV, without a weight being read. Imports torch, on the meta device."""

from dataclasses import dataclass

import torch

from kvcache.layout import BlockLayout
from workers.config import LoraRoom
from workers.model.checkpoint.dtype import kv_dtype_name
from workers.model.config.architectures import ModelConfig
from workers.model.decoders.native import EMBEDDING, HEAD, Decoder
from workers.model.lora.slots import AdapterSlots
from workers.model.quantization.forms import Forms
from workers.model.reading import DecoderConfig
from workers.parallel.silent import Silent


@dataclass(frozen=True, slots=True)
class Footprint:
    """Of the largest rank. layout: of its blocks. adapter_bytes: of the room for LoRA adapters. kept: in words, what quantised
    weights are kept as."""

    weight_bytes: int
    layout: BlockLayout
    adapter_bytes: int = 0
    kept: str = "kept as plain numbers"


def footprint(
    config: DecoderConfig, size: int, dtype: torch.dtype, block_size: int, kv_dtype: str = "auto", keeps: bool = False,
    adapters: LoraRoom | None = None,
) -> Footprint:  # fmt: skip
    """size: ranks of a group. kv_dtype: as configured. keeps: quantised weights stay so where a GPU's kernels take them.
    adapters: what is kept for LoRA adapters. Errors: CheckpointError if so many cannot share it."""
    shape = config.shard(0, size)
    layout = BlockLayout(block_size, shape.layers, shape.kv_heads, shape.head_dim, kv_dtype_name(kv_dtype, dtype))
    if isinstance(config, ModelConfig):
        tables = (EMBEDDING, EMBEDDING) if config.tied else (EMBEDDING, HEAD)
        forms = Forms(config.scheme, keeps)
        decoder = Decoder(config, Silent(size), None, dtype, torch.device("meta"), 1, tables, forms=forms)
        weights = sum(piece.target.nbytes for part in decoder.parts() for piece in part.pieces())
        room = AdapterSlots(decoder, adapters).nbytes if adapters is not None and adapters.places else 0
        return Footprint(weights, layout, room, forms.says())
    from workers.model.decoders.transformers.loading import held_bytes
    from workers.model.transformers.classes import build  # with its class, which takes a second

    return Footprint(held_bytes(build(config.text), size, dtype), layout)
