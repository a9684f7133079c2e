"""Drives `Decoder` without the engine: all ranks as threads of this process, KV in the dense reference."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tests.workers.attention.dense_attention import DenseAttention
from workers.config import ReadingConfig
from workers.model.config.architectures import ModelConfig
from workers.model.decoders.native import Decoder, load_model
from workers.model.reading import read_model
from workers.parallel.communicator import Communicator
from workers.parallel.connect import Solo, ThreadGroup
from workers.step import StepInput

BLOCK_SIZE, BLOCKS_EACH, SEQUENCES = 16, 8, 4
CPU = torch.device("cpu")


def make_step(chunks: Sequence[tuple[int, int, Sequence[int]]]) -> StepInput:
    """chunks: (sequence number, first position, tokens), decodes first. Every chunk's last token is sampled.

    Sequence i holds the blocks [i * BLOCKS_EACH, (i + 1) * BLOCKS_EACH).
    """
    tables = np.stack([np.arange(BLOCKS_EACH, dtype=np.int32) + seq * BLOCKS_EACH for seq, _, _ in chunks])
    lengths = np.array([len(tokens) for _, _, tokens in chunks], np.int32)
    contexts = np.array([first + len(tokens) for _, first, tokens in chunks], np.int32)
    positions = np.concatenate([np.arange(first, first + len(tokens)) for _, first, tokens in chunks])
    bases = np.repeat([seq * BLOCKS_EACH * BLOCK_SIZE for seq, _, _ in chunks], lengths)
    starts = np.concatenate(([0], np.cumsum(lengths, dtype=np.int32))).astype(np.int32)
    return StepInput(
        tokens=torch.tensor([token for _, _, tokens in chunks for token in tokens]),
        positions=torch.from_numpy(positions),
        slots=torch.from_numpy(positions + bases),
        query_starts=torch.from_numpy(starts),
        context_lens=torch.from_numpy(contexts),
        block_tables=torch.from_numpy(tables),
        sample_at=torch.from_numpy(starts[1:].astype(np.int64) - 1),
        decodes=int((lengths == 1).sum()),
        host_query_lens=lengths,
        host_context_lens=contexts,
        host_block_tables=tables,
    )


class Ranks:
    """A tensor-parallel group of decoders over one checkpoint. Close it to end its threads."""

    def __init__(
        self, path: Path, size: int = 1, dtype: torch.dtype = torch.float32, device: torch.device = CPU,
        expert_parallel: bool = False,
    ) -> None:  # fmt: skip
        config = read_model(path, ReadingConfig(model_implementation="native", enable_expert_parallel=expert_parallel))
        assert isinstance(config, ModelConfig)
        self.config = config
        self._device = device
        self._threads = ThreadPoolExecutor(size)
        comms: Sequence[Communicator] = ThreadGroup.create(size) if size > 1 else [Solo()]

        def load(comm: Communicator) -> Decoder:
            shape = self.config.shard(comm.rank, comm.size)
            forms = self.config.forms
            attention = DenseAttention(shape, dtype, SEQUENCES * BLOCKS_EACH, BLOCK_SIZE, device, forms)
            return load_model(path, self.config, comm, dtype, device, attention)

        self.decoders = list(self._threads.map(load, comms))

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown()

    def local_logits(self, step: StepInput) -> list[Tensor]:
        names = ("tokens", "positions", "slots", "query_starts", "context_lens", "block_tables", "sample_at")
        step = replace(step, **{name: getattr(step, name).to(self._device) for name in names})
        return list(self._threads.map(lambda decoder: decoder.forward(step), self.decoders))

    def logits(self, step: StepInput) -> Tensor:
        """[samples, vocab_size]"""
        return torch.cat(self.local_logits(step), 1)[:, : self.config.vocab_size]

    def generate(self, prompt: Sequence[int], new_tokens: int) -> list[int]:
        """Greedy, the prompt in one chunk."""
        chunk, position = list(prompt), 0
        out: list[int] = []
        while len(out) < new_tokens:
            logits = self.logits(make_step([(0, position, chunk)]))
            position += len(chunk)
            out.append(int(logits.argmax()))
            chunk = out[-1:]
        return out
