"""Question 2 on the page. Imports the parts and the plots."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from benchmarks.study.report import plots
from benchmarks.study.report.parts import Results, Section, between, commands, image, number, percent, table

LEAST_S = 0.01
"""Where a logarithmic axis of seconds begins."""

RELATIONS = ("same conversation", "same user", "other user", "other conversation")


def section(results: Results, folder: Path) -> Section:
    result = results["cpu"]
    found = result["workloads"]
    draw(found, folder / "reuse.svg", result)
    body = [
        f"Blocks of {result['block']} tokens, one pool. Without eviction, and with a pool of a tenth of the distinct blocks:",
        reuse_table(found),
        "How long blocks live (that pool), how long after its last use a block is used again (no eviction), and who hits it:",
        life_table(found),
        image("reuse.svg", "Hit rate by pool size, blocks by reuse count, who reuses, and how long blocks live"),
        check(result),
    ]
    return Section(
        "2. Pooling and reuse: how much, how often, by whom?", answer(found), body, commands(results),
        "The model takes requests one after the other, so nobody waits and nobody computes a prefix twice. A trace names "
        "blocks, not users; its conversations are inferred (a request continues the one that last had its longest prefix "
        "beyond what 1% of all requests begin with), and its answers are unknown, so hits on answers are not in it. The "
        "synthetic workloads are assumptions about lengths and times, made by `benchmarks/study/models/streams.py`.",
    )  # fmt: skip


def answer(found: dict[str, Any]) -> str:
    reused = {name: each for name, each in found.items() if each["hit_rate"]}
    never = [each["reuses"]["0"] for each in reused.values()]
    own = {name: each["relations"].get("same conversation", 0.0) for name, each in reused.items()}
    by_conversation = [name for name, share in own.items() if share >= 0.5]
    by_others = [name for name, share in own.items() if share < 0.5]
    text = (f"Of all prompt tokens {between([each['hit_rate'] for each in reused.values()])} are found again "
            "where anything is shared, and a pool of a tenth of the distinct blocks finds "
            f"{between([e['pool']['hit_rate'] for e in reused.values()])}; {between(never)} of the blocks are "
            "never reused.")  # fmt: skip
    if by_conversation:
        shares = between([own[name] for name in by_conversation])
        text += f" In {' and '.join(by_conversation)} it is the same conversation that reuses ({shares} of the blocks hit)"
        text += f"; in {' and '.join(by_others)} it is others." if by_others else "."
    return text


def reuse_table(found: dict[str, Any]) -> str:
    rows = [
        [
            name, f"{each['requests']:,}", f"{each['cached_tokens'] / 1e6:.2f} / {each['prompt_tokens'] / 1e6:.2f}",
            percent(each["hit_rate"]), percent(each["pool"]["hit_rate"]), f"{each['distinct_blocks']:,}",
            percent(each["reuses"]["0"]), percent(each["top_share"]), f"{each['most_reused']:,}",
        ]
        for name, each in found.items()
    ]  # fmt: skip
    return table(
        ["workload", "requests", "cached / prompt tokens, M", "hit rate", "in a tenth", "distinct blocks", "never reused",
         "reuses on the top 1% of blocks", "most reused block"], rows,
    )  # fmt: skip


def life_table(found: dict[str, Any]) -> str:
    rows = []
    for name, each in found.items():
        lives, idles, gaps = each["pool"]["lives_s"], each["pool"]["idles_s"], each["gaps_s"]
        who = ", ".join(f"{relation} {percent(share, 0)}" for relation, share in each["relations"].items() if share >= 0.005)
        rows.append([name, _seconds(lives), _seconds(idles), _seconds(gaps), who or "nobody"])
    return table(["workload", "life, s: p50 (p10-p90)", "idle before eviction, s", "reused after, s", "hit by"], rows)


def _seconds(points: dict[str, float] | None) -> str:
    return "none" if points is None else f"{number(points['p50'])} ({number(points['p10'])}-{number(points['p90'])})"


def check(result: dict[str, Any]) -> str:
    parts = [
        f"{name}, {each['blocks']:,} blocks: model {percent(each['model'], 2)}, core {percent(each['core'], 2)}"
        for name, each in result["check"].items()
    ]
    return "The production core in a replay (whole blocks alone), as a check of the model: " + "; ".join(parts) + "."


def draw(found: dict[str, Any], path: Path, result: dict[str, Any]) -> None:
    made, (curve, counts, who, times) = plots.figure(2, 2, height=3.4)
    for name, each in found.items():
        points = each["curve"]
        curve.plot([100 * p["share"] for p in points], [100 * p["hit_rate"] for p in points], "o-", label=name,
                   color=plots.COLOURS[name])  # fmt: skip
    curve.set_xscale("log")
    curve.set_xticks([1, 2, 5, 10, 20, 50, 100], ["1", "2", "5", "10", "20", "50", "100"])
    curve.minorticks_off()
    curve.set_ylim(-3, 103)
    plots.label(curve, "Hit rate by pool size", "pool, % of the workload's distinct blocks", "prompt tokens found, %")
    plots.below(curve, 3)
    names = list(found)
    ranges = list(next(iter(found.values()))["reuses"])
    plots.stacked(counts, names, {key: [100 * found[n]["reuses"][key] for n in names] for key in ranges}, plots.SHADES)
    plots.label(counts, "Blocks by how often reused", f"blocks of {result['block']}, % (no eviction)", "")
    plots.below(counts, 4)
    shared = [name for name in names if found[name]["relations"]]
    relations = {key: [100 * found[n]["relations"].get(key, 0.0) for n in shared] for key in RELATIONS}
    plots.stacked(who, shared, relations, plots.CHOICES)
    plots.label(who, "Who reuses", "blocks hit, %", "")
    plots.below(who, 2)
    draw_times(times, found)
    plots.save(made, path)


def draw_times(axes: Axes, found: dict[str, Any]) -> None:
    """A bar from p10 to p90 and a dot at the median, for each workload."""
    kinds = {
        "life, birth to eviction": [each["pool"]["lives_s"] for each in found.values()],
        "idle before eviction": [each["pool"]["idles_s"] for each in found.values()],
        "time to the next reuse": [each["gaps_s"] for each in found.values()],
    }
    for at, (kind, points) in enumerate(kinds.items()):
        colour = plots.CHOICES[at]
        for row, each in enumerate(points):
            if each is not None:
                y = row + 0.24 * (at - 1)
                axes.plot([max(each["p10"], LEAST_S), max(each["p90"], LEAST_S)], [y, y], color=colour, linewidth=4, alpha=0.35)
                axes.plot([max(each["p50"], LEAST_S)], [y], "o", color=colour)
        axes.plot([], [], "o-", color=colour, label=kind)
    axes.set_xscale("log")
    axes.set_yticks(range(len(found)), list(found))
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    plots.label(axes, "How long blocks live (a tenth of the blocks)", "seconds, p10 to p90 and median", "")
    plots.below(axes, 2)
