"""Question 5 on the page, in five parts. Imports the parts and the plots."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from benchmarks.study.report import plots
from benchmarks.study.report.parts import Results, Section, commands, device_name, image, number, percent, spread, table


def section(results: Results, folder: Path) -> Section:
    result = results["cpu"]
    body = [*hit_rate(result), *token_costs(results), *memory(result), *kernels(results), *short_prompts(result)]
    draw(results, folder / "tradeoffs.svg")
    body.append(image("tradeoffs.svg", "Pool size, hit rate and latency; the engine's reuse; block size and kernels"))
    return Section(
        "5. Impact and trade-offs: what pays?", answer(results), body, commands(results),
        "Replayed seconds come from the time model of `docs/replay.md`, not from GPUs. The engine runs have random "
        "weights, one group in one process, and count CPU time: what a client waits for on an idle machine, without "
        "queues. The second tier of 5c is a model: a pool so much larger, at the pace of the replay's links and with no "
        "queue for them.",
    )  # fmt: skip


def answer(results: Results) -> str:
    """A line for each part."""
    result = results["cpu"]
    verdicts = [impact(result), hashing(result), tiers(result), block_sizes(results), packing(result)]
    return "\n".join(f"- {verdict}" for verdict in verdicts if verdict)


def impact(result: dict[str, Any]) -> str:
    sweep = result["sweep"]
    low, high = sweep["rows"][0], sweep["rows"][-1]
    text = (
        f"**Hit rate.** From {low['blocks']:,} to {high['blocks']:,} blocks a group the hit rate of the {sweep['workload']} "
        f"goes from {percent(low['hit_rate'])} to {percent(high['hit_rate'])}, the mean time to first token from "
        f"{number(low['ttft_mean_s'])} to {number(high['ttft_mean_s'])} s, and overloaded throughput grows by a factor of "
        f"{high['requests_per_s'] / low['requests_per_s']:.2f}."
    )
    if "engine" in result:
        none, most = result["engine"]["reuse"][0], result["engine"]["reuse"][-1]
        text += (
            f" On the real engine a prompt that is cached to {most['cached']:,} of {most['prompt']:,} tokens has its first "
            f"token in {number(most['ttft_ms']['median'])} instead of {number(none['ttft_ms']['median'])} ms of CPU time."
        )
    return text


def hashing(result: dict[str, Any]) -> str:
    costs = result["token_ns"]["256"]
    spent_ns = costs["hash"] + costs["verify"]
    text = f"**Hashing.** Hashing a token and comparing it cost {spent_ns:.2g} ns at blocks of 256"
    if "engine" in result:
        saved_us = compute_us(result["engine"])
        text += f", computing it {number(saved_us)} us on this CPU: some {rounded(saved_us * 1e3 / spent_ns)} times as much"
    return text + "."


def rounded(value: float) -> str:
    """Two significant digits."""
    return f"{float(f'{value:.2g}'):,.0f}"


def tiers(result: dict[str, Any]) -> str:
    tier, moved = result["tier"], result["moves"]["rows"]
    most = tier["rows"][-1]
    text = (
        f"**Memory or recompute.** A host tier of {most['tier']} times the pool lifts {tier['workload']} from "
        f"{percent(tier['hit_rate'])} to {percent(most['hit_rate'])} and saves {number(most['recompute_ms_a_request'])} ms "
        f"of prefill a request; moving KV beats computing it above {tier['break_even_bandwidth'] / 1e9:.1f} GB/s. **Fetching "
        f"ahead** of the start can save at most {number(most['fetch_ms_a_request'])} ms a request on top."
    )
    if "manta-fetch" in moved:
        text += (
            f" Fetching from other groups changes the mean time to first token from {number(moved['manta']['ttft_mean_s'])} "
            f"to {number(moved['manta-fetch']['ttft_mean_s'])} s in 5c."
        )
    return text


def block_sizes(results: Results) -> str:
    parts = []
    for result in results.values():
        found: dict[tuple[str, str], dict[int, float]] = {}
        for row in result.get("kernels") or []:
            found.setdefault((row["case"], row["backend"]), {})[row["block"]] = row["ms"]["median"]
        ratios = [own[16] / own[256] for own in found.values() if 16 in own and 256 in own]
        if ratios:
            parts.append(f"{min(ratios):.2f} to {max(ratios):.2f} times as long on {device_name(result)}")
    return f"**Block size.** Attention over blocks of 16 takes {', '.join(parts)} as over blocks of 256." if parts else ""


def packing(result: dict[str, Any]) -> str:
    if "engine" not in result:
        return ""
    found = {name: each["ms"]["median"] for name, each in result["engine"]["padding"].items()}
    packed = found.pop("packed")
    listed = ", ".join(f"{name} {number(ms / packed)}" for name, ms in found.items())
    return f"**Short prompts.** Against packing them without padding, in times as long: {listed}."


def compute_us(engine: dict[str, Any]) -> float:
    """Of one prompt token: what the longest hit saves, over its tokens."""
    none, most = engine["reuse"][0], engine["reuse"][-1]
    return float((none["ttft_ms"]["median"] - most["ttft_ms"]["median"]) * 1e3 / (most["cached"] - none["cached"]))


def hit_rate(result: dict[str, Any]) -> list[str]:
    sweep = result["sweep"]
    rows = [
        [
            f"{row['blocks']:,}", f"{row['tokens'] / 1e6:.1f}", percent(row["hit_rate"]), number(row["ttft_mean_s"]),
            number(row["ttft_p50_s"]), number(row["ttft_p99_s"]), number(row["tpot_p50_s"] * 1e3),
            percent(row["full_hit_rate"]), number(row["requests_per_s"]),
        ]
        for row in sweep["rows"]
    ]  # fmt: skip
    body = [
        "### 5a. Hit rate against latency and throughput",
        f"The production core, {sweep['groups']} groups, the first {sweep['requests']:,} requests of {sweep['workload']}, "
        f"virtual seconds; the last two columns at {sweep['speed_up']:g} times the load, where every pool is overloaded:",
        table(["blocks a group", "M tokens in all", "hit rate", "TTFT mean, s", "p50", "p99", "TPOT p50, ms",
               "hit rate, overloaded", "requests/s, overloaded"], rows),
    ]  # fmt: skip
    if "engine" in result:
        engine = result["engine"]
        lines = [
            [f"{row['cached']:,} of "
             f"{row['prompt']:,}", spread(row["ttft_ms"]), spread(row["tokens_per_s"])] for row in engine["reuse"]
        ]
        body += [
            f"The real engine, {engine['model']} on this CPU, milliseconds and seconds of CPU time: one request for its "
            f"first token, then {engine['batch']} at once for {engine['output']} tokens each, by cached prompt tokens:",
            table(["cached", "TTFT, ms", "output tokens/s"], lines),
        ]
    return body


def token_costs(results: Results) -> list[str]:
    result = results["cpu"]
    rows = [
        [f"blocks of {block}", *(number(costs[name]) for name in ("hash", "verify", "publish")), number(costs["part_us"])]
        for block, costs in result["token_ns"].items()
    ]
    body = [
        "### 5b. What reuse costs against the compute that it saves",
        "Nanoseconds a token: hashing a prompt, finding all of it with every token compared, publishing it new. And "
        "microseconds for a match that ends inside a block, once a prompt:",
        table(["", "hash", "find and verify", "publish", "a part, us"], rows),
    ]
    copies = [
        [f"{shape}, {device_name(of_device)}", *(spread(each["us"][tokens]) for tokens in ("32", "128")),
         number(each["us"]["128"]["median"] / 128)]
        for of_device in results.values()
        if "copy_us" in of_device
        for shape, each in of_device["copy_us"].items()
    ]  # fmt: skip
    if copies:
        body += [
            "Copying the part of a block that is reused, all layers, microseconds:",
            table(["", "32 tokens", "128 tokens", "a token"], copies),
        ]
    if "engine" in result:
        body.append(f"Computing a prompt token takes {number(compute_us(result['engine']))} us here "
                    f"({result['engine']['model']}, from 5a), so a copy of 32 tokens costs as much as "
                    f"computing {copy_in_tokens(result):.2g} of them.")  # fmt: skip
    return body


def copy_in_tokens(result: dict[str, Any]) -> float:
    shape = result["copy_us"][result["engine"]["model"]]
    return float(shape["us"]["32"]["median"]) / compute_us(result["engine"])


def memory(result: dict[str, Any]) -> list[str]:
    tier = result["tier"]
    rows = [
        [f"{row['tier']} x the pool", percent(row["hit_rate"]), f"{row['tokens'] / 1e6:.2f}",
         number(row["recompute_ms_a_request"]), number(row["fetch_ms_a_request"])]
        for row in tier["rows"]
    ]  # fmt: skip
    body = [
        "### 5c. Memory against recompute, and fetching ahead",
        f"A second tier of host memory beside a pool that holds a twentieth of {tier['workload']}'s distinct blocks (hit "
        f"rate alone {percent(tier['hit_rate'])}), for the model that the time model stands for "
        f"({tier['token_bytes'] / 1024:.0f} KiB of KV a token), fetched at {tier['bandwidth'] / 1e9:.0f} GB/s a group:",
        table(["tier", "hit rate", "M tokens won", "computing them, ms a request", "fetching them, ms a request"], rows),
        f"Fetching beats computing above {tier['break_even_bandwidth'] / 1e9:.1f} GB/s. Fetching *ahead*, while a request "
        "waits, can save at most the last column: it pays where that is a visible part of the time to first token.",
    ]
    moved = result["moves"]
    replayed = [
        [policy, percent(row["hit_rate"], 2), number(row["ttft_mean_s"]), number(row["ttft_p99_s"]),
         f"{row['fetched_tokens'] / 1e6:.2f}"]
        for policy, row in moved["rows"].items()
    ]  # fmt: skip
    body += [
        f"The production core with {moved['groups']} groups of {moved['blocks']:,} blocks (a tenth of the distinct blocks in "
        "all), which computes what its group lacks, or moves blocks from where they are:",
        table(["policy", "hit rate", "TTFT mean, s", "p99", "M tokens from other groups"], replayed),
    ]
    if "engine" in result:
        lines = [
            [percent(row["pool"], 0), spread(row["tokens_per_s"]), number(row["preemptions"]),
             percent(row["recomputed"] / row["tokens"])]
            for row in result["engine"]["pressure"]
        ]  # fmt: skip
        body += [
            "The real engine with a pool that holds all of a batch, half, and a quarter (preemption by recompute):",
            table(["pool, of what the batch needs", "output tokens/s", "preemptions a batch", "tokens computed again"], lines),
            "Beyond the tokens computed again a smaller pool runs fewer sequences at once; the two were not measured apart.",
        ]
    return body


def kernels(results: Results) -> list[str]:
    measured = {device: each for device, each in results.items() if each.get("kernels")}
    if not measured:
        return []
    body = ["### 5d. Block size against kernel speed", "Attention, ms a layer, median (range); on the CPU in CPU time:"]
    for result in measured.values():
        blocks = sorted({row["block"] for row in result["kernels"]})
        names = dict.fromkeys((row["case"], row["backend"]) for row in result["kernels"])
        found = {(row["case"], row["backend"], row["block"]): row["ms"] for row in result["kernels"]}
        rows = [
            [case, backend, *(spread(found[key]) if (key := (case, backend, block)) in found else "" for block in blocks)]
            for case, backend in names
        ]
        body.append(table([f"{result['kernel_shape']} on "
                           f"{device_name(result)}", "backend", *(f"blocks of {block}" for block in blocks)], rows))
    return body


def short_prompts(result: dict[str, Any]) -> list[str]:
    if "engine" not in result:
        return []
    found = result["engine"]["padding"]
    packed = found["packed"]["ms"]["median"]
    rows = [
        [name, f"{each['tokens']:,}", spread(each["ms"]), f"{each['ms']['median'] / packed:.2f}"]
        for name, each in found.items()
    ]
    return [
        "### 5e. Padding and grouping short prompts",
        "32 prompts of 4 to 128 tokens, one token out each, on the real engine. Manta packs tokens of all prompts into one "
        "step, without padding; the other lines send what another engine would compute:",
        table(["", "tokens computed", "ms", "over packed"], rows),
    ]


def draw(results: Results, path: Path) -> None:
    result = results["cpu"]
    made, panels = plots.figure(3, width=13.0, height=3.9)
    pool, engine, kernel = panels
    rows = result["sweep"]["rows"]
    pool.plot([row["tokens"] / 1e6 for row in rows], [100 * row["hit_rate"] for row in rows], "o-", color=plots.CHOICES[0],
              label="hit rate")  # fmt: skip
    pool.set_xscale("log")
    pool.set_xticks([row["tokens"] / 1e6 for row in rows], [number(row["tokens"] / 1e6) for row in rows])
    pool.minorticks_off()
    pool.set_ylim(bottom=0)
    plots.label(pool, f"Pool size ({result['sweep']['workload']}, "
                      f"replayed)", "pools of all groups, million tokens", "hit rate, %")
    second = pool.twinx()
    second.plot([row["tokens"] / 1e6 for row in rows], [row["ttft_mean_s"] for row in rows], "s--", color=plots.CHOICES[1],
                label="mean TTFT")  # fmt: skip
    second.set_ylabel("mean TTFT, s")
    second.set_ylim(bottom=0)
    second.grid(visible=False)
    second.spines["right"].set_visible(True)
    lines = [*pool.get_lines(), *second.get_lines()]
    pool.legend(lines, [str(line.get_label()) for line in lines], loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
    draw_engine(engine, result)
    draw_kernels(kernel, results)
    plots.save(made, path)


def draw_engine(axes: Axes, result: dict[str, Any]) -> None:
    if "engine" not in result:
        axes.set_visible(False)
        return
    rows = result["engine"]["reuse"]
    cached = [100 * row["cached"] / row["prompt"] for row in rows]
    for name, colour, label in (("ttft_ms", plots.CHOICES[1], "TTFT, ms"), ("tokens_per_s", plots.CHOICES[2], "tokens/s out")):
        low, middle, high = ([row[name][point] for row in rows] for point in ("low", "median", "high"))
        axes.plot(cached, middle, "o-", color=colour, label=label)
        axes.fill_between(cached, low, high, color=colour, alpha=0.18)
    axes.set_ylim(bottom=0)
    plots.label(axes, f"Reuse on the real engine ({result['engine']['model']}, CPU)", "prompt cached, %", "ms, and tokens/s")
    plots.below(axes, 2)


def draw_kernels(axes: Axes, results: Results) -> None:
    """Each batch relative to blocks of 256 on the same backend."""
    at = 0
    for device, result in results.items():
        rows = result.get("kernels") or []
        for case, backend in dict.fromkeys((row["case"], row["backend"]) for row in rows):
            own = {row["block"]: row["ms"]["median"] for row in rows if (row["case"], row["backend"]) == (case, backend)}
            if 256 in own:
                axes.plot(list(own), [own[block] / own[256] for block in own], "o--" if device == "cuda" else "o-",
                          color=plots.CHOICES[at % len(plots.CHOICES)], label=f"{case}, {backend}")  # fmt: skip
                at += 1
    if not at:
        axes.set_visible(False)
        return
    plots.block_axis(axes, [16, 32, 64, 128, 256])
    axes.set_ylim(bottom=0)
    plots.label(axes, "Attention by block size", "block size, tokens", "time, over blocks of 256")
    plots.below(axes, 2)
