"""Replay: the production scheduler core against simulated groups, in virtual time. What-if for any trace, in a minute.

    traces.py     what was asked, and when: Mooncake, Azure, BurstGPT, Manta's own request log
    synthetic.py  traces made from a few numbers, for loads that nobody has recorded
    time_model.py how long a step takes: given, or calibrated from a benchmark of the engine
    groups.py     one group: the production resident batch, many decode steps at once
    transfers.py  blocks on their way between groups, and to and from host memory
    engines.py    cores with their groups: one core for all of them (Manta), or one for each behind a router
    routers.py    what others put in front of independent engines
    run.py        the events, in virtual time
    stopwatch.py  CPU time of the core
    report.py     what came of it

Imports the core, `workers.loop.batch` and NumPy; no torch, no ray, no threads, no clock but the one that it turns itself.
"""
