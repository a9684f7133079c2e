"""Fills a rank's decoder, whichever of the two it is. Imports torch; transformers' classes only where they compute."""

from typing import TYPE_CHECKING

import torch

from workers.config import WorkerConfig
from workers.model.config.architectures import ModelConfig
from workers.model.decoder import Decoder, load_model
from workers.model.lora.slots import AdapterSlots
from workers.model.reading import DecoderConfig
from workers.model.sources.progress import Progress
from workers.parallel.communicator import Communicator

if TYPE_CHECKING:
    from workers.model.transformers.decoder import TransformersDecoder


def load_decoder(
    path: str, config: DecoderConfig, comm: Communicator, dtype: torch.dtype, device: torch.device, progress: Progress,
    longest: int, score_tokens: tuple[int, int] | None = None,
) -> "Decoder | TransformersDecoder":  # fmt: skip
    """This rank's shard, without attention. longest: positions of a sequence, at most. score_tokens: as in
    `Uses`, of a native one. Errors: CheckpointError, torch's
    out-of-memory error."""
    if isinstance(config, ModelConfig):
        return load_model(path, config, comm, dtype, device, None, progress, longest, score_tokens)
    from workers.model.transformers.decoder import load_transformers  # with its class, which takes a second

    return load_transformers(path, config, comm, dtype, device, progress, longest)


def adapter_slots(config: WorkerConfig, decoder: "Decoder | TransformersDecoder") -> AdapterSlots | None:
    """Room for the LoRA adapters of a decoder that has been loaded; None where none are served."""
    if not config.lora_slots:
        return None
    assert isinstance(decoder, Decoder), "refused before anything is started"
    return AdapterSlots(decoder, config.lora_slots, config.max_lora_rank)
