"""What a byte of text that a model has not seen costs it, in bits, with KV in its own dtype and in FP8.

    python -m benchmarks.models.kv_quality                                     # the example, and what it was not trained on
    python -m benchmarks.models.kv_quality --model /models/Qwen3-8B --text novel.txt --windows 20 --tokens 2048

Text is cut into windows of tokens, some of which, evenly spread, are scored by the engine itself: prompts of which it tells the
log-probability of each token. Prefill attends to KV as it stands in the pool, so rounding it shows. The example's own text are
the modules of the standard library that `examples/train_tiny.py --seed 0` holds out, of the interpreter that runs this; it was
trained with Python 3.11.
"""

import argparse
import math
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.shared.options import positive
from deploy import LLM, SamplingParams
from deploy.doors.python.sources import Source
from deploy.text.tokenizer import Tokenizer
from examples.train_tiny import HELD_OUT, library_sources  # type: ignore[import-not-found]  # a folder of scripts
from workers.config import KV_DTYPES
from workers.model.config.architectures import DTYPES, torch_dtype
from workers.model.reading import read_model
from workers.process.footprint import footprint

TINY = Path(__file__).parents[2] / "examples" / "tiny"


@dataclass(frozen=True, slots=True)
class Windows:
    """prompts: token ids, equally many each. token_bytes: of the text, in the mean."""

    prompts: list[list[int]]
    token_bytes: float


def held_out(seed: int = 0) -> list[str]:
    """The files that the example was not trained on."""
    sources = library_sources()
    chosen = set(random.Random(seed).sample(sorted(sources), max(1, round(len(sources) * HELD_OUT))))
    return [text for module, text in sources.items() if module in chosen]


def cut(model: Path, texts: Sequence[str], tokens: int, windows: int) -> Windows:
    """At most so many windows of so many tokens. Errors: ValueError for text that fills none, and without a tokenizer."""
    tokenizer = Tokenizer.load(model)
    if tokenizer is None:
        raise ValueError(f"{model} has no tokenizer: give a checkpoint folder that has one")
    ids = [token for text in texts for token in tokenizer.encode(text, around=False)]
    starts = range(0, len(ids) - tokens + 1, tokens)
    if not starts:
        raise ValueError(f"{len(ids)} tokens of text fill no window of {tokens}: give more text, or fewer --tokens")
    chosen = starts[:: max(1, len(starts) // windows)][:windows]
    return Windows([ids[at : at + tokens] for at in chosen], sum(len(text.encode()) for text in texts) / len(ids))


def bits_per_byte(model: Path, windows: Windows, **options: Any) -> float:
    """Of all tokens but each window's first, which nothing predicts. options: of `LLM`."""
    asked = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    sources: list[Source] = list(windows.prompts)
    with LLM(model, local=True, max_model_len=len(windows.prompts[0]) + 1, **options) as llm:
        outputs = llm.generate(sources, asked, progress=False)
    nats, count = 0.0, 0
    for prompt, output in zip(windows.prompts, outputs, strict=True):
        assert output.prompt_logprobs is not None, output
        for token, entry in zip(prompt[1:], output.prompt_logprobs[1:], strict=True):
            assert entry is not None
            nats, count = nats - entry[token].logprob, count + 1
    return nats / count / math.log(2) / windows.token_bytes


def main() -> None:
    options = argparse.ArgumentParser(description="Bits per byte of unseen text, by what KV is kept in.")
    options.add_argument("--model", type=Path, default=TINY, help="a checkpoint folder; default: the example")
    options.add_argument("--text", type=Path, nargs="+", help="files in UTF-8; default: what the example was not trained on")
    options.add_argument("--dtype", default="bfloat16", choices=DTYPES, help="that the model computes in (%(default)s)")
    options.add_argument("--tokens", type=positive, default=512, help="of a window (%(default)s)")
    options.add_argument("--windows", type=positive, default=64, help="that are scored (%(default)s)")
    options.add_argument("--threads", type=positive, default=len(os.sched_getaffinity(0)), help="of a CPU (%(default)s)")
    chosen = options.parse_args()
    texts = held_out() if chosen.text is None else [file.read_text("utf-8") for file in chosen.text]
    windows = cut(chosen.model, texts, chosen.tokens, chosen.windows)
    print(f"{len(windows.prompts)} windows of {chosen.tokens} tokens, {windows.token_bytes:.2f} bytes a token\n")
    print("| KV in | bytes a token | bits per byte |\n|---|---|---|", flush=True)
    for kv_dtype in KV_DTYPES:
        bits = bits_per_byte(chosen.model, windows, dtype=chosen.dtype, kv_dtype=kv_dtype, threads=chosen.threads)
        layout = footprint(read_model(chosen.model), 1, torch_dtype(chosen.dtype), 16, kv_dtype).layout
        print(f"| {layout.dtype} | {layout.token_bytes:,} | {bits:.4f} |", flush=True)


if __name__ == "__main__":
    main()
