"""`manta study`: runs the experiments of the KV study, keeps their results, and writes the page with its plots.

A checkout has it and a wheel has not. Exit codes: 0 done, 2 bad input.
"""

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated

from deploy.config.load import ConfigError, bound_openmp_spin
from deploy.terminal.exits import reported_errors
from deploy.terminal.options import DebugOption, flag

MODULES = {"1": "layout", "2": "reuse", "3": "fragmentation", "4": "paging", "5": "tradeoffs"}
ON_GPU = ("1", "5")
"""Questions that a GPU says something about."""



QuickOption = Annotated[bool, flag("--quick", "Small workloads, no model, seconds: for a look at the page. Default: no.")]
OutputOption = Annotated[Path, flag("--output", "Folder of kv-study.md; plots and results go to kv-study/. Default: docs.")]
TraceOption = Annotated[
    Path | None, flag("--trace", "A trace that manta replay reads. Default: none, the synthetic workloads alone.")
]
QuestionsOption = Annotated[str, flag("--questions", "Which, apart by commas. Default: 1,2,3,4,5, with a GPU 1,5.")]
DeviceOption = Annotated[str, flag("--device", "cpu or cuda: where copies and kernels are measured. Default: cpu.")]
FromOption = Annotated[
    list[Path], flag("--from", "Saved results to write the page from, without a run; repeatable. Default: none.")
]
VllmOption = Annotated[
    Path | None, flag("--vllm-python", "An interpreter that has vLLM, for question 4. Default: none, vLLM is left out.")
]
ThreadsOption = Annotated[int | None, flag("--threads", "CPU threads of torch. Default: as many as there are cores.")]
LimitOption = Annotated[
    int | None, flag("--limit", "Only so many requests of the trace in the replays of question 5. Default: all.")
]
SeedOption = Annotated[int, flag("--seed", "Of workloads, prompts and replays. Default: 0.")]


def command(
    quick: QuickOption = False,
    output: OutputOption = Path("docs"),
    trace: TraceOption = None,
    questions: QuestionsOption = "",
    device: DeviceOption = "cpu",
    saved: FromOption = [],  # noqa: B006
    vllm_python: VllmOption = None,
    threads: ThreadsOption = None,
    limit: LimitOption = None,
    seed: SeedOption = 0,
    debug: DebugOption = False,
) -> None:
    """Measure, replay and write docs/kv-study.md: memory layout, reuse, fragmentation, paging, trade-offs.

    manta study --trace conversation_trace.jsonl --questions 2,3
    """
    with reported_errors(debug):
        if device not in ("cpu", "cuda"):
            raise ConfigError(f"--device {device} is neither cpu nor cuda")
        wanted = _questions(questions, device)
        bound_openmp_spin()  # as the engine does, before anything imports torch
        page = _experiments("report.page")
        if saved:
            for path in saved:
                page.adopt(output, path)
        else:
            options = _experiments("options").Options(
                quick=quick, trace=trace, device=device, threads=threads or len(os.sched_getaffinity(0)), seed=seed,
                limit=limit, vllm_python=vllm_python,
            )  # fmt: skip
            for question in wanted:
                _say(f"question {question}: {MODULES[question]}")
                result = _experiments(f"questions.{MODULES[question]}").run(options)
                page.store(output, device, {question: result})
        _say(f"wrote {page.render(output)}")


def _questions(text: str, device: str) -> list[str]:
    """Errors: ConfigError."""
    every = ON_GPU if device == "cuda" else tuple(MODULES)
    chosen = [each.strip() for each in text.split(",") if each.strip()] or list(every)
    for each in chosen:
        if each not in MODULES:
            raise ConfigError(f"--questions {text}: {each} is not one of {', '.join(MODULES)}")
        if each not in every:
            raise ConfigError(f"--questions {text}: question {each} has nothing to measure on a GPU; leave --device out")
    return sorted(set(chosen))


def _experiments(name: str) -> ModuleType:
    """A module of the experiments, which import much. Errors: ConfigError where what they need is not installed."""
    try:
        return importlib.import_module(f"benchmarks.study.{name}")
    except ModuleNotFoundError as error:
        if error.name == "matplotlib":
            raise ConfigError('the plots need matplotlib: pip install -e ".[study]"') from error
        raise


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
