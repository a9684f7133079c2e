"""Kernels that other processes compile are found by the one that launches them; whatever fails there is compiled here.

Compiles for a GPU that need not be there, in a process without the interpreter that tests run kernels under.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[4]
CODE = "from tests.workers.kernels.compiling.program import main; main()"


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(scope="module")
def says(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of a process that has been killed when all was compiled."""
    env = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))}
    done = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, env=env, stdout=subprocess.PIPE, timeout=600)
    assert done.returncode == -signal.SIGKILL
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def test_what_others_compile_is_found(says: dict[str, Any]) -> None:
    """Under the same key, whatever its constants are."""
    assert says["told"] == {"add": True, "apply": True, "hidden": False}, "what is not found by name is compiled here"
    assert says["again"] == {"add": True, "apply": True}


def test_one_that_dies_is_done_without(says: dict[str, Any]) -> None:
    assert says["dead"] == {"fatal": False}


def test_the_first_one_that_nobody_expected_is_compiled_here(says: dict[str, Any]) -> None:
    """While the processes come up, so that one alone takes no longer for them."""
    assert sorted(says["unexpected"].values()) == [False, True]


def test_nothing_is_left_behind(says: dict[str, Any]) -> None:
    """By who closes, or is killed."""
    assert says["left"] == []
    assert len(says["processes"]) == 6
    deadline = time.monotonic() + 60
    while any(map(alive, says["processes"])):
        assert time.monotonic() < deadline
        time.sleep(0.05)
