"""aiperf, which measures an endpoint: every request is answered, and its counts of tokens are the server's."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.clients.samples import MODEL, PATIENCE_S

REQUESTS, INPUT_TOKENS, OUTPUT_TOKENS = 8, 64, 16


def profiled(address: str, checkpoint: Path, folder: Path, *options: str) -> Any:
    """What it exports."""
    command = [str(Path(sys.executable).with_name("aiperf")), "profile", "--model", MODEL, "--url", address]
    command += ["--tokenizer", str(checkpoint), "--request-count", str(REQUESTS), "--concurrency", "2", "--workers-max", "1"]
    command += ["--isl", str(INPUT_TOKENS), "--osl", str(OUTPUT_TOKENS), "--random-seed", "1", "--ui", "none"]
    command += ["--extra-inputs", "ignore_eos:true", "--no-gpu-telemetry", "--output-artifact-dir", str(folder), *options]
    environ = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}  # with it, it takes no folder
    ran = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, cwd=folder, env=environ, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (export,) = folder.glob("**/profile_export_aiperf.json")
    return json.loads(export.read_text())


@pytest.mark.parametrize("kind", ["chat", "completions"])
def test_a_short_profile(address: str, checkpoint: Path, tmp_path: Path, kind: str) -> None:
    found = profiled(address, checkpoint, tmp_path, "--endpoint-type", kind, "--streaming", "--use-server-token-count")
    assert found["request_count"]["avg"] == REQUESTS
    assert not found.get("error_summary")
    assert found["output_sequence_length"]["avg"] == OUTPUT_TOKENS
    assert found["time_to_first_token"]["avg"] > 0
