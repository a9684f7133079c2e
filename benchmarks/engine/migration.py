"""What a running sequence's reader notices when it goes to another group: the longest wait for a token, by how it goes.

    migrate     live: published blocks go ahead while it decodes, the rest is fetched while it stands still
    preempt     its blocks are taken and nothing is fetched: everything is computed again in the other group
    stay        nothing happens to it

One process, two groups of one rank each; the three ways take turns, each on a prompt of its own.

    python -m benchmarks.engine.migration --model 0.1B --prompt 2000 --rounds 5

May import the application and the core.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.shared.checkpoints import SHAPES, ensure_checkpoint
from benchmarks.shared.report import table
from cluster.local.engine import FRONT_END, LocalEngine
from deploy import LLM, SamplingParams
from scheduler.core import SchedulerCore

BEFORE, AFTER = 24, 48
"""Tokens of output before the sequence is told to go, and after that."""


WAYS = ("stay", "migrate", "preempt")


def disturb(core: SchedulerCore, way: str, stream: int) -> None:
    """What happens to the sequence, in one call into the core."""
    sequence = core.sequences[FRONT_END, stream]
    assert sequence.blocks is not None
    group = sequence.blocks.group
    if way == "migrate":
        assert core.migrate(FRONT_END, stream), "no group takes it"
    elif way == "preempt":
        assert core.drain(group)
        core.vacate(group)  # these groups do not exchange blocks, so it begins again
        core.groups[group].set_draining(False)


def gaps_ms(llm: LLM, prompt: list[int], way: str) -> list[float]:
    """[tokens] milliseconds between tokens, from the one on after which the sequence is told to go."""
    engine = llm._engine
    assert isinstance(engine, LocalEngine)
    params = SamplingParams(max_tokens=BEFORE + AFTER, temperature=0.0, ignore_eos=True)
    times: list[float] = []
    for _, output in llm.iterate([prompt], params):
        if times or len(output.outputs[0].token_ids) >= BEFORE:
            times.append(time.perf_counter())
        if len(times) == 1:
            engine.call(lambda core: disturb(core, way, next(iter(core.sequences))[1]))
    return [(after - before) * 1000 for before, after in itertools.pairwise(times)]


def open_llm(options: argparse.Namespace, *, exchange: bool) -> LLM:
    return LLM(
        ensure_checkpoint(options.model, options.cache), local=True, groups=2, threads=1, seed=0, prefix_fetch=exchange,
        kv_memory=options.kv_gib << 30, max_model_len=options.prompt + BEFORE + AFTER,
    )  # fmt: skip


def measure(options: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """By way: the longest gap, and the median of all, of each round."""
    random = np.random.default_rng(0)
    seen: dict[str, dict[str, list[float]]] = {way: {"longest": [], "usual": []} for way in WAYS}
    with open_llm(options, exchange=True) as together, open_llm(options, exchange=False) as apart:
        for turn in range(options.rounds + 1):  # the first warms up
            for way in WAYS:
                prompt = random.integers(0, SHAPES[options.model].vocabulary, options.prompt).tolist()
                gaps = gaps_ms(apart if way == "preempt" else together, prompt, way)
                if turn:
                    seen[way]["longest"].append(max(gaps))
                    seen[way]["usual"].append(statistics.median(gaps))
        assert together.stats().migrations == options.rounds + 1
        assert apart.stats().preemptions == options.rounds + 1
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description="The longest wait for a token while a sequence goes to another group.")
    parser.add_argument("--model", choices=SHAPES, default="0.1B")
    parser.add_argument("--prompt", type=int, default=2000, help="tokens (default: 2000)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kv-gib", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "manta-benchmarks")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()
    seen = measure(options)
    rows = [
        [way, *(f"{statistics.median(values):.1f} ({min(values):.1f}-{max(values):.1f})" for values in figures.values())]
        for way, figures in seen.items()
    ]
    print(table(["way", "longest gap, ms", "usual gap, ms"], rows))
    if options.json:
        print(json.dumps(seen))


if __name__ == "__main__":
    main()
