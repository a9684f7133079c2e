"""Measurements of Manta and of its peers; nothing that serves imports this package. Each is run as a module, by its room:

    engine      the engine beside vLLM and transformers; transfer, migration, ray_overhead
    serving     an endpoint under load, beside vLLM's; front_end, soak, agent
    chaos       an endpoint under load while its processes die, stop or are cut off
    scheduler   what the scheduler's events cost; replay makes the tables of docs/replay.md
    gpu         one GPU: bare step loop, one process, Ray; endpoint
    models      model types beside transformers, token for token; makes the table of docs/models.md; loading
    kernels     GPU kernels against their limits; attention, sampler
    study       the KV cache study (`manta study`)
    shared      what several of them use

`python -m benchmarks.engine` runs a room's own, `python -m benchmarks.engine.transfer` one of the others.
"""
