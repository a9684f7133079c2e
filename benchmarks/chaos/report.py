"""The tables: a line for each fault, over all the times that it was made; and what was held before and after.

Imports the run's result and `shared.report`.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from statistics import mean
from typing import Any

from benchmarks.chaos.ledger import Incident
from benchmarks.chaos.run import Held, Result
from benchmarks.shared.report import Spread, figure, table

COLUMNS = (
    "fault", "times", "under way", "lost", "wrong", "refused", "taken up", "no output, s", "a stream, s", "whole after, s",
)  # fmt: skip


def incidents_table(incidents: Sequence[Incident]) -> str:
    """Seconds: median and range. *no output*: from anyone; *a stream*: the longest pause of one client."""
    rows = []
    for name in dict.fromkeys(str(incident.fault or "none") for incident in incidents):
        alike = [incident for incident in incidents if str(incident.fault or "none") == name]
        whole = [incident.whole_s for incident in alike if incident.whole_s is not None]
        never = f" (never: {len(alike) - len(whole)})" if name != "none" and len(whole) < len(alike) else ""
        rows.append(
            [
                name,
                str(len(alike)),
                str(sum(incident.under_way for incident in alike)),
                _counted([incident.lost for incident in alike]),
                str(sum(incident.wrong for incident in alike)),
                _counted([incident.refused for incident in alike]),
                str(sum(incident.taken_up for incident in alike)),
                str(Spread.of([incident.silent_s for incident in alike])),
                str(Spread.of([incident.paused_s for incident in alike])),
                (str(Spread.of(whole)) if whole else "") + never,
            ]
        )
    return table(COLUMNS, rows)


def held_table(began: Held, ended: Held) -> str:
    """Means of the processes of each name, before and after."""
    rows = []
    for name, before in began.processes.items():
        after = ended.processes[name]
        if before or after:
            rows.append([name, f"{len(before)} / {len(after)}", *(_means(before, after, each) for each in MEASURES)])
    return table(["before / after", "processes", "resident MiB", "threads", "descriptors"], rows)


MEASURES = ("rss_bytes", "threads", "descriptors")


def _means(before: Sequence[object], after: Sequence[object], measure: str) -> str:
    scale = 1 << 20 if measure == "rss_bytes" else 1
    return " / ".join(
        figure(mean(getattr(each, measure) for each in moment) / scale) if moment else "" for moment in (before, after)
    )


def _counted(counts: Sequence[Counter[str]]) -> str:
    """The sum, and by what."""
    total: Counter[str] = sum(counts, Counter())
    if not total:
        return "0"
    return f"{total.total()}: " + "; ".join(f"{count} {what}" for what, count in total.most_common())


def troubles(result: Result) -> list[str]:
    """What no endpoint should show, whatever it promises of losses: wrong answers, and what is still held."""
    said = list(result.samples)
    if result.not_held:
        said.append(result.not_held)
    if result.began is not None and result.ended is not None:
        before, after = sum(result.began.blocks.values()), sum(result.ended.blocks.values())
        if before != after:
            said.append(f"blocks at the start {result.began.blocks}, at the end {result.ended.blocks}")
        for name, processes in result.began.processes.items():
            if len(result.ended.processes[name]) > len(processes):
                said.append(f"{len(result.ended.processes[name])} processes are called {name}, before it were {len(processes)}")
    return said


def as_json(result: Result) -> dict[str, Any]:
    """All of it."""
    return {
        "incidents": [_plain(incident) for incident in result.incidents],
        "samples": result.samples,
        "missing": dict(result.missing),
        "began": asdict(result.began) if result.began else None,
        "ended": asdict(result.ended) if result.ended else None,
        "not_held": result.not_held,
    }


def _plain(incident: Incident) -> dict[str, Any]:
    counts = {"lost": dict(incident.lost), "refused": dict(incident.refused)}  # `asdict` takes counters apart
    return asdict(replace(incident, lost=Counter(), refused=Counter())) | counts | {"fault": str(incident.fault or "none")}
