"""The whole page, from what `results-*.json` beside the plots hold. Imports the sections."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.study.report import fragmentation, layout, paging, plots, reuse, tradeoffs
from benchmarks.study.report.parts import Results, Section

FOLDER, PAGE = "kv-study", "kv-study.md"

SECTIONS: dict[str, Callable[[Results, Path], Section]] = {
    "1": layout.section,
    "2": reuse.section,
    "3": fragmentation.section,
    "4": paging.section,
    "5": tradeoffs.section,
}
NEEDS_CPU = frozenset("2345")

OPENING = """# A study of the KV cache

Five questions about a paged KV cache with prefix reuse, answered by measurements, models and replays of Manta's own code. Each
answer comes first; the command below it makes the numbers and this page. `manta study --from` draws the page again from the
saved results, which lie beside the plots in `kv-study/`. Times are medians of rounds in which the alternatives took turns, with
their range; the machine is shared and noisy, so read ranges that overlap as ties.
"""


def store(output: Path, device: str, results: dict[str, Any]) -> Path:
    """Adds the questions' results to what the folder has of that device. Returns the file."""
    path = output / FOLDER / f"results-{device}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    before: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"questions": {}}
    questions = {**before["questions"], **results}
    ordered = {name: questions[name] for name in sorted(questions)}
    path.write_text(json.dumps({"device": device, "questions": ordered}, indent=1) + "\n", encoding="utf-8")
    return path


def adopt(output: Path, saved: Path) -> None:
    """Takes results that were saved elsewhere, or what a question printed, into the folder.

    Errors: OSError, ValueError if they are none.
    """
    text = saved.read_text(encoding="utf-8").strip()
    try:
        content = json.loads(text if text.startswith("{") else text.rpartition("\n")[2])
        device, questions = content["device"], content["questions"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{saved} holds no results of the study: give a results-DEVICE.json that it wrote") from error
    store(output, device, questions)


def load(output: Path) -> dict[str, Results]:
    """Question -> device -> result, the CPU's first."""
    found: dict[str, Results] = {}
    for path in sorted((output / FOLDER).glob("results-*.json")):
        saved = json.loads(path.read_text(encoding="utf-8"))
        for question, result in saved["questions"].items():
            found.setdefault(question, {})[saved["device"]] = result
    return {question: dict(sorted(found[question].items())) for question in sorted(found)}


def render(output: Path) -> Path:
    """Writes the page and the plots of all questions that have results. Raises ValueError if there is none.

    A question that needs the CPU's part is left out where only another device's is there.
    """
    found = {
        question: results for question, results in load(output).items() if "cpu" in results or question not in NEEDS_CPU
    }
    if not found:
        raise ValueError(f"{output / FOLDER} holds no results of the study: run `manta study` without --from first")
    with plots.styled():
        sections = [SECTIONS[question](results, output / FOLDER).markdown() for question, results in found.items()]
    path = output / PAGE
    path.write_text("\n\n".join([OPENING.strip(), machines(found), *sections]) + "\n", encoding="utf-8")
    return path


def machines(found: dict[str, Results]) -> str:
    loads: dict[str, list[float]] = {}
    for machine in (result["machine"] for results in found.values() for result in results.values()):
        line = f"- {machine['device']}: {machine['processor']}, {machine['cores']} cores, torch {machine['torch']}"
        known = [float(machine["load"])] if "load" in machine else []
        loads.setdefault(f"{line}, Python {machine['python']}", []).extend(known)
    lines = [
        line + (f"; load average {min(load):g} to {max(load):g} during the runs" if load else "")
        for line, load in loads.items()
    ]
    quick = any("--quick" in result["command"] for results in found.values() for result in results.values())
    warning = ["", "**Made with `--quick`: small workloads, for a look at the page, not for its numbers.**"] if quick else []
    return "\n".join(["Machines:", "", *lines, *warning])
