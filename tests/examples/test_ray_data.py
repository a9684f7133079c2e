"""The pipeline as a user starts it, on a Ray cluster that runs."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from manta import LLM
from tests.shared.ray_heads import ray_head

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
ROWS: list[dict[str, Any]] = [
    {"id": 0, "prompt": "def add(a, b):", "max_tokens": 12, "temperature": 0.0},
    {"id": 1, "prompt": "class Stack:", "max_tokens": 12, "temperature": 0.0},
    {"id": 2, "prompt": "import os", "max_tokens": -1, "temperature": 0.0},
    {"id": 3, "prompt": "class Stack:", "max_tokens": 8, "temperature": 0.9, "seed": 7},
]


def test_rows_leave_with_their_completions(tmp_path: Path) -> None:
    source, target = tmp_path / "prompts.jsonl", tmp_path / "completions"
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    command = [sys.executable, str(ROOT / "examples" / "ray_data.py"), str(source), str(target), "--groups", "2"]
    with ray_head(tmp_path, 5, "--include-dashboard=false") as address:
        done = subprocess.run(command, env=os.environ | {"RAY_ADDRESS": address}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written = [json.loads(line) for file in target.glob("*.json") for line in file.read_text().splitlines()]
    rows = sorted(written, key=lambda row: int(row["id"]))
    assert [{name: row[name] for name in given} for row, given in zip(rows, ROWS, strict=True)] == ROWS
    assert "max_tokens" in rows[2]["error"]
    assert rows[2]["completion"] is None
    with LLM(local=True, kv_memory="64MiB") as llm:
        valid = [{name: row[name] for name in row if name != "id"} for row in ROWS if row["max_tokens"] > 0]
        here = llm.generate(valid, progress=False)
    for row, output in zip([rows[0], rows[1], rows[3]], here, strict=True):
        assert (row["completion"], row["finish_reason"]) == (output.outputs[0].text, output.outputs[0].finish_reason)
        assert row["completion"]
        assert row["error"] is None
