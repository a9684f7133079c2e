"""Steps of few rows, whose kernels add their adapters' part themselves, say what separate launches for adapters say."""

from collections.abc import Callable
from functools import partialmethod
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.shared.adapters import make_adapter
from tests.shared.checkpoints import make_checkpoint
from tests.workers.decoding import make_step
from tests.workers.model.gpu.test_fused import DEVICE, Fused
from workers.config import LoraRoom
from workers.kernels.lora.weights import LoraWeights
from workers.kernels.products.tilings import Tiling
from workers.loop.batch import NO_ADAPTER
from workers.model.config.architectures import read_config
from workers.model.gpu.adapters import DeviceRows
from workers.model.layers.linear import Linear, Multiply
from workers.model.lora.files import read_adapter
from workers.model.lora.slots import AdapterSlots
from workers.step import StepInput

Lowered = Callable[[Linear, Tensor, Multiply], tuple[Tensor, Tensor]]

ROOM = LoraRoom(3, 16)
STEPS: list[list[tuple[int, int, list[int]]]] = [
    [(0, 0, [7, 8, 9]), (1, 0, [20, 21]), (2, 0, [4]), (3, 0, [1, 2])],
    [(0, 3, [4]), (1, 2, [5]), (2, 1, [11]), (3, 2, [6])],
]
ADAPTERS = [2, NO_ADAPTER, 0, 0]
"""Of the sequences."""


@pytest.mark.few(1)
@pytest.mark.parametrize("whose", ["behind the weight", "behind it, with biases", "by our own products", "beside a packed one"])
def test_rows_add_their_adapters_part(whose: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if whose != "beside a packed one":
        monkeypatch.setattr("workers.model.layers.linear.can_pack", lambda *_: False)
    elif DEVICE.type == "cuda":
        pytest.skip("only CPUs pack")
    if whose == "by our own products" and DEVICE.type == "cuda":
        pytest.skip("tensor cores round float32; of 16 bits: benchmarks.gpu's lora_32")
    biases = whose == "behind it, with biases"
    architecture = "LlamaForCausalLM" if biases else "Qwen3ForCausalLM"
    path = make_checkpoint(tmp_path / "base", architecture, num_hidden_layers=1, attention_bias=biases)
    config = read_config(path)
    fused, apart = Fused(path, torch.float32), Fused(path, torch.float32)
    slots = [AdapterSlots(each.decoder, ROOM) for each in (fused, apart)]
    if whose == "by our own products":
        monkeypatch.setattr("workers.model.gpu.fused.choose", lambda *_: Tiling(16, 16, 4, 2, 1, tokens=16))
        fused.fused._few_tokens = len(ADAPTERS) * 3
        monkeypatch.setattr(Linear, "lowered", partialmethod(_by_given, Linear.lowered))
    said = []
    for seed, filled in enumerate([(0, 2), (0,)]):  # the second time one is replaced between steps, the other stays
        for slot in filled:
            files = read_adapter("a", make_adapter(tmp_path / f"{seed}-{slot}", path, rank=4, seed=seed + slot), config, ROOM)
            for each in slots:
                each.fill(slot, files)
        for number, chunks in enumerate(STEPS):
            step = make_step(chunks)
            owners = [ADAPTERS[sequence] for sequence, _, tokens in chunks for _ in tokens]
            decodes = number == len(STEPS) - 1
            with monkeypatch.context() as patched:
                patched.setattr(DeviceRows, "add", None)  # no launch of theirs
                got = _logits(fused, step, owners, decodes)
            with monkeypatch.context() as patched:
                patched.setattr(LoraWeights, "rises_in_rows", lambda *_: False)
                expected = _logits(apart, step, owners, decodes)
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 * float(expected.std()))
            said.append(got)
    same = [torch.allclose(now, before) for now, before in zip(said[-1][1:], said[1][1:], strict=True)]
    assert same == [True, False, False], "rows of none stay, those of an adapter that has been replaced do not"


def _by_given(linear: Linear, lowered: Lowered, x: Tensor, multiply: Multiply) -> tuple[Tensor, Tensor]:
    """The library's product is not asked."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("torch.nn.functional.linear", None)
        return lowered(linear, x, multiply)


def _logits(fused: Fused, step: StepInput, owners: list[int], decodes: bool) -> Tensor:
    slots = torch.tensor(owners, dtype=torch.int32, device=DEVICE)
    return fused.logits(step, all_tokens=decodes, adapters=DeviceRows(slots, ROOM.places))
