"""The KV study: five questions about a paged KV cache, answered by measurements, models and replays. `manta study` runs it.

    options.py        what every question is told, and how each runs alone
    streams.py        the requests: a trace, and synthetic workloads whose users and conversations are known
    prefixes.py       the longest common prefix to the token, and what a block size makes of it
    block_cache.py     one LRU pool that remembers who used which block, when
    allocators.py     contiguous preallocation against blocks, a full server simulated step by step
    layout.py, reuse.py, fragmentation.py, paging.py, tradeoffs.py
                      questions 1 to 5: `run(options)` gives plain data, `python -m benchmarks.study.NAME` prints it
    report/           the page and its plots from that data

May import every room; nothing imports it but `manta/commands.py`, for `manta study`.
"""
