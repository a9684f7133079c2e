"""Markdown of the page: tables, figures, and a section's fixed shape. Imports the standard library only."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Results = dict[str, dict[str, Any]]
"""Device ("cpu", "cuda") -> what the question's `run` gave there."""


@dataclass(frozen=True, slots=True)
class Section:
    """One question: the answer first, then tables and a plot, the commands, and what it does not show."""

    title: str
    answer: str
    body: list[str]
    commands: list[str]
    limits: str

    def markdown(self) -> str:
        commands = "\n".join(dict.fromkeys(self.commands))
        return "\n\n".join(
            [f"## {self.title}", self.answer, *self.body, f"```sh\n{commands}\n```", f"**What it does not show.** "
                                                                                     f"{self.limits}"]
        )


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def image(name: str, alt: str) -> str:
    return f"![{alt}](kv-study/{name})"


def number(value: float) -> str:
    """Three significant digits, thousands marked."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f}%"


def spread(value: dict[str, float]) -> str:
    """Median (range)."""
    return f"{number(value['median'])} ({number(value['low'])}-{number(value['high'])})"


def between(values: Sequence[float], digits: int = 1) -> str:
    """The range of some shares, in percent."""
    low, high = min(values), max(values)
    return percent(low, digits) if f"{low:.5f}" == f"{high:.5f}" else f"{100 * low:.{digits}f} to {percent(high, digits)}"


def device_name(result: dict[str, Any]) -> str:
    machine = result["machine"]
    if machine["device"] == "CPU":
        return f"CPU ({machine['cores']} cores, torch {machine['torch']})"
    return f"{machine['device']} (torch {machine['torch']})"


def commands(results: Results) -> list[str]:
    return [result["command"] for result in results.values()]
