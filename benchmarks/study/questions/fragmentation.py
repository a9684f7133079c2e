"""Question 3: fragmentation. Tokens wasted in partly filled blocks, against contiguous preallocation; and the reuse that ends
with a block, which reuse by the token wins back.

Exact arithmetic over the lengths and the tokens of the workloads. Pure Python and NumPy.
"""

from typing import Any, Literal

from benchmarks.study.models.allocators import blocks_for, paged_steps, power_of_two
from benchmarks.study.models.prefixes import hit_tokens, longest_prefixes
from benchmarks.study.models.streams import Workload, workloads
from benchmarks.study.options import Options, Result, machine, run_alone
from benchmarks.study.questions.reuse import production

Reserve = Literal["max", "power of two", "exact"]
BLOCKS = (16, 32, 64, 128, 256)
RESERVES: tuple[Reserve, ...] = ("max", "power of two", "exact")
STRIDE = 32
VLLM_WASTE, VLLM_PAGE = 0.04, 16
"""Published: "under 4%" of the KV memory is wasted (the vLLM announcement of June 2023), with blocks of 16 tokens."""


def wasted_in_blocks(lengths: list[tuple[int, int]], block: int) -> float:
    """Share of the paged memory that holds no token, over all decode steps. lengths: (first, last) tokens of each sequence."""
    held = sum((first + last) * (last - first + 1) // 2 for first, last in lengths)
    return 1 - held / sum(paged_steps(first, last, block) for first, last in lengths)


def wasted_at_end(lengths: list[tuple[int, int]], block: int) -> float:
    """Mean tokens of a sequence's last block that stay empty when it ends."""
    return sum(blocks_for(last, block) * block - last for _, last in lengths) / len(lengths)


def wasted_contiguous(lengths: list[tuple[int, int]], reserve: Reserve) -> float:
    """The same share where one run of memory is reserved for each sequence: for the longest that may come ("max", the power
    of two above the workload's longest), for the power of two above its own final length, or for that exactly."""
    longest = power_of_two(max(last for _, last in lengths))
    sizes = {"max": [longest] * len(lengths), "power of two": [power_of_two(last) for _, last in lengths]}
    reserved = sizes.get(reserve, [last for _, last in lengths])
    held = sum((first + last) * (last - first + 1) // 2 for first, last in lengths)
    return 1 - held / sum(size * (last - first + 1) for size, (first, last) in zip(reserved, lengths, strict=True))


def continued_prefixes(workload: Workload) -> list[int]:
    """Prefixes of a trace if each turn repeats its last one to the end, partly named block and answer included: at most this.

    A trace names whole blocks alone, so that the turn before seems to end with its last full block. Where all full blocks of
    it are matched, the prefix is taken to reach to the end of its answer.
    """
    last: dict[int, int] = {}
    result: list[int] = []
    for number, request in enumerate(workload.requests):
        names = request.asked.names.tolist()
        depth = next((at for at, name in enumerate(names) if name not in last), len(names))
        prefix = depth * workload.unit
        if depth > 1:
            before = workload.requests[last[names[depth - 1]]]
            if depth >= before.asked.prompt_tokens // workload.unit:
                prefix = max(prefix, before.computed_tokens)
        result.append(min(prefix, request.asked.prompt_tokens - 1))
        last.update(dict.fromkeys(names, number))
    return result


def hit_rates(prefixes: list[int], total: int) -> dict[str, float]:
    """Share of all prompt tokens found, by block size, with reuse by the token, and to the last token."""
    rates = {f"blocks of {block}": sum(hit_tokens(each, block) for each in prefixes) / total for block in BLOCKS}
    rates[f"blocks of 256, stride {STRIDE}"] = sum(hit_tokens(each, 256, STRIDE) for each in prefixes) / total
    rates["every token"] = sum(prefixes) / total
    return {name: round(rate, 5) for name, rate in rates.items()}


def replayed(workload: Workload) -> dict[str, float]:
    """The production core's hit rates with and without reuse inside a block, in a pool that never evicts, beside the model's.

    A replay makes answers of its own, so the model leaves answers out here.
    """
    room = sum(blocks_for(request.computed_tokens + 1, 256) + 1 for request in workload.requests)
    prefixes, total = longest_prefixes(workload, answers=False), workload.prompt_tokens
    return {
        "blocks, core": production(workload, room, 0),
        "blocks, model": round(sum(hit_tokens(each, 256) for each in prefixes) / total, 5),
        "tokens, core": production(workload, room, STRIDE),
        "tokens, model": round(sum(hit_tokens(each, 256, STRIDE) for each in prefixes) / total, 5),
    }


def study(workload: Workload) -> dict[str, Any]:
    lengths = [(request.asked.prompt_tokens, request.computed_tokens) for request in workload.requests]
    total = workload.prompt_tokens
    result: dict[str, Any] = {
        "mean_tokens": round(sum(last for _, last in lengths) / len(lengths)),
        "waste": {str(block): round(wasted_in_blocks(lengths, block), 5) for block in BLOCKS},
        "empty_at_end": {str(block): round(wasted_at_end(lengths, block), 1) for block in BLOCKS},
        "contiguous": {each: round(wasted_contiguous(lengths, each), 5) for each in RESERVES},
        "hits": hit_rates(longest_prefixes(workload), total),
        "replayed": replayed(workload),
    }
    if workload.unit > 1:
        result["hits_if_continued"] = hit_rates(continued_prefixes(workload), total)
    return result


def run(options: Options) -> Result:
    made = workloads(options.trace, options.seed, quick=options.quick)
    return {
        "command": options.command(3), "machine": machine(options), "stride": STRIDE, "vllm_waste": VLLM_WASTE,
        "workloads": {workload.name: study(workload) for workload in made},
    }  # fmt: skip


if __name__ == "__main__":
    run_alone(run, 3, __doc__)
