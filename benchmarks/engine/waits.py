"""How long a GPU waits for its host: the engine of `LLM(local=True)` on a GPU, with a clock in the GPU's place.

    python -m benchmarks.engine.waits --rounds 20

Front end and scheduler are in one process, the step loop in another, as they are on a GPU; a step takes `--chunk-ms` for each
8,192 tokens, `--decode-ms` at least, and nothing is computed. *Busy* is the sum of a work's steps. *Before*: from the call to
the first step's begin; *between*: while there was no step to do though more were to come; *after*: from the last step's end to
the caller. Works as in `benchmarks.gpu`. Needs two cores, and nobody else on them.
"""

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu import works as all_works
from benchmarks.shared.checkpoints import SHAPES, ensure_checkpoint
from benchmarks.shared.options import names_of, positive
from benchmarks.shared.report import Spread, table
from scheduler.protocol.leaders import Start
from workers.loop.batch import Launched, ResidentBatch
from workers.loop.rank import Rank, StepTokens

WORKS = ("prefill", "batch_1", "batch_32")
CODE = "import sys; sys.path[:] = {path!r}; from benchmarks.engine.waits import child; child({descriptor})"
CHUNK_TOKENS = 8192
HUNG_AFTER_S = 60.0
Span = tuple[float, float]


@dataclass
class Clock:
    """An `Executor` whose steps, one after another, end when their time is over."""

    chunk_s: float
    decode_s: float
    log: Path
    ends_s: float = 0.0

    def admit(self, start: Start) -> None: ...
    def release(self, row: int) -> None: ...
    def copy(self, source: int, target: int, tokens: int, *, narrow: bool = False) -> None: ...
    def close(self) -> None: ...

    def execute(self, batch: ResidentBatch, step: Launched) -> "Timed":
        del batch
        tokens = int(step.plan.counts.sum())
        begins_s = max(self.ends_s, time.monotonic())
        self.ends_s = begins_s + max(self.decode_s, self.chunk_s * tokens / CHUNK_TOKENS)
        return Timed(self, len(step.plan.rows), (begins_s, self.ends_s))


@dataclass(frozen=True, slots=True)
class Timed:
    """A step. span_s: its begin and end, which the log is told when the host has waited for it."""

    clock: Clock
    rows: int
    span_s: Span

    def done(self) -> bool:
        return time.monotonic() >= self.span_s[1]

    def wait(self) -> StepTokens:
        time.sleep(max(0.0, self.span_s[1] - time.monotonic()))
        with self.clock.log.open("a") as log:
            log.write(json.dumps(self.span_s) + "\n")
        return StepTokens(np.full(self.rows, 5, np.int64))


def child(descriptor: int) -> None:
    """The process of the step loop."""
    from cluster.local import groups, process

    asked = json.loads(os.environ["MANTA_WAITS"])
    build = groups.build_rank  # type: ignore[attr-defined]

    def build_timed(*args: Any, **options: Any) -> Any:
        built = build(*args, **options)
        clock = Clock(asked["chunk_s"], asked["decode_s"], Path(asked["log"]))
        return dataclasses.replace(built, rank=Rank(built.rank.batch, clock, depth=1))

    groups.build_rank = build_timed  # type: ignore[attr-defined]
    process.main(descriptor)


@dataclass(frozen=True, slots=True)
class Waits:
    """Milliseconds of one call."""

    busy: float
    before: float
    between: float
    after: float

    @classmethod
    def of(cls, called_s: float, returned_s: float, spans_s: Sequence[Span]) -> "Waits":
        begun_s, ended_s = spans_s[0][0], spans_s[-1][1]
        busy_s = sum(end - begin for begin, end in spans_s)
        parts_s = (busy_s, begun_s - called_s, ended_s - begun_s - busy_s, returned_s - ended_s)
        return cls(*(1e3 * part for part in parts_s))


def measure(names: Sequence[str], model: Path, rounds: int, chunk_s: float, decode_s: float) -> dict[str, list[Waits]]:
    from cluster.local import engine, process
    from manta import LLM, SamplingParams

    def in_a_process(config: Any, resolved: Any) -> Any:
        return process.ProcessGroups(config, resolved, HUNG_AFTER_S)

    found: dict[str, list[Waits]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory(prefix="manta-waits-") as folder:
        log = Path(folder) / "steps.jsonl"
        os.environ["MANTA_WAITS"] = json.dumps({"chunk_s": chunk_s, "decode_s": decode_s, "log": str(log)})
        engine.ThreadGroups, process.CODE = in_a_process, CODE  # type: ignore[attr-defined, assignment]
        with LLM(str(model), local=True, device="cpu", max_num_batched_tokens=CHUNK_TOKENS, kv_memory=1 << 32) as llm:
            lines = 0
            for turn in range(rounds + 1):
                for name in names:
                    work = getattr(all_works, name)(turn)
                    params = [SamplingParams(temperature=work.temperature, max_tokens=length, ignore_eos=True)
                              for length in work.lengths]  # fmt: skip
                    called_s = time.monotonic()
                    llm.generate(work.prompts, params)
                    returned_s = time.monotonic()
                    spans = [tuple(json.loads(line)) for line in log.read_text().splitlines()[lines:]]
                    lines += len(spans)
                    if turn > 0:
                        found[name].append(Waits.of(called_s, returned_s, spans))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="0.1B", choices=list(SHAPES), help="whose pool is allocated (%(default)s)")
    parser.add_argument("--works", type=names_of(WORKS), default=["prefill"], help=f"of {','.join(WORKS)} (prefill)")
    parser.add_argument("--rounds", type=positive, default=20)
    parser.add_argument("--chunk-ms", type=float, default=20.3, help="a step of 8,192 tokens (%(default)s: 0.6B on an H200)")
    parser.add_argument("--decode-ms", type=float, default=0.7, help="a step at least (%(default)s)")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "manta-benchmarks")
    parser.add_argument("--json", action="store_true", help="print a JSON object as well")
    asked = parser.parse_args()
    model = ensure_checkpoint(asked.model, asked.cache)
    found = measure(asked.works, model, asked.rounds, 1e-3 * asked.chunk_ms, 1e-3 * asked.decode_ms)
    parts = [each.name for each in dataclasses.fields(Waits)]
    spreads = {name: {part: Spread.of([getattr(each, part) for each in waits]) for part in parts}
               for name, waits in found.items()}  # fmt: skip
    print(table(["ms, median (range)", *parts], [[name, *map(str, row.values())] for name, row in spreads.items()]))
    if asked.json:
        json.dump({name: {part: spread.median for part, spread in row.items()} for name, row in spreads.items()}, sys.stdout)


if __name__ == "__main__":
    main()
