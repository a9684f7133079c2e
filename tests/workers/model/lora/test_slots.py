"""What a rank keeps of adapters: numbers that are not finite are refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.shared.adapters import make_adapter
from tests.shared.checkpoints import make_checkpoint
from workers.config import LoraRoom
from workers.kernels.lora.weights import LoraWeights
from workers.model.config.architectures import read_config
from workers.model.decoders.native import load_model
from workers.model.lora.files import TENSORS, read_adapter
from workers.model.lora.slots import AdapterSlots
from workers.parallel.in_process import Solo

ROOM = LoraRoom(2, 16)

HUGE = 1e5  # more than float16 has


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "base")


@pytest.mark.parametrize("matrix", ["lora_A", "lora_B"])
@pytest.mark.parametrize(
    ("dtype", "number", "refused"),
    [(torch.float32, float("nan"), True), (torch.bfloat16, float("-inf"), True), (torch.float16, HUGE, True),
     (torch.bfloat16, HUGE, False)],
)  # fmt: skip
def test_numbers_that_are_not_finite_in_the_models_dtype_are_refused(
    matrix: str, dtype: torch.dtype, number: float, refused: bool, checkpoint: Path, tmp_path: Path
) -> None:
    config, folder = read_config(checkpoint), make_adapter(tmp_path, checkpoint, rank=4)
    tensors = load_file(folder / TENSORS)
    name = next(name for name in tensors if f"layers.1.self_attn.k_proj.{matrix}" in name)
    tensors[name][1, 2] = number
    save_file(tensors, folder / TENSORS)
    decoder = load_model(checkpoint, config, Solo(), dtype, torch.device("cpu"), None)
    slots, files = AdapterSlots(decoder, ROOM), read_adapter("a", folder, config, ROOM)
    if refused:
        with pytest.raises(ValueError, match=rf"k_proj of layer 1 .*not finite in {dtype}"):
            slots.fill(1, files)
    else:
        slots.fill(1, files)
    assert all(_finite(layer.qkv.lora) for layer in decoder.layers), "whoever is beside it meets nothing of it"


def _finite(weights: LoraWeights | None) -> bool:
    assert weights is not None
    return all(bool(each.isfinite().all()) for each in (weights.a, weights.b))
