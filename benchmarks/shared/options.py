"""Options, and pauses, that benchmarks have in common. Imports argparse alone."""

import argparse
import os
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path

PAUSE_S = 1.5  # vLLM's workers look for work for a second before they sleep
WARM_UP_SEED = 1 << 32


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """The options that every engine benchmark has."""
    cores = len(os.sched_getaffinity(0))
    cache = Path(tempfile.gettempdir()) / "manta-benchmarks"
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--tensor-parallel-size", type=positive, default=1)
    parser.add_argument(
        "--threads", type=positive, default=cores, help="CPU threads of each engine (%(default)s)"
    )
    parser.add_argument(
        "--kv-gib", type=positive, default=2, help="memory of the KV cache, GiB (%(default)s)"
    )
    parser.add_argument("--block-size", type=int, help="Manta's tokens per block; its default if not given")
    parser.add_argument(
        "--max-num-batched-tokens", type=int, help="tokens in a step of Manta's; its default if not given"
    )
    parser.add_argument(
        "--cache", type=Path, default=cache, help="folder of checkpoints and logs (%(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")


def positive(text: str) -> int:
    """A whole number from 1 up, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def names_of(known: Collection[str]) -> Callable[[str], list[str]]:
    """Names apart by commas, each one of those that are known, for argparse."""

    def parse(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",") if name.strip()]
        unknown = [name for name in names if name not in known]
        if unknown or not names:
            raise argparse.ArgumentTypeError(
                f"{', '.join(unknown) or 'nothing'} is not among {', '.join(known)}"
            )
        return names

    return parse
