"""The KV study: five questions about a paged KV cache, answered by measurements, models and replays. `manta study` runs it.

    options.py        what every question is told, and how each runs alone
    questions/        layout, reuse, fragmentation, paging, tradeoffs, 1 to 5: `run(options)` gives plain data,
                      `python -m benchmarks.study.questions.NAME` prints it
    models/           what needs no engine. streams: the requests, a trace and workloads whose users are known · prefixes: the
                      longest to the token · block_cache: a pool that remembers who used what · allocators: a full server
    measured/         the real engine, vLLM's own bookkeeping, what a token costs, the production core in replay
    report/           the page and its plots from that data

May import every room; nothing imports it but `manta/commands.py`, for `manta study`.
"""
