"""Question 4 on the page. Imports the parts and the plots."""

from pathlib import Path
from typing import Any

from benchmarks.study.report import plots
from benchmarks.study.report.parts import Results, Section, commands, image, number, percent, table

PAGED = "blocks of 256"


def section(results: Results, folder: Path) -> Section:
    result = results["cpu"]
    books = result["bookkeeping"]
    draw(result, folder / "paging.svg")
    memory = result["memory"]
    body = [
        f"A full server in the memory of {result['longest_that_fit']} sequences of maximal length, a queue that is never "
        "empty, first come, first served. Sequences that run at once on average, and their tokens over the memory (above "
        "100%: shared blocks count for each):",
        server_table(result["full_server"]),
        f"Bookkeeping by pool size: a prompt of {books['prompt']:,} tokens comes and goes, new in a pool full of cached "
        "blocks (each block evicts one), or all cached. Microseconds of CPU time, median; hashing apart:",
        laps_table(books),
        f"nano-vLLM takes {number(books['nano_vllm']['hit_us']['8192'] / 1e3)} ms for a hit of 32 blocks of 256 with 8,192 "
        f"free blocks and {number(books['nano_vllm']['hit_us']['65536'] / 1e3)} ms with 65,536, since it searches its list "
        "of free blocks (measured elsewhere).",
        "By batch: one decode step. Manta: the whole report (tokens, blocks, ends, commands, deltas). vLLM: "
        "`allocate_slots` for each sequence alone, without `schedule` and `update`. Microseconds of CPU time, mean of the "
        "quietest round:",
        steps_table(books),
        f"A block of Manta's pool takes {number(memory['pool_bytes'])} bytes of bookkeeping, a published block of 256 tokens "
        f"{number(memory['published_bytes'])} more, 1,024 of which are its tokens, which a hit is compared with.",
        image("paging.svg", "Memory in use by allocator, bookkeeping by pool size and by batch"),
    ]
    return Section(
        "4. Against PagedAttention as vLLM has it", answer(result), body, commands(results),
        "The simulated server decodes one token a step for everyone and prefills at once; in chat and agents, turns that "
        "follow each other in life may run at once here, so their *shared* line is a bound from above. Contiguous memory is "
        "not compacted. vLLM's classes are timed in its own interpreter after Manta's, not in turns; its workers and its "
        "C++ or Rust parts play no role. "
        + f"nano-vLLM: {books['nano_vllm']['source']}.",
    )  # fmt: skip


def answer(result: dict[str, Any]) -> str:
    servers = result["full_server"].values()
    ratios = {
        way: [each[PAGED]["running"] / each[way]["running"] for each in servers if each[PAGED] and each[way]]
        for way in ("contiguous, longest", "contiguous, power of two", "contiguous, exact", "blocks of 16")
    }
    text = "The whole workload fits at once, so nothing can be compared."
    if all(ratios.values()):
        longest, power, exact, small = (f"{min(values):.2f} to {max(values):.2f} times" for values in ratios.values())
        text = (
            f"Blocks of 256 run {longest} as many sequences in the same memory as contiguous runs of maximal length, {power} "
            f"as many as powers of two, {exact} as many as runs of the exact length, and {small} as many as blocks of 16."
        )
    return text + " " + prompt_cost(result["bookkeeping"])


def prompt_cost(books: dict[str, Any]) -> str:
    """What a new prompt costs in the largest pool, hashing included."""
    pools = list(books["256"]["manta"])
    small, large = books["256"]["manta"][pools[0]], books["256"]["manta"][pools[-1]]
    text = (
        f"With {int(pools[-1]):,} blocks a new prompt of {books['prompt']:,} tokens costs Manta {number(total(large))} us "
        f"with blocks of 256, hashing included ({total(large) / total(small):.2f} times what it costs with "
        f"{int(pools[0]):,}), and {number(total(books['16']['manta'][pools[-1]]))} with blocks of 16"
    )
    if books["256"]["vllm"]:
        peers = {block: total(books[block]["vllm"]["pools"][pools[-1]]) for block in ("256", "16")}
        text += f"; vLLM's manager {number(peers['256'])} with blocks of 256 and {number(peers['16'])} with its usual 16"
    return text + "."


def total(lap: dict[str, float]) -> float:
    return lap["cold"] + lap["hash"]


def server_table(servers: dict[str, Any]) -> str:
    ways = [way for way in next(iter(servers.values())) if way != "total_tokens"]
    rows = [
        [name, f"{each['total_tokens']:,}", *(_running(each[way]) for way in ways)] for name, each in servers.items()
    ]
    return table(["workload", "memory, tokens", *ways], rows)


def _running(found: dict[str, float] | None) -> str:
    return "all fit" if found is None else f"{number(found['running'])} ({percent(found['used'], 0)})"


def laps_table(books: dict[str, Any]) -> str:
    rows = []
    for block in ("256", "16"):
        engines = {"Manta": books[block]["manta"]}
        if books[block]["vllm"]:
            engines[f"vLLM {books[block]['vllm']['version']}"] = books[block]["vllm"]["pools"]
        for name, pools in engines.items():
            hashed = list(pools.values())[-1]["hash"]
            rows.append([
                f"{name}, blocks of {block}", *(f"{number(lap['cold'])} / {number(lap['hit'])}" for lap in pools.values()),
                number(hashed),
            ])  # fmt: skip
    pools = list(books["256"]["manta"])
    return table(["new / all cached", *(f"{int(pool):,} blocks" for pool in pools), "hashing"], rows)


def steps_table(books: dict[str, Any]) -> str:
    batches = list(books["256"]["manta_steps"])
    rows = []
    for block in ("256", "16"):
        rows.append([f"Manta, blocks of {block}", *(number(books[block]["manta_steps"][batch]) for batch in batches)])
        if books[block]["vllm"]:
            steps = books[block]["vllm"]["steps"]
            rows.append([f"vLLM, blocks of {block}: allocate_slots", *(number(steps[batch]) for batch in batches)])
    nano = books["nano_vllm"]["step_us"]
    rows.append(["nano-vLLM, schedule and postprocess, measured "
                 "elsewhere", *(number(nano[b]) if b in nano else "" for b in batches)])
    return table(["sequences", *batches], rows)


def draw(result: dict[str, Any], path: Path) -> None:
    made, (used, pools, steps) = plots.figure(3, width=13.0, height=3.9)
    servers = result["full_server"]
    ways = [way for way in next(iter(servers.values())) if way not in ("total_tokens", "blocks of 256, shared")]
    series = {
        way: [None if each[way] is None else 100 * each[way]["used"] for each in servers.values()] for way in ways
    }
    plots.bars(used, [name.replace(" ", "\n") for name in servers], series)
    plots.label(used, "Memory that holds tokens, full server", "", "% of the pool")
    plots.below(used, 2)
    books = result["bookkeeping"]
    for block, colour in (("256", plots.CHOICES[0]), ("16", plots.CHOICES[1])):
        sizes = [int(pool) for pool in books[block]["manta"]]
        batches = [int(batch) for batch in books[block]["manta_steps"]]
        pools.plot(sizes, [lap["cold"] for lap in books[block]["manta"].values()], "o-", color=colour, label=f"Manta, {block}")
        steps.plot(batches, list(books[block]["manta_steps"].values()), "o-", color=colour, label=f"Manta, {block}")
        if books[block]["vllm"]:
            laps = books[block]["vllm"]["pools"].values()
            pools.plot(sizes, [lap["cold"] for lap in laps], "s--", color=colour, label=f"vLLM, {block}")
            slots = list(books[block]["vllm"]["steps"].values())
            steps.plot(batches, slots, "s--", color=colour, label=f"vLLM, {block} (slots only)")
    nano = books["nano_vllm"]["step_us"]
    steps.plot([int(b) for b in nano], list(nano.values()), "^:", color=plots.CHOICES[4], label="nano-vLLM, elsewhere")
    for axes in (pools, steps):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.minorticks_off()
        plots.below(axes, 2)
    plots.label(pools, "A new prompt of 4,096 tokens", "blocks in the pool", "microseconds, without hashing")
    plots.label(steps, "A decode step", "running sequences", "microseconds")
    pools.set_xticks(sizes, [f"{size:,}" for size in sizes])
    steps.set_xticks(batches, [f"{batch:,}" for batch in batches])
    plots.save(made, path)
