"""One engine in one process, driven by JSON lines: what the benchmark runs in a peer's environment.

Imports the standard library, and inside each adapter the engine that it adapts; nothing else, since the
peer's own interpreter runs this file. Prompts come in on stdin, measurements go out on what was stdout;
whatever an engine prints goes to stderr, so that it cannot break the protocol.

    -> {"prompts": [[1, 2, 3]], "max_tokens": 64}
    <- {"seconds": 0.5, "output_tokens": 64, "cached_tokens": 0}
"""

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol, TextIO

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

Prompts = list[list[int]]


class Engine(Protocol):
    """Generates greedily, end-of-text ignored, and says how many (output, cached prompt) tokens that took."""

    version: str

    def generate(self, prompts: Prompts, max_tokens: int) -> tuple[int, int]: ...

    def close(self) -> None: ...


class Manta:
    """Manta's own `LLM`, in this process or on Ray."""

    def __init__(self, options: argparse.Namespace) -> None:
        from importlib.metadata import PackageNotFoundError, version

        from deploy import LLM, SamplingParams

        try:
            self.version = version("manta-serve")
        except PackageNotFoundError:
            self.version = "source"
        chosen = {"block_size": options.block_size, "max_num_batched_tokens": options.max_num_batched_tokens}
        self._llm = LLM(
            model=options.model,
            tensor_parallel_size=options.tensor_parallel_size,
            groups=1,
            dtype=options.dtype,
            kv_memory=f"{options.kv_gib}GiB",
            local=not options.ray,
            threads=max(1, options.threads // options.tensor_parallel_size),
            **{key: value for key, value in chosen.items() if value is not None},
        )
        self._params = SamplingParams

    def generate(self, prompts: Prompts, max_tokens: int) -> tuple[int, int]:
        params = self._params(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        results = self._llm.generate(prompts, params, progress=False)
        return _counts(results)

    def close(self) -> None:
        self._llm.shutdown()


class Vllm:
    """vLLM with its own defaults, compiled; its prefix cache is on by default.

    The environment that binds its threads must be there before the process starts (`worker_process.py`).
    """

    def __init__(self, options: argparse.Namespace) -> None:
        import vllm  # type: ignore[import-not-found, unused-ignore]

        self.version = str(vllm.__version__)
        chosen = {"block_size": options.block_size, "max_num_batched_tokens": options.max_num_batched_tokens}
        self._llm = vllm.LLM(
            model=options.model,
            dtype=options.dtype,
            tensor_parallel_size=options.tensor_parallel_size,
            skip_tokenizer_init=True,
            max_model_len=2048,
            kv_cache_memory_bytes=options.kv_gib << 30,
            **{key: value for key, value in chosen.items() if value is not None},
        )
        self._params = vllm.SamplingParams

    def generate(self, prompts: Prompts, max_tokens: int) -> tuple[int, int]:
        params = self._params(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, detokenize=False)
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        results = self._llm.generate(requests, params, use_tqdm=False)
        return _counts(results)

    def close(self) -> None:
        del self._llm


def _counts(results: Iterable[Any]) -> tuple[int, int]:
    """(output, cached prompt) tokens of the outputs of Manta or vLLM, which have the same fields."""
    outputs = list(results)
    return (
        sum(len(each.outputs[0].token_ids) for each in outputs),
        sum(each.num_cached_tokens or 0 for each in outputs),
    )


class Transformers:
    """`generate` of transformers on one batch padded on the left. It keeps no KV from call to call."""

    def __init__(self, options: argparse.Namespace) -> None:
        import torch
        import transformers

        torch.set_num_threads(options.threads)
        self.version = str(transformers.__version__)
        self._torch = torch
        model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=options.dtype)
        self._model: Any = model.eval()

    def generate(self, prompts: Prompts, max_tokens: int) -> tuple[int, int]:
        width = max(len(prompt) for prompt in prompts)
        pads = [width - len(prompt) for prompt in prompts]
        ids = [[0] * pad + prompt for pad, prompt in zip(pads, prompts, strict=True)]
        mask = [[0] * pad + [1] * (width - pad) for pad in pads]
        with self._torch.inference_mode():
            output = self._model.generate(
                input_ids=self._torch.tensor(ids),
                attention_mask=self._torch.tensor(mask),
                max_new_tokens=max_tokens,
                min_new_tokens=max_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        return int(output[:, width:].numel()), 0

    def close(self) -> None:
        del self._model


ENGINES: dict[str, type[Manta] | type[Vllm] | type[Transformers]] = {
    "manta": Manta,
    "vllm": Vllm,
    "transformers": Transformers,
}


def serve(engine: Engine, requests: TextIO, answers: TextIO) -> None:
    """Answer one request a line until the requests end; a failed request is answered with its error."""
    for line in requests:
        request = json.loads(line)
        try:
            start_s = time.perf_counter()
            output_tokens, cached_tokens = engine.generate(request["prompts"], request["max_tokens"])
            seconds = time.perf_counter() - start_s
        except Exception as error:
            _answer_failure(answers, error)
            continue
        _answer(answers, {"seconds": seconds, "output_tokens": output_tokens, "cached_tokens": cached_tokens})


def main() -> None:
    """Load the engine, say so, serve, and close it when stdin ends."""
    options = _options()
    requests = os.fdopen(os.dup(0))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    start_s = time.perf_counter()
    try:
        engine: Engine = ENGINES[options.engine](options)
    except Exception as error:
        _answer_failure(answers, error)
        sys.exit(1)
    try:
        _answer(answers, {"version": engine.version, "load_s": time.perf_counter() - start_s})
        serve(engine, requests, answers)
    finally:
        engine.close()


def _answer(answers: TextIO, value: dict[str, object]) -> None:
    answers.write(json.dumps(value) + "\n")
    answers.flush()


def _answer_failure(answers: TextIO, error: Exception) -> None:
    """One line to the parent; the traceback goes to the log."""
    traceback.print_exception(error)
    _answer(answers, {"error": f"{type(error).__name__}: {error}"})


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="One engine that answers benchmark requests on stdin.")
    parser.add_argument("--engine", required=True, choices=sorted(ENGINES))
    parser.add_argument("--model", required=True, help="folder of the checkpoint")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of the whole engine")
    parser.add_argument("--kv-gib", type=int, default=2, help="memory for the KV cache")
    parser.add_argument("--block-size", type=int, help="tokens a KV block; the engine's default if not given")
    parser.add_argument("--max-num-batched-tokens", type=int, help="the engine's default if not given")
    parser.add_argument("--ray", action="store_true", help="Manta on Ray instead of in this process")
    return parser.parse_args()


if __name__ == "__main__":
    main()
