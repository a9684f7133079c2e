"""Question 1 on the page. Imports the parts and the plots."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks.study.report import plots
from benchmarks.study.report.parts import Results, Section, commands, device_name, image, number, spread, table

WAYS = ("block-first", "layer-first", "per layer")


def section(results: Results, folder: Path) -> Section:
    body: list[str] = []
    for device, result in results.items():
        clock = f"{result.get('clock', 'wall')} time"
        body += [f"On {device_name(result)}, microseconds a block of {clock}, median (range):", copies_table(result)]
        if result["attention_ms"]:
            threads = f", {result['threads']} thread{'s'[: result['threads'] > 1]}" if device == "cpu" else ""
            body += [f"Attention, ms a layer of {clock}{threads}:", attention_table(result)]
    draw(results, folder / "layout.svg")
    first = next(iter(results.values()))
    body.insert(0, f"Blocks of {first['block']} tokens of the {first['shape']} shape in bf16: "
                   f"{number(first['block_bytes'] / 2**20)} MiB, one run of bytes block-first, {first['runs']} "
                   "runs layer-first.")  # fmt: skip
    body.append(image("layout.svg", "Cost of copies by layout, and of attention block-first over per layer"))
    return Section(
        "1. Memory layout: block-first or layer-first?", answer(results), body, commands(results),
        "Blocks that lie in one process's memory; a network card that takes scatter lists would narrow the gap in sending. "
        "Copies of the three layouts take turns, so caches are warm to the same degree for all."
        + ("" if "cuda" in results else " The GPU's figures are missing: `manta study --questions 1,5 --device cuda` adds "
                                        "them."),
    )  # fmt: skip


def factor(result: dict[str, Any], operation: str, way: str = "per layer") -> float:
    """How many times as long as block-first."""
    times = result["copies_us"][operation]
    return float(times[way]["median"] / times["block-first"]["median"])


def answer(results: Results) -> str:
    sentences = []
    for device, result in results.items():
        names = list(result["copies_us"])
        factors = {name: factor(result, name) for name in names}
        most, least = max(names, key=factors.__getitem__), min(names, key=factors.__getitem__)
        where = "On the CPU" if device == "cpu" else f"On the {result['machine']['device']}"
        text = (f"{where} operations on a block of a tensor for each layer take {factors[least]:.2f} ({least}) "
                f"to {factors[most]:.1f} times ({most}) as long as block-first")  # fmt: skip
        if result["attention_ms"]:
            ratios = [row["ratio"]["median"] for row in result["attention_ms"]]
            inside = sum(row["ratio"]["low"] <= 1 <= row["ratio"]["high"] for row in result["attention_ms"])
            text += (f"; attention over the block-first view takes {min(ratios):.2f} to {max(ratios):.2f} times "
                     f"what it takes over a tensor for each layer, and in {inside} of {len(ratios)} cases the "
                     "rounds straddle 1")  # fmt: skip
        sentences.append(text + ".")
    return " ".join(sentences)


def copies_table(result: dict[str, Any]) -> str:
    rows = [
        [name, *(spread(times[way]) for way in WAYS), f"{times['per layer']['median'] / times['block-first']['median']:.2f}"]
        for name, times in result["copies_us"].items()
    ]
    return table(["", *WAYS, "per layer / block-first"], rows)


def attention_table(result: dict[str, Any]) -> str:
    rows = [
        [row["case"], row["backend"], spread(row["block-first"]), spread(row["per layer"]), spread(row["ratio"])]
        for row in result["attention_ms"]
    ]
    return table(["batch", "backend", "block-first", "per layer", "block-first / per layer"], rows)


def draw(results: Results, path: Path) -> None:
    made, panels = plots.figure(2, len(results), height=3.6)
    for at, result in enumerate(results.values()):
        left, right = panels[2 * at : 2 * at + 2]
        names = list(result["copies_us"])
        for place, way in enumerate(WAYS):
            values = [result["copies_us"][name][way]["median"] for name in names]
            left.barh([y + 0.26 * (place - 1) for y in range(len(names))], values, 0.24, label=way, color=plots.CHOICES[place])
        left.set_yticks(range(len(names)), [name.replace(", gathered first", ",\ngathered first") for name in names])
        left.invert_yaxis()
        left.set_xscale("log")
        left.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        left.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        left.xaxis.set_minor_formatter(NullFormatter())
        left.grid(visible=False, axis="y")
        plots.label(left, f"A block by layout, {result['machine']['device']}", "microseconds a block (log)", "")
        left.legend(loc="lower center", bbox_to_anchor=(0.3, -0.36), ncols=3)
        draw_attention(right, result)
    plots.save(made, path)


def draw_attention(axes: Axes, result: dict[str, Any]) -> None:
    rows = result["attention_ms"]
    for at, row in enumerate(rows):
        ratio = row["ratio"]
        colour = plots.CHOICES[sorted({each["backend"] for each in rows}).index(row["backend"])]
        axes.plot([ratio["low"], ratio["high"]], [at, at], color=colour, linewidth=2, alpha=0.45)
        axes.plot([ratio["median"]], [at], "o", color=colour)
    axes.axvline(1.0, color="#444c56", linewidth=1)
    axes.set_yticks(range(len(rows)), [f"{row['case']}, {row['backend']}" for row in rows], fontsize=8)
    axes.invert_yaxis()
    plots.label(axes, "Attention, block-first / per layer", "ratio of times, median and range", "")
