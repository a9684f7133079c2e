"""Drives decoders of transformers' classes without the engine: ranks are threads of this process, each over its own pool."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvcache.layout import BlockLayout
from kvcache.pool import KVPool
from tests.workers.decoding import BLOCK_SIZE, BLOCKS_EACH, SEQUENCES, make_step
from workers.model.decoders.transformers.decoder import TransformersDecoder, load_transformers
from workers.model.sources.progress import Progress
from workers.model.transformers.config import read_transformers
from workers.parallel.communicator import Communicator
from workers.parallel.connect import Solo, ThreadGroup
from workers.step import StepInput

CPU = torch.device("cpu")


class Ranks:
    """A tensor-parallel group over one checkpoint. Close it to end its threads. progress: of rank 0's loading."""

    def __init__(
        self, path: Path, size: int = 1, dtype: torch.dtype = torch.float32, progress: Progress | None = None,
        positions: int | None = None,
    ) -> None:  # fmt: skip
        self.config = read_transformers(path)
        self.config.survey(size)
        self._threads = ThreadPoolExecutor(size)
        self._comms: Sequence[Communicator] = ThreadGroup.create(size) if size > 1 else [Solo()]

        def load(comm: Communicator) -> TransformersDecoder:
            told = progress if comm.rank == 0 else None
            decoder = load_transformers(path, self.config, comm, dtype, CPU, told, positions)
            shape = decoder.shape
            layout = BlockLayout(BLOCK_SIZE, shape.layers, shape.kv_heads, shape.head_dim, str(dtype).removeprefix("torch."))
            pool = KVPool(layout, SEQUENCES * BLOCKS_EACH, CPU)
            pool.data.fill_(torch.nan)  # what nobody has written must not be read
            decoder.attention = decoder.attention_over(pool, "cpu", range(len(decoder.forms)))
            return decoder

        self.decoders = self._together(load, self._comms)

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown()

    def logits(self, step: StepInput) -> Tensor:
        """[samples, vocab_size]"""
        return torch.cat(self.local_logits(step), 1)[:, : self.config.vocab_size]

    def local_logits(self, step: StepInput) -> list[Tensor]:
        return self._together(lambda decoder: decoder.forward(step), self.decoders)

    def generate(self, prompts: Sequence[list[int]], new_tokens: int, chunk: int) -> list[list[int]]:
        """Greedy, all prompts in the same steps: each in pieces of `chunk` tokens, then token by token."""
        known = [list(prompt) for prompt in prompts]
        done = [0] * len(prompts)
        while rows := [i for i, prompt in enumerate(prompts) if len(known[i]) < len(prompt) + new_tokens]:
            parts = {i: known[i][done[i] : done[i] + chunk] for i in rows}
            order = sorted(rows, key=lambda i: len(parts[i]) > 1)  # decodes first
            logits = self.logits(make_step([(i, done[i], parts[i]) for i in order]))
            for i, row in zip(order, logits, strict=True):
                done[i] += len(parts[i])
                if done[i] == len(known[i]):
                    known[i].append(int(row.argmax()))
        return [tokens[len(prompt) :] for tokens, prompt in zip(known, prompts, strict=True)]

    def _together(self, call: Callable[[Any], Any], things: Sequence[Any]) -> list[Any]:
        """A rank that fails lets the others go."""

        def guarded(thing: Any) -> Any:
            try:
                return call(thing)
            except BaseException as error:
                self._comms[0].abort(str(error))
                raise

        return list(self._threads.map(guarded, things))
