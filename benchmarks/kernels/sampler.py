"""The sampler's kernels on a GPU: the same tokens as the CPU's sampler, and how long a step's sampling takes.

    python -m benchmarks.kernels.sampler [--json FILE] [--quick]

Times are of CUDA graph replays over several buffers of logits, so that the L2 cache does not serve them, bfloat16, 151,936 ids.
`share` is that of the memory bandwidth: one reading of the logits at 4.3 TB/s over the time taken.
"""

import argparse
import json
import multiprocessing
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from scheduler.protocol.sampling import SamplingParams
from workers.kernels.sampling import sample as kernels
from workers.kernels.sampling.draw import MAX_SPLITS
from workers.kernels.sampling.marks import IN_PROMPT
from workers.kernels.sampling.sample import SampleGeometry, Tables, Workspace, geometry
from workers.parallel.in_process import Solo
from workers.sampling import settings
from workers.sampling.sampler import Sampler

VOCAB = 151_936
BANDWIDTH = 4.3e12
KINDS: dict[str, SamplingParams] = {
    "greedy": SamplingParams(temperature=0.0),
    "temperature": SamplingParams(temperature=0.6),
    "top_k": SamplingParams(top_k=50),
    "top_p": SamplingParams(top_p=0.9),
    "top_k+top_p": SamplingParams(top_k=50, top_p=0.9, temperature=0.8),
    "min_p": SamplingParams(min_p=0.05),
    "penalties": SamplingParams(temperature=0.6, repetition_penalty=1.1, presence_penalty=0.2, frequency_penalty=0.1),
    "large top_k": SamplingParams(top_k=5000, top_p=0.95),
    "narrow top_p": SamplingParams(top_p=0.2, temperature=1.5),
}
MIXTURE = tuple(KINDS.values())[:7]
PROMPT = 200
SIZES = (1, 8, 32, 64, 256)
SWEPT = (1, 32, 256)
SPLITS_CHECKED = (1, 64)


class Batch:
    """A step's samples, each in its own row, with everything that the kernels read."""

    def __init__(self, params: Iterable[SamplingParams], vocab: int, device: torch.device) -> None:
        self.params = tuple(params)
        samples = len(self.params)
        self.vocab = vocab
        self.prompts = np.random.default_rng(5).integers(0, vocab, (samples, PROMPT)).astype(np.int32)
        records = [
            settings.record(p, seed=row, choice=0, stop_ids=(), prompt_tokens=PROMPT, vocab_size=vocab)
            for row, p in enumerate(self.params)
        ]
        self.settings = torch.from_numpy(np.stack([*records, np.zeros_like(records[0])])).to(device)
        self.rows = torch.arange(samples, dtype=torch.int32, device=device)
        self.positions = torch.full((samples,), PROMPT, dtype=torch.int32, device=device)
        self.tables = Tables()
        if any(settings.penalises(p) for p in self.params):
            marks = torch.zeros(samples, vocab, dtype=torch.int32)
            marks.scatter_(1, torch.from_numpy(self.prompts).long(), IN_PROMPT)
            self.tables = Tables(marks=marks.to(device))
        self.out = torch.zeros(samples, dtype=torch.int64, device=device)
        self.last = torch.zeros(samples + 1, dtype=torch.int64, device=device)
        self.workspace = Workspace(samples, device)

    def sample(self, logits: Tensor, plan: SampleGeometry | None = None) -> None:
        kernels.sample(
            logits, self.rows, self.positions, self.settings, self.tables, self.out, self.last,
            vocab_size=self.vocab, workspace=self.workspace, plan=plan,
        )  # fmt: skip


def make_logits(samples: int, scale: float, device: torch.device, seed: int = 0) -> Tensor:
    """Normal ones in bfloat16: full of ties. scale 1: flat, as of a random checkpoint; 3: as of a trained one."""
    generator = torch.Generator(device).manual_seed(seed)
    return (torch.randn(samples, VOCAB, generator=generator, device=device) * scale).bfloat16()


# ---- the same tokens -------------------------------------------------------------------------------------------------


def check(kind: str, params: list[SamplingParams], scale: float, steps: int, device: torch.device) -> dict[str, Any]:
    """Steps of the kernels beside the CPU's sampler, which is given the same logits and the tokens that it drew itself."""
    batch = Batch(params, VOCAB, device)
    cpu = Sampler(
        vocab_size=VOCAB, local_vocab=VOCAB, comm=Solo(), max_num_seqs=len(params), device=torch.device("cpu"),
        dtype=torch.float32,
    )  # fmt: skip
    for row, p in enumerate(params):
        prompt, nothing = batch.prompts[row], np.zeros(0, np.int32)
        cpu.admit(row, params=p, seed=row, choice=0, stop_ids=(), prompt=prompt, output=nothing)
    wrong = []
    for step in range(steps):
        logits = make_logits(len(params), scale, device, seed=step)
        batch.out.fill_(-7)
        batch.sample(logits)
        batch.positions += 1
        got = batch.out.tolist()
        positions = np.full(len(params), PROMPT + step)
        want = cpu.sample(logits.cpu(), np.arange(len(params)), positions).tokens.tolist()
        wrong += [(step, row, a, b) for row, (a, b) in enumerate(zip(got, want, strict=True)) if a != b]
    return {"kind": kind, "scale": scale, "samples": steps * len(params), "mismatches": len(wrong), "which": wrong[:5]}


def checks(device: torch.device, quick: bool) -> list[dict[str, Any]]:
    rows, steps = (8, 1) if quick else (16, 2)
    found = [check(kind, [params] * rows, scale, steps, device) for kind, params in KINDS.items() for scale in (1.0, 3.0)]
    mixed = [msgspec.structs.replace(MIXTURE[row % len(MIXTURE)]) for row in range(4 * rows)]
    found.append(check("mixture", mixed, 2.0, steps, device))
    alone_and_together(device)
    return found


def alone_and_together(device: torch.device) -> None:
    """A row draws the same whatever the batch, and with any geometry."""
    params = [MIXTURE[row % len(MIXTURE)] for row in range(64)]
    logits = make_logits(64, 1.5, device)
    together = Batch(params, VOCAB, device)
    together.sample(logits)
    want = together.out.clone()
    for splits in SPLITS_CHECKED:
        other = Batch(params, VOCAB, device)
        other.sample(logits, replace(geometry(64), splits=splits))
        if not torch.equal(other.out, want):
            raise AssertionError(f"with {splits} splits other tokens: {(other.out != want).nonzero().flatten().tolist()}")
    for row in range(0, 64, 7):
        single = Batch(params, VOCAB, device)
        single.rows, single.positions, single.out = single.rows[row : row + 1], single.positions[:1], single.out[:1]
        single.sample(logits[row : row + 1])
        if int(single.out[0]) != int(want[row]):
            raise AssertionError(f"row {row} alone draws {int(single.out[0])}, in a batch {int(want[row])}")


# ---- how long --------------------------------------------------------------------------------------------------------


def time_us(batch: Batch, buffers: list[Tensor], plan: SampleGeometry) -> float:
    """Microseconds a step, median over replays of a graph that samples from every buffer once."""
    for logits in buffers[:2]:
        batch.sample(logits, plan)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for logits in buffers:
            batch.sample(logits, plan)
    graph.replay()
    times = []
    for _ in range(7):
        start, end = _event(), _event()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(buffers))
    return float(np.median(times))


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def plans(samples: int, wide: bool) -> list[SampleGeometry]:
    usual = geometry(samples)
    if not wide:
        return [usual]
    splits = sorted({max(1, min(MAX_SPLITS, int(usual.splits * factor))) for factor in (0.5, 1, 2, 4)})
    found = [replace(usual, splits=s, registers=r) for s in splits for r in (None, 64)]
    found += [replace(usual, block=2048, registers=r) for r in (None, 64)]
    found += [replace(usual, block=2048, warps=8, registers=r) for r in (None, 64)]
    found += [replace(usual, stages=1), replace(usual, stages=1, registers=64), replace(usual, rounds=1)]
    return found


def timings(device: torch.device, quick: bool) -> list[dict[str, Any]]:
    found = []
    sizes = (1, 256) if quick else SIZES
    kinds = {kind: [params] for kind, params in KINDS.items()} | {"mixture": list(MIXTURE)}
    for samples in sizes:
        buffers = [make_logits(samples, scale, device, seed) for seed in range(max(3, 512 // samples)) for scale in (1.0, 3.0)]
        buffers = buffers[: max(4, 640 // samples)][:40]
        for kind, cycle in kinds.items():
            batch = Batch([cycle[row % len(cycle)] for row in range(samples)], VOCAB, device)
            wide = not quick and samples in SWEPT and kind in ("greedy", "temperature", "top_k", "top_p")
            for plan in plans(samples, wide):
                us = time_us(batch, buffers, plan)
                limit = samples * VOCAB * 2 / BANDWIDTH * 1e6
                found.append({"kind": kind, "samples": samples, "us": us, "share": limit / us, "plan": describe(plan)})
        del buffers
    return found


def compile_all(quick: bool) -> None:
    """Compiles what `timings` and `checks` launch, into Triton's cache, on all cores."""
    variants = {
        (replace(plan, splits=splits), marked)
        for samples in ((1, 256) if quick else SIZES)
        for plan in plans(samples, not quick and samples in SWEPT)
        for splits in (plan.splits, *SPLITS_CHECKED)
        for marked in ((False, True) if plan == geometry(samples) else (False,))
    }
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(12, mp_context=context) as pool:
        for done in [pool.submit(compile_one, plan, marked) for plan, marked in sorted(variants, key=str)]:
            done.result()


def compile_one(plan: SampleGeometry, marked: bool) -> None:
    device = torch.device("cuda")
    batch = Batch([KINDS["penalties" if marked else "greedy"]], VOCAB, device)
    batch.sample(make_logits(1, 1.0, device), plan)
    torch.cuda.synchronize()


def describe(plan: SampleGeometry) -> str:
    shape = f"splits {plan.splits} block {plan.block} warps {plan.warps} stages {plan.stages}"
    return f"{shape} registers {plan.registers} rounds {plan.rounds}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write all numbers")
    parser.add_argument("--quick", action="store_true", help="fewer checks and sizes, no sweep")
    parser.add_argument("--no-checks", action="store_true")
    options = parser.parse_args()
    device = torch.device("cuda")
    began = time.monotonic()
    compile_all(options.quick)
    print(f"compiled after {time.monotonic() - began:.0f} s", flush=True)
    result: dict[str, Any] = {"checks": [] if options.no_checks else checks(device, options.quick)}
    for found in result["checks"]:
        print(f"{found['kind']:14} scale {found['scale']}: {found['mismatches']} of {found['samples']} differ {found['which']}")
    print(f"checks took {time.monotonic() - began:.0f} s", flush=True)
    result["timings"] = timings(device, options.quick)
    for found in result["timings"]:
        print(f"{found['samples']:4} {found['kind']:14} {found['us']:8.1f} us {found['share']:6.1%}  {found['plan']}")
    print(f"all took {time.monotonic() - began:.0f} s")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
