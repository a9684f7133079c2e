"""What the endpoint costs over the engine called directly, and how it answers at several rates, beside vLLM's server if there
is one. Never imports an engine.

All sides have the same options, are loaded at once, and take turns in one run: `LLM` in a process of its own
(`engine_worker.py`), and `manta serve` (and `vllm serve`) with clients in a process of theirs (`load.py`), each request
streamed over a connection of its own. Transports: local (uvicorn and the engine in one process), serve (Ray Serve's own proxy),
haproxy (Manta's default).

GuideLLM drives the endpoint too (docs/performance.md), but it needs most of a core for itself, draws more arrivals than it was
told, and cannot take turns with an engine; so the arrivals here are our own, Poisson by a seed.

    python -m benchmarks.serving --model 0.1B --transports local,haproxy,serve --rounds 5 --json
    python -m benchmarks.serving --model 0.1B --transports haproxy --vllm-python path/to/its/venv/bin/python
"""

import argparse
import contextlib
import json
import random
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.shared.checkpoints import SHAPES, ensure_checkpoint, with_words
from benchmarks.shared.endpoint import Ask, Clients, Endpoint, ServingError, completed, completion, serving, serving_vllm
from benchmarks.shared.load import Outcome
from benchmarks.shared.options import PAUSE_S, WARM_UP_SEED, add_engine_options, names_of, positive
from benchmarks.shared.report import Spread, figure, table
from benchmarks.shared.worker_process import EngineSpec, Worker, WorkerError, started
from benchmarks.shared.workloads import Batch, PromptSource

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny"
TINY_VOCABULARY = 4096
ENGINE, ENDPOINT = "engine", "endpoint"
TRANSPORTS = {"local": ("--local",), "haproxy": ("--haproxy",), "serve": ("--no-haproxy",)}
PARTS = ("saturation", "latency", "rates", "streams")
LATENCY_PAIRS = 20
"""Requests of one round to each side, one at a time."""

MANY_STREAMS = 512


@dataclass(frozen=True, slots=True)
class Sides:
    """All sides of one transport, loaded. name: of the transport. endpoints: Manta's, and vLLM's if there is one."""

    name: str
    engine: Worker
    endpoints: Mapping[str, Endpoint]
    clients: Clients

    def in_turn(self, turn: int) -> list[str]:
        """Every side, another one first each time."""
        names = [ENGINE, *self.endpoints]
        return names[turn % len(names) :] + names[: turn % len(names)]

    def ask(self, side: str, batch: Batch) -> Sequence[Outcome]:
        """Errors: ServingError unless every request got all of its tokens."""
        asks = [Ask(completion(prompt, batch.max_tokens)) for prompt in batch.prompts]
        outcomes = completed(self.clients.run(self.endpoints[side], asks))
        if any(outcome.tokens != batch.max_tokens for outcome in outcomes):
            raise ServingError(f"a request to {side} got other than {batch.max_tokens} tokens")
        return outcomes


def saturation(sides: Sides, vocabulary: int, rounds: int) -> dict[str, object]:
    """Output tokens/s of one full batch on each side; ratios of Manta's endpoint to each other side, round by round."""
    rates: dict[str, list[float]] = {side: [] for side in sides.in_turn(0)}
    for turn in range(rounds):
        batch = PromptSource(vocabulary, turn).throughput()
        for side in sides.in_turn(turn):
            time.sleep(PAUSE_S)
            if side == ENGINE:
                seconds = sides.engine.run(batch).seconds
            else:
                seconds = max(outcome.last_s for outcome in sides.ask(side, batch))
            rates[side].append(batch.output_tokens / seconds)
    spreads = {side: Spread.of(values) for side, values in rates.items()}
    for side in rates.keys() - {ENDPOINT}:
        spreads[f"{ENDPOINT} / {side}"] = Spread.of([a / b for a, b in zip(rates[ENDPOINT], rates[side], strict=True)])
    print(f"\n{sides.name}: 32 streams at once, output tokens/s, median (range)")
    print(table(list(spreads), [[str(spread) for spread in spreads.values()]]), flush=True)
    return {name: [spread.median, spread.low, spread.high] for name, spread in spreads.items()}


def latency(sides: Sides, vocabulary: int, rounds: int) -> dict[str, object]:
    """Time to one token, one request at a time, the sides in turns. added: by Manta's endpoint over its engine."""
    draw = random.Random(WARM_UP_SEED + 1)
    spent: dict[str, list[float]] = {side: [] for side in sides.in_turn(0)}
    for turn in range(rounds * LATENCY_PAIRS):
        for side in sides.in_turn(turn):
            prompt = draw.choices(range(vocabulary), k=draw.randint(64, 256))
            if side == ENGINE:
                seconds = sides.engine.run(Batch([prompt], 1)).seconds
            else:
                outcome = sides.ask(side, Batch([prompt], 1))[0]
                assert outcome.first_s is not None
                seconds = outcome.first_s - outcome.sent_s
            spent[side].append(seconds * 1e3)
    medians = {side: statistics.median(values) for side, values in spent.items()}
    added_ms = medians[ENDPOINT] - medians[ENGINE]
    print(f"\n{sides.name}: time to the first token, one request at a time, ms p50 (p99)")
    print(table([*spent, "added"], [[*(percentiles(values) for values in spent.values()), figure(added_ms)]]), flush=True)
    return {**medians, "added_ms": added_ms}


def rates(sides: Sides, vocabulary: int, per_s: Sequence[float], seconds: float) -> list[dict[str, object]]:
    """Poisson arrivals at each rate, whatever the answers do; then 32 under way all the time. The endpoints in turns."""
    rows, results = [], []
    for rate in (*per_s, None):
        asks, limit = arrivals(vocabulary, rate, seconds), 32 if rate is None else None
        name = "32 under way" if rate is None else f"{rate:g}/s"
        for side, endpoint in sides.endpoints.items():
            time.sleep(PAUSE_S)
            outcomes = completed(sides.clients.run(endpoint, asks, limit))
            began_s = [outcome.sent_s if rate is None else outcome.due_s for outcome in outcomes]
            ttft = [((outcome.first_s or 0.0) - at_s) * 1e3 for outcome, at_s in zip(outcomes, began_s, strict=True)]
            tpot = [(outcome.last_s - (outcome.first_s or 0.0)) / (outcome.tokens - 1) * 1e3 for outcome in outcomes]
            tokens_per_s = sum(outcome.tokens for outcome in outcomes) / max(outcome.last_s for outcome in outcomes)
            rows.append([name, side, str(len(outcomes)), percentiles(ttft), percentiles(tpot), figure(tokens_per_s)])
            figures = {"ttft_ms": quantiles(ttft), "tpot_ms": quantiles(tpot), "tokens_per_s": tokens_per_s}
            results.append({"rate": name, "side": side, **figures})
    print(f"\n{sides.name}: open loop, ms p50 (p99)")
    print(table(["arrivals", "side", "requests", "TTFT", "TPOT", "output tokens/s"], rows), flush=True)
    return results


def arrivals(vocabulary: int, rate: float | None, seconds: float) -> list[Ask]:
    """The throughput workload's requests, at times drawn from a seed. No rate: four batches, all due at once."""
    source, draw = PromptSource(vocabulary, WARM_UP_SEED + 2), random.Random(int((rate or 0) * 1000))
    asks: list[Ask] = []
    at_s = 0.0
    while len(asks) < 128 if rate is None else at_s < seconds:
        for prompt in source.throughput().prompts:
            at_s += draw.expovariate(rate) if rate is not None else 0.0
            asks.append(Ask(completion(prompt, 64), at_s))
    return asks if rate is None else [ask for ask in asks if ask.at_s < seconds]


def streams(sides: Sides, vocabulary: int) -> dict[str, object]:
    """So many clients at once, of each endpoint. Nobody fails; each stream's rate while it ran, and its longest silence."""
    source = PromptSource(vocabulary, WARM_UP_SEED + 3)
    prompts = [prompt for _ in range(MANY_STREAMS // 32) for prompt in source.throughput().prompts]
    spreads: dict[str, dict[str, Spread]] = {}
    for side in sides.endpoints:
        outcomes = sides.ask(side, Batch(prompts, 64))
        values = {
            "tokens/s of a stream": [(one.tokens - 1) / (one.last_s - (one.first_s or 0.0)) for one in outcomes],
            "longest gap, s": [outcome.gap_s or 0.0 for outcome in outcomes],
            "first token, s": [outcome.first_s or 0.0 for outcome in outcomes],
            "tokens/s of all": [sum(one.tokens for one in outcomes) / max(one.last_s for one in outcomes)],
        }
        spreads[side] = {name: Spread.of(each) for name, each in values.items()}
    print(f"\n{sides.name}: {MANY_STREAMS} streams at once, none failed, median (range)")
    rows = [[side, *(str(spread) for spread in own.values())] for side, own in spreads.items()]
    print(table(["side", *spreads[ENDPOINT]], rows), flush=True)
    return {
        side: {name: [spread.median, spread.low, spread.high] for name, spread in own.items()}
        for side, own in spreads.items()
    }


def quantiles(values: Sequence[float]) -> tuple[float, float]:
    """p50 and p99."""
    ordered = sorted(values)
    return statistics.median(ordered), ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]


def percentiles(values: Sequence[float]) -> str:
    """The same, in words."""
    p50, p99 = quantiles(values)
    return f"{figure(p50)} ({figure(p99)})"


def measure(transport: str, checkpoint: Path, vocabulary: int, options: argparse.Namespace) -> dict[str, object]:
    """Loads all sides of one transport, warms them up, and runs the parts that were asked for."""
    results: dict[str, object] = {}
    with loaded(transport, checkpoint, PromptSource(vocabulary, WARM_UP_SEED).warm_up(), options) as sides:
        for part in options.parts:
            match part:
                case "saturation":
                    results[part] = saturation(sides, vocabulary, options.rounds)
                case "latency":
                    results[part] = latency(sides, vocabulary, options.rounds)
                case "rates":
                    results[part] = rates(sides, vocabulary, options.rates, options.seconds)
                case "streams":
                    results[part] = streams(sides, vocabulary)
    return results


@contextlib.contextmanager
def loaded(transport: str, checkpoint: Path, warm_up: list[Batch], options: argparse.Namespace) -> Iterator[Sides]:
    """Errors: ServingError, WorkerError for a side that does not come up."""
    spec = EngineSpec(
        engine="manta", python=Path(sys.executable), dtype=options.dtype, tensor_parallel_size=1, threads=options.threads,
        kv_gib=options.kv_gib, block_size=options.block_size, max_num_batched_tokens=options.max_num_batched_tokens,
        ray=transport != "local",
    )  # fmt: skip
    flags = [*TRANSPORTS[transport], "--dtype", options.dtype, "--threads", str(options.threads)]
    flags += ["--kv-memory", f"{options.kv_gib}GiB", "--replicas", str(options.replicas)]
    logs = options.cache / "logs"
    with contextlib.ExitStack() as stack:
        workers = stack.enter_context(started({ENGINE: spec}, checkpoint, warm_up, logs, optional=frozenset()))
        endpoints = {ENDPOINT: stack.enter_context(serving(checkpoint, flags, logs / f"{checkpoint.name}.endpoint.log"))}
        if options.vllm_python is not None:
            peer = replace(spec, engine="vllm", python=options.vllm_python)
            endpoints["vllm"] = stack.enter_context(serving_vllm(peer, checkpoint, logs / f"{checkpoint.name}.vllm.log"))
        sides = Sides(transport, workers[ENGINE], endpoints, stack.enter_context(Clients()))
        for side in endpoints:
            for batch in warm_up:
                sides.ask(side, batch)
        yield sides


def main() -> None:
    """Parse the command line and measure; exit with 1 if a side could not be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["tiny", *sorted(SHAPES)], default="tiny", help="(%(default)s)")
    parser.add_argument("--rounds", type=positive, default=5, help="turns of each side (%(default)s)")
    parser.add_argument("--transports", type=names_of(TRANSPORTS), default=list(TRANSPORTS), help=",".join(TRANSPORTS))
    parser.add_argument("--parts", type=names_of(PARTS), default=list(PARTS), help=",".join(PARTS))
    parser.add_argument("--rates", type=lambda text: [float(rate) for rate in text.split(",")], default=[2.0, 8.0, 16.0])
    parser.add_argument("--seconds", type=float, default=15.0, help="of each rate (%(default)s)")
    parser.add_argument("--replicas", type=positive, default=1, help="front ends on Ray (%(default)s)")
    parser.add_argument("--vllm-python", type=Path, help="of an environment with vLLM, to measure its server too")
    add_engine_options(parser)
    options = parser.parse_args()
    if options.model == "tiny":
        checkpoint, vocabulary = TINY, TINY_VOCABULARY
    else:
        vocabulary = SHAPES[options.model].vocabulary
        checkpoint = with_words(ensure_checkpoint(options.model, options.cache), vocabulary)
    try:
        results = {transport: measure(transport, checkpoint, vocabulary, options) for transport in options.transports}
    except (ServingError, WorkerError) as error:
        sys.exit(f"error: {error}")
    if options.json:
        print(json.dumps({"model": options.model, **results}))


if __name__ == "__main__":
    main()
