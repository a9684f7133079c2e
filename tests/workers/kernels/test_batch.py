"""Tokens that a device writes into the host's memory."""

import pytest
import torch

from tests.workers.kernels.devices import DEVICES
from workers.kernels.batch import tell


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("count", [1, 255, 256, 700])
@pytest.mark.parametrize("first", [0, 3], ids=["its start", "within it"])
def test_the_host_is_told_each_token_and_nothing_beyond(device: str, count: int, first: int) -> None:
    tokens = torch.arange(7, 7 + count, dtype=torch.int32, device=device)
    host = torch.full((first + count + 5,), -1, dtype=torch.int32, pin_memory=device == "cuda")
    tell(tokens, host[first:])
    if device == "cuda":
        torch.cuda.synchronize()
    assert host.tolist() == [-1] * first + list(range(7, 7 + count)) + [-1] * 5
