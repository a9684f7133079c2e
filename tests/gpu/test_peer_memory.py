"""Ranks that sum and gather through each other's memory: right to the bit, then timed, by the benchmark itself."""

import subprocess
import sys

import pytest
import torch

from tests.gpu.works import GPU

pytestmark = GPU
TWO = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.mark.parametrize("options", [pytest.param([], marks=TWO), ["--one-device"]], ids=["a GPU each", "one GPU"])
def test_sums_of_two_ranks_are_those_in_rank_order(options: list[str]) -> None:
    line = [sys.executable, "-m", "benchmarks.gpu.all_reduce", "--ranks", "2", *options]
    ended = subprocess.run(line, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "1 x 1024" in ended.stdout
