"""The bookkeeping imports with torch and ray out of reach: it is what runs in the simulator and in the scheduler actor."""

import subprocess
import sys

import pytest

PURE = [
    "kvcache",
    "kvcache.layout",
    "scheduler.admission",
    "scheduler.core",
    "scheduler.invariants",
    "scheduler.server",
    "scheduler.stats",
    "workers.sampling.constraints",
    "workers.sampling.grammar",
    "workers.loop.leader",
    "workers.loop.link",
    "workers.loop.reports",
    "workers.loop.simulated",
]


@pytest.mark.parametrize("module", PURE)
def test_imports_with_torch_and_ray_blocked(module: str) -> None:
    code = f"import sys; sys.modules.update(dict.fromkeys(('torch', 'ray', 'transformers'))); import {module}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
