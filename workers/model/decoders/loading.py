"""Fills a rank's decoder, whichever of the two it is. Imports torch; transformers' classes only where they compute."""

from typing import TYPE_CHECKING

import torch

from workers.model.config.architectures import ModelConfig
from workers.model.decoders.native import Decoder, load_model
from workers.model.reading import DecoderConfig
from workers.model.sources.progress import Progress
from workers.parallel.communicator import Communicator

if TYPE_CHECKING:
    from workers.model.decoders.transformers.decoder import TransformersDecoder


def load_decoder(
    path: str, config: DecoderConfig, comm: Communicator, dtype: torch.dtype, device: torch.device, progress: Progress,
    longest: int, score_tokens: tuple[int, int] | None = None,
) -> "Decoder | TransformersDecoder":  # fmt: skip
    """This rank's shard, without attention. longest: positions of a sequence, at most. score_tokens: as in `Uses`, of
    a native one. Errors: CheckpointError, torch's out-of-memory error."""
    if isinstance(config, ModelConfig):
        return load_model(path, config, comm, dtype, device, None, progress, longest, score_tokens)
    from workers.model.decoders.transformers.decoder import load_transformers  # with its class, which takes a second

    return load_transformers(path, config, comm, dtype, device, progress, longest)
