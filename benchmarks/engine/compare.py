"""Compares Manta's engine with its peers on random Qwen3-shaped checkpoints, all on the same prompts.

Each engine is a process of its own (`engine_worker.py`); the engines take turns, workload by workload, in
several rounds, so that a change in the machine's load meets all of them. Never imports an engine; torch only
to write weights.

    python -m benchmarks.engine --vllm-python path/to/its/venv/bin/python --json
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.shared.checkpoints import SHAPES, ensure_checkpoint
from benchmarks.shared.options import PAUSE_S, WARM_UP_SEED, add_engine_options, names_of, positive
from benchmarks.shared.report import Spread, figure, table
from benchmarks.shared.worker_process import EngineSpec, Worker, WorkerError, started
from benchmarks.shared.workloads import LATENCY_OUTPUT_TOKENS, Batch, PromptSource

ENGINES = ("manta", "vllm", "transformers")

# Metric -> value of one turn; metric -> the values of all rounds, in order.
Values = dict[str, float]
Series = dict[str, list[float]]


@dataclass(frozen=True, slots=True)
class Metric:
    """One line of the table. A ratio is always Manta / peer, so `better` says which way is good."""

    label: str
    better: str


METRICS = {
    "output_tokens_per_s": Metric("throughput, output tokens/s", "higher"),
    "ms_per_token": Metric("batch 1, ms a token", "lower"),
    "prefill_tokens_per_s": Metric("prefill, tokens/s", "higher"),
    "shared_prefix_s.cold": Metric("shared prefix, cold, s", "lower"),
    "shared_prefix_s.cached": Metric("shared prefix, cached, s", "lower"),
}


def throughput(worker: Worker, source: PromptSource) -> Values:
    """Output tokens per second of a batch, prefill included."""
    batch = source.throughput()
    return {"output_tokens_per_s": batch.output_tokens / _fresh_s(worker, batch)}


def latency(worker: Worker, source: PromptSource) -> Values:
    """Milliseconds per decoded token of one sequence: what 64 further tokens add."""
    first, longer = source.latency()
    first_s, longer_s = _fresh_s(worker, first), _fresh_s(worker, longer)
    return {"ms_per_token": (longer_s - first_s) / LATENCY_OUTPUT_TOKENS * 1e3}


def prefill(worker: Worker, source: PromptSource) -> Values:
    """Prompt tokens per second of one long prompt, up to its first output token."""
    batch = source.prefill()
    return {"prefill_tokens_per_s": batch.prompt_tokens / _fresh_s(worker, batch)}


def shared_prefix(worker: Worker, source: PromptSource) -> Values:
    """Seconds for a batch over a shared prefix that is new, and for another batch over the same prefix."""
    cold, cached = source.shared_prefix()
    return {
        "shared_prefix_s.cold": worker.run(cold).seconds,
        "shared_prefix_s.cached": worker.run(cached).seconds,
    }


WORKLOADS: dict[str, Callable[[Worker, PromptSource], Values]] = {
    "throughput": throughput,
    "latency": latency,
    "prefill": prefill,
    "shared_prefix": shared_prefix,
}


def _fresh_s(worker: Worker, batch: Batch) -> float:
    """Seconds of a batch that the engine cannot have seen; a prefix cache that is warm here is a mistake."""
    measurement = worker.run(batch)
    if measurement.cached_tokens * 20 > batch.prompt_tokens:
        raise WorkerError(f"{measurement.cached_tokens} tokens of new prompts came out of the prefix cache")
    return measurement.seconds


def take_turns(
    workers: dict[str, Worker], workloads: list[str], vocabulary: int, rounds: int
) -> dict[str, Series]:
    """Run every workload on every engine in each round, another engine first each time.

    Returns engine -> its values. All engines see the same prompts, which no earlier round has used.
    """
    series: dict[str, Series] = {name: {} for name in workers}
    names = list(workers)
    for turn in range(rounds):
        order = names[turn % len(names) :] + names[: turn % len(names)]
        for number, workload in enumerate(workloads):
            seed = turn * len(workloads) + number
            for name in order:
                time.sleep(PAUSE_S)
                values = WORKLOADS[workload](workers[name], PromptSource(vocabulary, seed))
                for metric, value in values.items():
                    series[name].setdefault(metric, []).append(value)
                shown = ", ".join(f"{metric} {figure(value)}" for metric, value in values.items())
                print(f"round {turn + 1} {name}: {shown}", file=sys.stderr, flush=True)
    return series


def summary(series: dict[str, Series], versions: dict[str, str]) -> dict[str, object]:
    """One model's part of the JSON object: Manta's medians, each peer's under its name, ratios, ranges.

    A ratio is the median over the rounds of Manta's value / the peer's in the same round.
    """
    medians = {
        name: _nested({key: statistics.median(values) for key, values in own.items()})
        for name, own in series.items()
    }
    ranges = {
        name: _nested({key: [min(values), max(values)] for key, values in own.items()})
        for name, own in series.items()
    }
    peers = {name: own for name, own in series.items() if name != "manta"}
    return {
        **medians.get("manta", {}),
        **{name: medians[name] for name in peers},
        "ratio": {
            name: _nested(ratios(series["manta"], own)) for name, own in peers.items() if "manta" in series
        },
        "range": ranges,
        "versions": versions,
    }


def ratios(own: Series, peer: Series) -> Values:
    """Metric -> the median of own / peer, round by round: what slows a whole round cancels out."""
    return {
        metric: statistics.median(a / b for a, b in zip(values, peer[metric], strict=True))
        for metric, values in own.items()
    }


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    """Turn {"a.b": 1} into {"a": {"b": 1}}."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        outer, _, inner = key.partition(".")
        if inner:
            nested.setdefault(outer, {})[inner] = value
        else:
            nested[outer] = value
    return nested


def print_table(model: str, series: dict[str, Series]) -> None:
    """Medians with their range, and Manta's ratio to each peer."""
    peers = [name for name in series if name != "manta"] if "manta" in series else []
    compared = {name: ratios(series["manta"], series[name]) for name in peers}
    rows = [
        [
            f"{metric.label} ({metric.better} is better)",
            *(str(Spread.of(own[key])) for own in series.values()),
            *(f"{compared[name][key]:.2f}" for name in peers),
        ]
        for key, metric in METRICS.items()
        if all(key in own for own in series.values())
    ]
    print(f"\n{model}, median (range)")
    print(table(["", *series, *(f"manta/{name}" for name in peers)], rows), flush=True)


def specs(options: argparse.Namespace) -> dict[str, EngineSpec]:
    """The engines asked for; vLLM needs the interpreter of an environment that has it."""
    pythons = {
        "manta": Path(sys.executable),
        "vllm": options.vllm_python,
        "transformers": Path(sys.executable),
    }
    if "vllm" in options.engines and options.vllm_python is None:
        print("vllm is left out: give --vllm-python", file=sys.stderr, flush=True)
    return {
        name: EngineSpec(
            engine=name,
            python=pythons[name],
            dtype=options.dtype,
            tensor_parallel_size=1 if name == "transformers" else options.tensor_parallel_size,
            threads=options.threads,
            kv_gib=options.kv_gib,
            block_size=options.block_size if name == "manta" else None,
            max_num_batched_tokens=options.max_num_batched_tokens if name == "manta" else None,
            ray=options.ray and name == "manta",
        )
        for name in options.engines
        if pythons[name] is not None
    }


def measure_model(model: str, options: argparse.Namespace) -> dict[str, object]:
    """Measure every engine on one checkpoint, print the table, return the model's part of the JSON object."""
    checkpoint = ensure_checkpoint(model, options.cache)
    vocabulary = SHAPES[model].vocabulary
    warm_up = PromptSource(vocabulary, WARM_UP_SEED).warm_up()
    peers = frozenset(ENGINES[1:])
    with started(specs(options), checkpoint, warm_up, options.cache / "logs", optional=peers) as workers:
        series = take_turns(workers, options.workloads, vocabulary, options.rounds)
        versions = {name: worker.version for name, worker in workers.items()}
    print_table(model, series)
    return summary(series, versions)


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line. Raises SystemExit, with the choices, for a name that is not known."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=names_of(SHAPES), default="0.1B,0.6B", help=", ".join(SHAPES))
    parser.add_argument(
        "--engines", type=names_of(ENGINES), default=",".join(ENGINES), help="Manta and its peers"
    )
    parser.add_argument("--workloads", type=names_of(WORKLOADS), default=",".join(WORKLOADS))
    parser.add_argument(
        "--vllm-python", type=Path, metavar="PATH", help="interpreter of an environment with vLLM for CPU"
    )
    parser.add_argument("--rounds", type=positive, default=3, help="turns of each engine (%(default)s)")
    add_engine_options(parser)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--ray", action="store_true", help="Manta on Ray")
    where.add_argument("--local", dest="ray", action="store_false", help="Manta in one process (the default)")
    return parser.parse_args(arguments)


def main() -> None:
    """Measure each model in turn; exit with 1 if Manta itself could not be measured."""
    options = parse_options()
    try:
        result = {model: measure_model(model, options) for model in options.models}
    except WorkerError as error:
        sys.exit(f"error: {error}")
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
