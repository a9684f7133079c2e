"""What fewer bits of weights and KV cost: bits per byte of text that the model has not learned from, in the engine, on a CPU.

    python -m benchmarks.models.quality                    # examples/tiny, on the files that were held out of its training
    python -m benchmarks.models.quality --windows 16       # fewer of them

Prints the table of docs/models.md. The text is the standard library's modules that `examples/train_tiny.py` leaves out with its
seed, so it is the same only under the Python that the example was trained with.
"""

import argparse
import math
import random
import runpy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from benchmarks.models.rounded import write_four_bits
from deploy import LLM, SamplingParams
from deploy.doors.python.sources import Source

EXAMPLES = Path(__file__).parents[2] / "examples"
SEED = 0
END = "<|endoftext|>"
WINDOW_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Row:
    """write: makes the checkpoint of the plain one. engine: options."""

    name: str
    write: Callable[[Path, Path], None] | None = None
    engine: dict[str, Any] = field(default_factory=dict)


ROWS = (
    Row("bfloat16"),
    Row("FP8, a scale for each row (`--quantization fp8`)", engine={"quantization": "fp8"}),
    Row("4 bits, groups of 32, zero points", partial(write_four_bits, group=32, symmetric=False)),
    Row("4 bits, groups of 128, zero points", partial(write_four_bits, group=128, symmetric=False)),
    Row("4 bits, groups of 128, symmetric", partial(write_four_bits, group=128, symmetric=True)),
    Row("bfloat16, and KV in FP8 (`--kv-dtype fp8`)", engine={"kv_dtype": "fp8"}),
    Row("FP8, and KV in FP8", engine={"quantization": "fp8", "kv_dtype": "fp8"}),
)


@dataclass(frozen=True, slots=True)
class Text:
    """windows: of tokens, of which the first is given. tokens_per_byte: of all of the text."""

    windows: list[list[int]]
    tokens_per_byte: float


def held_out(model: Path, windows: int) -> Text:
    """So many windows, evenly spread."""
    training = runpy.run_path(str(EXAMPLES / "train_tiny.py"))
    sources: dict[str, str] = training["library_sources"]()
    names = random.Random(SEED).sample(sorted(sources), max(1, round(len(sources) * training["HELD_OUT"])))
    kept = [source for name, source in sources.items() if name in set(names)]
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokens = [token for source in kept for token in tokenizer.encode(source + END).ids]
    count = (len(tokens) - 1) // WINDOW_TOKENS
    chosen = torch.linspace(0, count - 1, min(windows, count)).long().tolist()
    cut = [tokens[at * WINDOW_TOKENS : (at + 1) * WINDOW_TOKENS + 1] for at in chosen]
    return Text(cut, len(tokens) / sum(len(source.encode()) for source in kept))


def bits_per_byte(model: Path, text: Text, engine: dict[str, Any]) -> float:
    asked = {"dtype": "float32", "kv_memory": "256MiB"} | engine
    nats, count = 0.0, 0
    with LLM(model, local=True, threads=1, **asked) as llm:
        sources: list[Source] = list(text.windows)
        for output in llm.generate(sources, SamplingParams(max_tokens=1, prompt_logprobs=0), progress=False):
            assert output.prompt_logprobs is not None
            for token, entry in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True):
                assert entry is not None
                nats, count = nats - entry[token].logprob, count + 1
    return nats / count / math.log(2) * text.tokens_per_byte


def main() -> None:
    options = argparse.ArgumentParser(description="Bits per byte of held-out text, with weights and KV of fewer bits.")
    options.add_argument("--model", type=Path, default=EXAMPLES / "tiny")
    options.add_argument("--windows", type=int, default=64, help="of 512 tokens (64)")
    chosen = options.parse_args()
    text = held_out(chosen.model, chosen.windows)
    print(f"{len(text.windows)} windows of {WINDOW_TOKENS} tokens, {text.tokens_per_byte:.3f} tokens a byte\n")
    print("| weights of the linear layers, KV in float32 unless said | bits per byte | more than bfloat16 |")
    print("|---|---|---|", flush=True)
    first: float | None = None
    for row in ROWS:
        with tempfile.TemporaryDirectory() as folder:
            model = chosen.model
            if row.write is not None:
                model = Path(folder) / "model"
                row.write(chosen.model, model)
            found = bits_per_byte(model, text, row.engine)
        first = found if first is None else first
        print(f"| {row.name} | {found:.4f} | {100 * (found / first - 1):+.2f}% |", flush=True)


if __name__ == "__main__":
    main()
