"""Groups of the real model without a scheduler: the test writes the log, turn by turn."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from scheduler.protocol.leaders import Command, LeaseId, Start
from scheduler.protocol.sampling import SamplingParams
from tests.workers.process.test_build import CONFIG, RESOLVED
from workers.loop.rank import Rank
from workers.parallel.communicator import Communicator
from workers.parallel.in_process import Solo, ThreadGroup
from workers.process.build import Built, build_rank

PROMPT = np.random.default_rng(7).integers(0, 199, 45).tolist()
OUTPUT = 20
BLOCKS = 12  # of 16 tokens


class Group:
    """Ranks as threads, all of which make the same turns."""

    def __init__(
        self, model: Path, size: int, dtype: str, depth: int, *, host_kv_memory: int = 0, kv_dtype: str = "auto"
    ) -> None:
        config = replace(
            CONFIG, model=str(model), dtype=dtype, kv_memory=BLOCKS << 20, host_kv_memory=host_kv_memory, kv_dtype=kv_dtype
        )
        resolved = replace(RESOLVED, max_model_len=96)
        self.threads = ThreadPoolExecutor(size)
        comms: Sequence[Communicator] = ThreadGroup.create(size) if size > 1 else [Solo()]

        def build(comm: Communicator) -> Built:
            built = build_rank(config, resolved, comm)
            assert built.sizes.blocks >= BLOCKS
            return replace(built, rank=Rank(built.rank.batch, built.rank.executor, depth))

        self.built = list(self.threads.map(build, comms))
        self.ranks = [built.rank for built in self.built]

    def turn(self, *commands: Command) -> dict[int, int]:
        """{lease: token} of the step that was committed, the same on every rank."""
        results = list(self.threads.map(lambda rank: rank.turn(commands), self.ranks))
        made = []
        for result in results:
            samples = result.step.samples & result.live if result is not None else np.zeros(0, np.bool_)
            leases = result.step.leases[samples].tolist() if result is not None else []
            made.append(dict(zip(leases, result.tokens.ids[samples].tolist() if result is not None else [], strict=True)))
        assert all(tokens == made[0] for tokens in made)
        return made[0]

    def output(self, name: LeaseId, *commands: Command) -> list[int]:
        tokens = []
        while True:
            tokens += [token for of, token in self.turn(*commands).items() if of == name]
            commands = ()
            if self.ranks[0].idle:
                return tokens

    def close(self) -> None:
        for rank in self.ranks:
            rank.close()
        self.threads.shutdown()


def start(name: LeaseId, blocks: Sequence[int], cached: int = 0, tokens: Sequence[int] = PROMPT) -> Start:
    return Start(
        lease=name, tokens=np.array(tokens, np.int32).tobytes(), prompt_tokens=len(tokens), cached_tokens=cached,
        blocks=np.array(blocks, np.int32).tobytes(), params=SamplingParams(max_tokens=OUTPUT, temperature=0.0), seed=3,
        choice=0, stop_ids=(), max_tokens=OUTPUT,
    )  # fmt: skip
