"""A mixture of experts as a GPU runs it gives tokens of several adapters, and of none, what a CPU gives them."""

import pytest
import torch

from workers.kernels.lora.weights import LoraWeights, Segments
from workers.model.config.mixtures import GPT_OSS, QWEN2_MOE, Gating, MixtureConfig, MixtureFamily
from workers.model.gpu.adapters import DeviceRows
from workers.model.gpu.fused_experts import FusedMixture
from workers.model.layers.experts import Mixture
from workers.parallel.silent import Silent

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, tests/gpu runs on it")

CPU, HIDDEN, WIDTH, SLOTS = torch.device("cpu"), 32, 16, 3


def random_lora(columns: int, *rows: int, experts: int | None = None) -> LoraWeights:
    lora = LoraWeights.empty(SLOTS, 16, columns, rows, torch.float32, CPU, experts)
    for weight in (lora.a, lora.b):
        weight.normal_(std=weight.shape[-1] ** -0.5)
    return lora


@pytest.mark.parametrize(("family", "shared"), [(QWEN2_MOE, WIDTH), (GPT_OSS, 0)])
@pytest.mark.parametrize("ranks", [1, 2])
@torch.inference_mode()
def test_adapters_of_a_mixture(family: MixtureFamily, shared: int, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several ranks the last, with whole experts."""
    for module in ("experts", "linear"):
        monkeypatch.setattr(f"workers.model.layers.{module}.can_pack", lambda *_: False)
    gating = Gating(1.702, 7.0) if family.packed else Gating()
    config = MixtureConfig(family, 4, 2, WIDTH, shared, family.normalized is None, gating, (True,), parallel=ranks > 1)
    shape = config.shard(ranks - 1, ranks)
    mixture = Mixture(config, shape, HIDDEN, Silent(ranks, ranks - 1), torch.float32, CPU)
    experts, router, own = mixture.experts, mixture.router, mixture.shared
    for weight in (router.weight, router.bias, experts.gate_up, experts.down, experts.gate_up_bias, experts.down_bias,
                   *([own.gate_up.weight, own.down.weight] if own is not None else [])):  # fmt: skip
        if isinstance(weight, torch.Tensor):
            weight.normal_(std=2 * weight.shape[-1] ** -0.5)
    mixture.pack()
    experts.adapt(
        random_lora(HIDDEN, *((2 * WIDTH,) if family.packed else (WIDTH, WIDTH)), experts=shape.experts),
        random_lora(WIDTH, HIDDEN, experts=shape.experts),
    )
    router.lora = random_lora(HIDDEN, *((4, 1) if shared else (4,)))
    if own is not None:
        own.gate_up.lora, own.down.lora = random_lora(HIDDEN, shape.shared, shape.shared), random_lora(shape.shared, HIDDEN)
    x, slots = torch.randn(9, HIDDEN), torch.tensor([2, -1, 0, 0, 1, -1, 2, 0, 1])
    expected, plain = mixture(x, adapters=Segments(slots)), mixture(x)
    got = FusedMixture(mixture, torch.zeros(1, dtype=torch.int32))(x, None, adapters=DeviceRows(slots.int(), SLOTS))
    assert torch.allclose(got, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(expected[slots < 0], plain[slots < 0])
    assert not torch.allclose(expected[slots >= 0], plain[slots >= 0])
