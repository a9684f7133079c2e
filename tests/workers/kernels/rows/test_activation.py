"""SwiGLU's product against float64."""

import pytest
import torch
import torch.nn.functional as F

from tests.workers.kernels.devices import DEVICES, DTYPES, apart, close, poisoned
from workers.kernels.rows.activation import silu_mul


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), [(1, 64), (3, 1100), (17, 90)])
def test_silu_mul(device: str, dtype: torch.dtype, tokens: int, width: int) -> None:
    gate_up = 4 * torch.randn(tokens, 2 * width, device=device).to(dtype)
    gate, up = gate_up.double().chunk(2, -1)
    close(silu_mul(gate_up), F.silu(gate) * up, dtype)
    out = apart(poisoned(tokens, width, dtype=dtype, device=device))
    assert silu_mul(apart(gate_up), out) is out
    close(out, F.silu(gate) * up, dtype)


@pytest.mark.parametrize("device", DEVICES)
def test_gates_far_from_zero(device: str) -> None:
    """Where exp(-gate) is infinite the gate is zero, not NaN."""
    gate_up = torch.tensor([[-1e4, 1e4, -200.0, 0.0, 2.0, 3.0, 4.0, 5.0]], device=device)
    assert silu_mul(gate_up).tolist() == [[0.0, 3e4, 0.0, 0.0]]
