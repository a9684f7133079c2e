"""Manta on one GPU, work by work, each with its exact token counts and seeds:

    batch_1    one prompt of 128 tokens, 256 out, greedy: ms a token (the whole request / 256)
    batch_32   32 prompts of 64-256 tokens, 256 out each, greedy: output tokens/s
    many       nano-vLLM's own benchmark: 256 prompts of 100-1,024 tokens, 100-1,024 out (133,966 in all), temperature 0.6:
               output tokens/s
    prefill    16 prompts of 4,096 tokens, one token out: prompt tokens/s
    lora_32    batch_32 in an engine that has adapters (`--adapters 8`): output tokens/s with none of them asked for, with each
               prompt asking for one of them by turns; not `bare`
    shared     64 prompts of 2,048 shared tokens and 64 of their own, 64 out, greedy: seconds cold, then with the prefix cached

Random Qwen3-shaped checkpoints in bf16, token ids in, end-of-text ignored, prefix cache on, 8,192 tokens a step, 256 sequences.
Every work runs once to warm up, on prompts of another seed, and then `--rounds` times on prompts that no run has used; the
median counts. `bare` is the step loop of one rank driven by hand, without scheduler and front end; `local` is
`LLM(local=True)`, `ray` is `LLM` on Ray. Beside it: what share of the time the scheduler's process has a CPU. With
`--profile`, torch's profiler says how busy the device is meanwhile.

    python -m benchmarks.gpu --models 0.6B,8B --engines bare,local,ray --json
"""

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from benchmarks.gpu import works as gpu_works
from benchmarks.gpu.adapters import ensure_adapters
from benchmarks.gpu.works import Work
from benchmarks.models.rounded import ensure_four_bits
from benchmarks.shared.checkpoints import SHAPES, ensure_checkpoint
from benchmarks.shared.options import names_of, positive
from benchmarks.shared.processes import SCHEDULER, cpu_s, named
from benchmarks.shared.report import figure, table

ENGINES = ("bare", "local", "ray")
WORKS = ("batch_1", "batch_32", "many", "prefill", "shared", "beside", "lora_32")
USUAL_WORKS = WORKS[:-1]
WEIGHTS = ("bf16", "fp8", "int4")
WARM_UP_SEED = 1 << 20
OPTIONS = {"max_num_batched_tokens": 8192, "max_num_seqs": 256, "max_model_len": 4352, "dtype": "bfloat16"}

Figures = dict[str, float]


class Engine(Protocol):
    start_s: float
    breakdown: Figures
    """Of the work that it ran last."""

    def run(self, work: Work) -> float:
        """Seconds."""
        ...

    def close(self) -> None: ...


class Whole:
    """`LLM`, in this process or on Ray."""

    def __init__(self, checkpoint: Path, *, ray: bool, options: dict[str, object]) -> None:
        from deploy import LLM, SamplingParams

        self._params = SamplingParams
        begun = time.perf_counter()
        self._llm = LLM(str(checkpoint), local=not ray, device="cuda", **options)  # type: ignore[arg-type]
        self.start_s = time.perf_counter() - begun
        self._schedulers = named(SCHEDULER) if ray else []
        self.breakdown: Figures = {}

    @property
    def adapters(self) -> list[str]:
        return [*self._llm.config.adapters]

    def run(self, work: Work, lora: list[str | None] | None = None) -> float:
        """lora: of each prompt."""
        params = [
            self._params(temperature=work.temperature, max_tokens=length, ignore_eos=True, seed=number)
            for number, length in enumerate(work.lengths)
        ]
        cpu_before_s, begun = sum(map(cpu_s, self._schedulers)), time.perf_counter()
        outputs = self._llm.generate(work.prompts, params, lora=lora, progress=False)
        seconds = time.perf_counter() - begun
        if self._schedulers:
            self.breakdown = {"scheduler_busy": (sum(map(cpu_s, self._schedulers)) - cpu_before_s) / seconds}
        got = sum(len(output.outputs[0].token_ids) for output in outputs)
        if got != work.output_tokens:
            raise RuntimeError(f"{got} tokens came out where {work.output_tokens} were asked for")
        return seconds

    def close(self) -> None:
        self._llm.shutdown()


class Bare:
    """The step loop by itself."""

    def __init__(self, checkpoint: Path, *, options: dict[str, object]) -> None:
        from benchmarks.gpu.bare_loop import BareLoop

        self.loop = BareLoop(checkpoint, **options)
        self.start_s = self.loop.start_s
        self.breakdown: Figures = {}

    def run(self, work: Work) -> float:
        seconds, timeline = self.loop.run(work)
        self.breakdown = timeline.table()
        return seconds

    def close(self) -> None:
        """Leaves the device to the next engine."""
        import torch

        self.loop.close()
        del self.loop
        gc.collect()
        torch.cuda.empty_cache()


def measure(engine: Engine, works: list[str], rounds: int, warm_up: bool = True) -> Figures:
    """The figures of all works."""
    figures: Figures = {}
    for name in works:
        values: dict[str, list[float]] = {}
        for seed in (*([WARM_UP_SEED] if warm_up else []), *range(rounds)):
            for key, value in MEASURES[name](engine, seed).items():
                values.setdefault(key, []).append(value)
        for key, series in values.items():
            figures[key] = statistics.median(series[warm_up:])
            print(f"  {key}: {figure(figures[key])}  ({', '.join(map(figure, series))})", file=sys.stderr, flush=True)
        if engine.breakdown and values:
            figures |= {f"{name}.{key}": value for key, value in engine.breakdown.items()}
            told = ", ".join(f"{key} {figure(value)}" for key, value in engine.breakdown.items())
            print(f"  {name}: {told}", file=sys.stderr, flush=True)
    return figures


def _batch_1(engine: Engine, seed: int) -> Figures:
    work = gpu_works.batch_1(seed)
    return {"batch_1_ms_per_token": engine.run(work) / work.output_tokens * 1e3}


def _batch_32(engine: Engine, seed: int) -> Figures:
    work = gpu_works.batch_32(seed)
    return {"batch_32_tokens_per_s": work.output_tokens / engine.run(work)}


def _many(engine: Engine, seed: int) -> Figures:
    work = gpu_works.many(seed)
    return {"many_tokens_per_s": work.output_tokens / engine.run(work)}


def _prefill(engine: Engine, seed: int) -> Figures:
    work = gpu_works.prefill(seed)
    return {"prefill_tokens_per_s": work.prompt_tokens / engine.run(work)}


def _shared(engine: Engine, seed: int) -> Figures:
    if isinstance(engine, Bare):
        return {}  # it has no prefix index
    own = 2 * seed + (1 << 30)
    cold = engine.run(gpu_works.shared(seed, own))
    return {"shared_cold_s": cold, "shared_warm_s": engine.run(gpu_works.shared(seed, own + 1))}


def _beside(engine: Engine, seed: int) -> Figures:
    if not isinstance(engine, Bare):
        return {}  # whose steps can be watched from outside alone
    work, prompts = gpu_works.beside(seed)
    steps_ms = sorted(1e3 * seconds for seconds in engine.loop.beside(work, prompts))
    rate = prompts.prompt_tokens / sum(steps_ms) * 1e3
    return {"beside_step_ms": statistics.mean(steps_ms), "beside_step_ms_most": steps_ms[-1],
            "beside_prompt_tokens_per_s": rate}  # fmt: skip


def _lora_32(engine: Engine, seed: int) -> Figures:
    if not isinstance(engine, Whole) or not engine.adapters:
        return {}
    plain, adapted = gpu_works.batch_32(2 * seed + (1 << 31)), gpu_works.batch_32(2 * seed + 1 + (1 << 31))
    names: list[str | None] = [engine.adapters[number % len(engine.adapters)] for number in range(len(adapted.prompts))]
    return {"lora_32_without_tokens_per_s": plain.output_tokens / engine.run(plain),
            "lora_32_tokens_per_s": adapted.output_tokens / engine.run(adapted, names)}  # fmt: skip


MEASURES: dict[str, Callable[[Engine, int], Figures]] = {
    "batch_1": _batch_1,
    "batch_32": _batch_32,
    "many": _many,
    "prefill": _prefill,
    "shared": _shared,
    "beside": _beside,
    "lora_32": _lora_32,
}


def profile(loop: "Bare") -> dict[str, object]:
    """The share of the time in which any kernel runs, from the first to the last of a work, and the kernels that take most of
    it. Kernels may overlap (programmatic dependent launch), so their own times may sum up to more."""
    import torch

    found: dict[str, object] = {}
    for name, work in (("batch_1", gpu_works.batch_1(7)), ("batch_256", gpu_works.many(7))):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            seconds = loop.run(work)
        kernels = sorted(profiler.key_averages(), key=lambda entry: -entry.self_device_time_total)
        busy = _busy_share(profiler)
        found[name] = {"busy": busy, "seconds": seconds, "launches": sum(entry.count for entry in kernels)}
        rows = [
            [entry.key[:90], str(entry.count), f"{entry.self_device_time_total / 1e3:.1f}",
             f"{entry.self_device_time_total / entry.count:.1f}"]
            for entry in kernels[:22]
        ]  # fmt: skip
        print(f"{name}: device busy {busy:.1%} of {seconds:.2f} s", file=sys.stderr)
        print(table(["kernel", "launches", "ms", "us each"], rows), file=sys.stderr, flush=True)
    return found


def _busy_share(profiler: Any) -> float:
    """Of the time between the first and the last kernel of a profile, what at least one kernel covers."""
    from torch.autograd import DeviceType  # type: ignore[attr-defined]

    events = [event for event in profiler.profiler.kineto_results.events() if event.device_type() == DeviceType.CUDA]
    spans = sorted((event.start_ns(), event.start_ns() + event.duration_ns()) for event in events)
    covered, reached = 0, spans[0][0]
    for begin, end in spans:
        covered += max(0, end - max(begin, reached))
        reached = max(reached, end)
    return float(covered / (reached - spans[0][0]))


def open_engine(name: str, checkpoint: Path, options: dict[str, object]) -> Engine:
    if name == "bare":
        return Bare(checkpoint, options=options)
    return Whole(checkpoint, ray=name == "ray", options=options)


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=names_of(SHAPES), default=["0.6B"], help=", ".join(SHAPES))
    parser.add_argument("--engines", type=names_of(ENGINES), default=["bare", "local"], help=", ".join(ENGINES))
    parser.add_argument("--works", type=names_of(WORKS), default=list(USUAL_WORKS), help=", ".join(WORKS))
    parser.add_argument("--adapters", type=int, default=0, help="LoRA adapters that the engines hold, for lora_32")
    parser.add_argument("--rank", type=positive, default=16, help="of these")
    parser.add_argument("--rounds", type=positive, default=2)
    parser.add_argument("--no-warm-up", action="store_true", help="count the first run of each work too")
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--weights", choices=WEIGHTS, default="bf16", help="fp8: made while loading; int4: in groups of 128")
    parser.add_argument("--kv-dtype", choices=("auto", "fp8"), default="auto", help="auto: the weights' 16 bits")
    parser.add_argument("--tensor-parallel-size", type=positive, default=1, help="GPUs of a group, on Ray")
    parser.add_argument("--groups", type=positive, default=1, help="of as many GPUs each, on Ray")
    parser.add_argument("--profile", action="store_true", help="kernel times of the bare loop")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "manta-benchmarks")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    return parser.parse_args(arguments)


def main() -> None:
    asked = parse_options()
    options: dict[str, object] = {**OPTIONS, "attention": asked.attention, "cuda_graphs": not asked.eager}
    options["kv_dtype"] = asked.kv_dtype
    if asked.weights == "fp8":
        options["quantization"] = "fp8"
    if asked.tensor_parallel_size * asked.groups > 1:
        if asked.engines != ["ray"]:
            sys.exit("several GPUs are used through Ray alone: give --engines ray")
        options |= {"tensor_parallel_size": asked.tensor_parallel_size, "groups": asked.groups}
    result: dict[str, dict[str, object]] = {}
    for model in asked.models:
        checkpoint = ensure_checkpoint(model, asked.cache)
        if asked.weights == "int4":
            checkpoint = ensure_four_bits(checkpoint)
        if asked.adapters:
            named = ensure_adapters(checkpoint, asked.adapters, asked.rank)
            lora = tuple(f"{name}={folder}" for name, folder in named.items())
            options |= {"lora": lora, "max_loras": asked.adapters, "max_lora_rank": asked.rank, "lora_experts": True}
        for name in asked.engines:
            print(f"{model}, {name}", file=sys.stderr, flush=True)
            engine = open_engine(name, checkpoint, options)
            try:
                found = measure(engine, asked.works, asked.rounds, warm_up=not asked.no_warm_up)
                figures: dict[str, object] = {"start_s": engine.start_s, **found}
                if asked.profile and isinstance(engine, Bare):
                    figures["profile"] = profile(engine)
            finally:
                engine.close()
            result.setdefault(model, {})[name] = figures
            print(f"  start: {engine.start_s:.1f} s", file=sys.stderr, flush=True)
    if asked.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
