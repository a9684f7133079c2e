"""Ranks with GPUs of their own that sum through each other's memory: right to the bit, then timed, by the benchmark itself."""

import subprocess
import sys

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")]


def test_sums_of_two_gpus_are_those_in_rank_order() -> None:
    line = [sys.executable, "-m", "benchmarks.gpu.all_reduce", "--ranks", "2"]
    ended = subprocess.run(line, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "1 x 1024" in ended.stdout
