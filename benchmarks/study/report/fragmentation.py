"""Question 3 on the page. Imports the parts and the plots."""

from pathlib import Path
from typing import Any

from benchmarks.study.report import plots
from benchmarks.study.report.parts import Results, Section, between, commands, image, percent, table


def section(results: Results, folder: Path) -> Section:
    result = results["cpu"]
    found = result["workloads"]
    blocks = [int(block) for block in next(iter(found.values()))["waste"]]
    draw(result, blocks, folder / "fragmentation.svg")
    body = [
        "Share of the memory that holds no token, over all decode steps of all requests (prompt at once, then a token a "
        "step). Contiguous: one run for each sequence, as long as the power of two above the workload's longest sequence, "
        "as the power of two above its own final length, or as that length exactly, which no server knows:",
        waste_table(found, blocks),
        "Share of the prompt tokens that a cache without eviction finds, by block size, and with reuse by the token at "
        f"blocks of 256 (a match inside a block needs {result['stride']} tokens):",
        hits_table(found),
        "The production core in a replay, in a pool that never evicts, beside the model (without answers, which a replay "
        "makes of its own):",
        replayed_table(found),
        image("fragmentation.svg", "Waste and hit rate by block size"),
    ]
    return Section(
        "3. Fragmentation: what do partly filled blocks waste?", answer(result, blocks), body, commands(results),
        "Exact for these lengths, but a model: slots granted ahead (4 a sequence) and what sharing saves are left to "
        "question 4. A trace names blocks of 512 tokens, so what smaller blocks would find inside a block is not in it; the "
        "line *if continued* is a bound from above, where each turn repeats the turn before to the end of its answer. "
        "vLLM's figure is its authors' (June 2023, blocks of 16), not measured here.",
    )  # fmt: skip


def answer(result: dict[str, Any], blocks: list[int]) -> str:
    found, small, large = result["workloads"], str(blocks[0]), str(blocks[-1])
    lost = [e["hits"]["every token"] - e["hits"][f"blocks of {large}"] for e in found.values() if e["hits"]["every token"]]
    token = f"blocks of {large}, stride {result['stride']}"
    won = [
        (e["hits"][token] - e["hits"][f"blocks of {large}"]) / (e["hits"]["every token"] - e["hits"][f"blocks of {large}"])
        for e in found.values()
        if e["hits"]["every token"] > e["hits"][f"blocks of {large}"]
    ]
    text = (f"Partly filled blocks waste {between([e['waste'][small] for e in found.values()])} of the memory "
            f"at blocks of {small} and {between([e['waste'][large] for e in found.values()])} at {large} (vLLM: "
            f"under {percent(result['vllm_waste'], 0)}), against "
            f"{between([e['contiguous']['max'] for e in found.values()])} for contiguous memory of maximal "
            f"length and {between([e['contiguous']['power of two'] for e in found.values()])} for powers of "
            "two.")  # fmt: skip
    if won:
        text += (f" Blocks of {large} also lose {between(lost)} of all prompt tokens as hits that end inside a "
                 f"block; reuse by the token wins {between(won, 0)} of that back.")  # fmt: skip
    return text


def waste_table(found: dict[str, Any], blocks: list[int]) -> str:
    rows = [
        [
            name, f"{each['mean_tokens']:,}", *(percent(each["waste"][str(block)], 2) for block in blocks),
            *(percent(each["contiguous"][way]) for way in ("max", "power of two", "exact")),
        ]
        for name, each in found.items()
    ]  # fmt: skip
    return table(
        ["workload", "mean tokens", *(f"blocks of {block}" for block in blocks), "longest", "power of two", "exact"], rows
    )


def hits_table(found: dict[str, Any]) -> str:
    columns = list(next(iter(found.values()))["hits"])
    rows = []
    for name, each in found.items():
        if each["hits"]["every token"]:
            rows.append([name, *(percent(each["hits"][column], 2) for column in columns)])
        if "hits_if_continued" in each:
            rows.append([f"{name}, if continued", *(percent(each["hits_if_continued"][column], 2) for column in columns)])
    return table(["workload", *columns], rows)


def replayed_table(found: dict[str, Any]) -> str:
    columns = list(next(iter(found.values()))["replayed"])
    rows = [
        [name, *(percent(each["replayed"][column], 2) for column in columns)]
        for name, each in found.items()
        if each["hits"]["every token"]
    ]
    return table(["workload", *columns], rows)


def draw(result: dict[str, Any], blocks: list[int], path: Path) -> None:
    found = result["workloads"]
    made, (waste, hits) = plots.figure(2, height=3.7)
    for name, each in found.items():
        colour = plots.COLOURS[name]
        waste.plot(blocks, [100 * each["waste"][str(block)] for block in blocks], "o-", label=name, color=colour)
        if not each["hits"]["every token"]:
            continue
        kind = each.get("hits_if_continued", each["hits"])
        lost = [100 * (kind["every token"] - kind[f"blocks of {block}"]) for block in blocks]
        shown = f"{name}, if continued" if kind is not each["hits"] else name
        hits.plot(blocks, lost, "o-", label=shown, color=colour)
        token = 100 * (kind["every token"] - kind[f"blocks of {blocks[-1]}, stride {result['stride']}"])
        hits.plot([blocks[-1]], [token], "D", color=colour, markerfacecolor="white", markersize=6)
    waste.axhline(100 * result["vllm_waste"], color="#444c56", linewidth=1, linestyle="--")
    limit = (blocks[0], 100 * result["vllm_waste"])
    waste.annotate("vLLM: under 4%", limit, xytext=(0, 3), textcoords="offset points", fontsize=8)
    hits.plot([], [], "D", color="#444c56", markerfacecolor="white", label="by the token, blocks of 256")
    plots.block_axis(waste, blocks)
    plots.block_axis(hits, blocks)
    plots.label(waste, "Memory in partly filled blocks", "block size, tokens", "memory without a token, %")
    plots.label(hits, "Hits that end inside a block", "block size, tokens", "prompt tokens not found for it, %")
    plots.below(waste, 3)
    plots.below(hits, 3)
    plots.save(made, path)
