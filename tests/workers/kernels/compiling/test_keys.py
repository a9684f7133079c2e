"""What one process has compiled another finds, in whatever order the two ask."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[4]
KEYS = """
import importlib, json, pkgutil, sys
import workers.kernels
from workers.kernels import launch
from triton.runtime.jit import JITFunction
names = [m.name for m in pkgutil.walk_packages(workers.kernels.__path__, "workers.kernels.")]
kernels = {}
for name in names:
    for label, thing in vars(importlib.import_module(name)).items():
        while not isinstance(thing, JITFunction) and hasattr(thing, "fn"):
            thing = thing.fn
        if isinstance(thing, JITFunction):
            kernels[f"{thing.fn.__module__}.{thing.fn.__qualname__}"] = thing
ordered = sorted(kernels, reverse=sys.argv[1] == "backwards")
print(json.dumps({name: kernels[name].cache_key for name in ordered}))
"""


def keys(order: str) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *sys.path])
    command = [sys.executable, "-c", KEYS, order]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


@pytest.mark.slow
def test_keys_are_the_same_in_every_process() -> None:
    pytest.importorskip("triton")
    forwards, backwards = keys("forwards"), keys("backwards")
    assert len(forwards) > 50
    assert {name: key for name, key in forwards.items() if backwards[name] != key} == {}
