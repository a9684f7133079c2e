"""Holds model types against transformers, and prints the table of docs/models.md.

Of each type a small random checkpoint is made, and run in the engine, in this process, under each setting: one rank and two,
blocks of 16 and of 256 tokens, prompts whole and in chunks, prefixes hit, sequences preempted.

    python -m benchmarks.models                        # every type of the zoo
    python -m benchmarks.models gemma3_text gpt_oss    # some
    python -m benchmarks.models --implementation transformers llama qwen3

Exits with 1 if a token was another.
"""

import argparse
import logging
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch

from benchmarks.models.compare import SETTINGS, Outcome, Reference, Setting, compare
from benchmarks.models.zoo import MORE, ZOO, make
from workers.config import ReadingConfig
from workers.model.reading import read_model


def main() -> None:
    options = argparse.ArgumentParser(description="Model types held against transformers, token for token.")
    options.add_argument("types", nargs="*", help="model types of the zoo; default: all")
    options.add_argument("--implementation", choices=("native", "transformers"), default="transformers")
    chosen = options.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    print("| `model_type` | class | tp 1 | tp 2 |\n|---|---|---|---|", flush=True)
    failed = False
    for kind in chosen.types or sorted(ZOO | MORE):
        with tempfile.TemporaryDirectory() as folder:
            path = make(kind, Path(folder) / kind)
            name = read_model(path, ReadingConfig(model_implementation=chosen.implementation)).architecture
            reference = Reference(path)
            outcomes = {setting: run(path, reference, setting, chosen.implementation) for setting in SETTINGS}
        cells = [cell(found for setting, found in outcomes.items() if setting.size == size) for size in (1, 2)]
        failed = failed or any(isinstance(found, Outcome) and found.wrong for found in outcomes.values())
        print(f"| `{kind}` | `{name}` | {' | '.join(cells)} |", flush=True)
    if failed:
        raise SystemExit(1)


def run(path: Path, reference: Reference, setting: Setting, implementation: str) -> Outcome | str:
    """Or why it is not served so."""
    try:
        return compare(path, reference, setting, implementation)
    except ValueError as error:
        return str(error)


def cell(found: Iterable[Outcome | str]) -> str:
    """What was run of one tensor parallel size, in the table's words."""
    found = list(found)
    refused = [each for each in found if isinstance(each, str)]
    if refused:
        return "refused: no plan" if "no tensor-parallel plan" in refused[0] else f"refused: {refused[0]}"
    outcomes = [each for each in found if isinstance(each, Outcome)]
    wrong = [each for outcome in outcomes for each in outcome.wrong]
    compared, hits = sum(each.compared for each in outcomes), sum(each.hits for each in outcomes)
    same = f"{compared - len(wrong)} of {compared} the same"
    return f"{same}, {hits} tokens hit, {sum(each.preemptions for each in outcomes)} preempted"


