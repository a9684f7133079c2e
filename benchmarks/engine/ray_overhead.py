"""What Ray costs: one batch on Manta in one process and on Ray (one group, one rank), alternately in one run.

The aim is a ratio of 0.95 or more. Never imports an engine; each side is a process of its own
(`engine_worker.py`).

    python -m benchmarks.engine.ray_overhead --model 0.6B --rounds 5 --json
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

from benchmarks.shared.checkpoints import SHAPES, ensure_checkpoint
from benchmarks.shared.options import PAUSE_S, WARM_UP_SEED, add_engine_options, positive
from benchmarks.shared.report import Spread, table
from benchmarks.shared.worker_process import EngineSpec, Worker, WorkerError, started
from benchmarks.shared.workloads import PromptSource

SIDES = ("local", "ray")


def alternate(workers: dict[str, Worker], vocabulary: int, rounds: int) -> dict[str, list[float]]:
    """Output tokens per second of the same new batch on each side, another side first each time."""
    rates: dict[str, list[float]] = {side: [] for side in SIDES}
    for turn in range(rounds):
        batch = PromptSource(vocabulary, turn).throughput()
        for side in SIDES if turn % 2 == 0 else reversed(SIDES):
            time.sleep(PAUSE_S)
            rates[side].append(batch.output_tokens / workers[side].run(batch).seconds)
        shown = ", ".join(f"{side} {rates[side][-1]:.0f}" for side in SIDES)
        print(f"round {turn + 1}, output tokens/s: {shown}", file=sys.stderr, flush=True)
    return rates


def measure(options: argparse.Namespace) -> dict[str, object]:
    """Load both sides, let them alternate, print the table and return the JSON object."""
    checkpoint = ensure_checkpoint(options.model, options.cache)
    vocabulary = SHAPES[options.model].vocabulary
    specs = {
        side: EngineSpec(
            engine="manta",
            python=Path(sys.executable),
            dtype=options.dtype,
            tensor_parallel_size=options.tensor_parallel_size,
            threads=options.threads,
            kv_gib=options.kv_gib,
            block_size=options.block_size,
            max_num_batched_tokens=options.max_num_batched_tokens,
            ray=side == "ray",
        )
        for side in SIDES
    }
    warm_up = PromptSource(vocabulary, WARM_UP_SEED).warm_up()
    with started(specs, checkpoint, warm_up, options.cache / "logs", optional=frozenset()) as workers:
        rates = alternate(workers, vocabulary, options.rounds)
    pairs = [ray / local for local, ray in zip(rates["local"], rates["ray"], strict=True)]
    rows = [["output tokens/s", *(str(Spread.of(rates[side])) for side in SIDES), str(Spread.of(pairs))]]
    print(f"\n{options.model}, median (range)")
    print(table(["", *SIDES, "ray/local"], rows), flush=True)
    medians = {f"{side}_output_tokens_per_s": statistics.median(rates[side]) for side in SIDES}
    return {
        "model": options.model,
        **medians,
        "ratio": statistics.median(pairs),
        "ratio_range": [min(pairs), max(pairs)],
    }


def main() -> None:
    """Parse the command line and measure; exit with 1 if a side could not be measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(SHAPES), default="0.1B")
    parser.add_argument("--rounds", type=positive, default=5, help="turns of each side (%(default)s)")
    add_engine_options(parser)
    options = parser.parse_args()
    try:
        result = measure(options)
    except WorkerError as error:
        sys.exit(f"error: {error}")
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
