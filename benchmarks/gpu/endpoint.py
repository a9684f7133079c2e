"""`manta serve` on one GPU under streams: prompts of 512 token ids, 128 out, greedy, each on a connection of its own.

    python -m benchmarks.gpu.endpoint --streams 1,32,128,256 --json

At each level so many streams are under way all the time, from client processes of their own (each serves 32 streams), until
`--waves` times as many have ended. Output tokens/s count from the first request sent to the last event; TTFT is from the
request's sending to its first event. Prompts never repeat, so nothing comes out of the prefix cache.
"""

import argparse
import contextlib
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.gpu.compare import OPTIONS
from benchmarks.shared.checkpoints import SHAPES, ensure_checkpoint, with_words
from benchmarks.shared.endpoint import Ask, Clients, Endpoint, completed, completion, serving
from benchmarks.shared.load import Outcome
from benchmarks.shared.options import names_of, positive
from benchmarks.shared.report import figure, table

PROMPT_TOKENS, OUTPUT_TOKENS = 512, 128
STREAMS_A_CLIENT = 32
LEAST = 24


def level(endpoint: Endpoint, clients: Sequence[Clients], streams: int, waves: int, chance: random.Random) -> dict[str, float]:
    """What so many streams at once get. Errors: ServingError if one fails."""
    used = clients[: max(1, -(-streams // STREAMS_A_CLIENT))]
    shares = [len(range(number, streams, len(used))) for number in range(len(used))]
    plans = [[_ask(chance) for _ in range(max(share * waves, LEAST // len(used)))] for share in shares]
    began_s = time.perf_counter()
    with ThreadPoolExecutor(len(used)) as pool:
        parts = list(pool.map(lambda client, plan, share: client.run(endpoint, plan, share), used, plans, shares))
    outcomes: list[Outcome] = [outcome for part in parts for outcome in completed(part)]
    seconds = max(outcome.last_s for outcome in outcomes)
    waited_ms = sorted(((outcome.first_s or 0.0) - outcome.sent_s) * 1e3 for outcome in outcomes)
    gaps_ms = [(outcome.last_s - (outcome.first_s or 0.0)) / (outcome.tokens - 1) * 1e3 for outcome in outcomes]
    assert seconds <= time.perf_counter() - began_s
    return {
        "requests": len(outcomes),
        "tokens_per_s": sum(outcome.tokens for outcome in outcomes) / seconds,
        "ttft_ms_p50": statistics.median(waited_ms),
        "ttft_ms_p99": waited_ms[int(len(waited_ms) * 0.99)],
        "tpot_ms_p50": statistics.median(gaps_ms),
    }


def _ask(chance: random.Random) -> Ask:
    return Ask(completion([chance.randint(0, 10_000) for _ in range(PROMPT_TOKENS)], OUTPUT_TOKENS))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="0.6B")
    parser.add_argument("--streams", type=names_of([str(n) for n in range(1, 1025)]), default=["1", "32", "128", "256"])
    parser.add_argument("--waves", type=positive, default=4)
    parser.add_argument("--replicas", type=positive, default=4)
    parser.add_argument("--options", nargs="*", default=[], help="more of `manta serve`, without the dashes: no-haproxy")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "manta-benchmarks")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    return parser.parse_args()


def main() -> None:
    asked = parse_options()
    checkpoint = with_words(ensure_checkpoint(asked.model, asked.cache), SHAPES[asked.model].vocabulary)
    options = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()]
    options += [f"--replicas={asked.replicas}", "--no-auth", *(f"--{option}" for option in asked.options)]
    chance = random.Random(0)
    begun = time.perf_counter()
    figures: dict[str, object] = {}
    with contextlib.ExitStack() as stack:
        endpoint = stack.enter_context(serving(checkpoint, options, asked.cache / "logs" / "gpu-endpoint.log"))
        figures["start_s"] = time.perf_counter() - begun
        most = max(map(int, asked.streams))
        clients = [stack.enter_context(Clients()) for _ in range(-(-most // STREAMS_A_CLIENT))]
        level(endpoint, clients, min(most, 64), 1, chance)  # whatever is slow the first time
        for streams in map(int, asked.streams):
            figures[str(streams)] = level(endpoint, clients, streams, asked.waves, chance)
            print(f"{streams}: {figures[str(streams)]}", file=sys.stderr, flush=True)
    levels = {name: value for name, value in figures.items() if isinstance(value, dict)}
    print(f"ready after {figures['start_s']:.1f} s")
    columns = list(next(iter(levels.values())))
    print(table(["streams", *columns], [[name, *map(figure, row.values())] for name, row in levels.items()]))
    if asked.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
