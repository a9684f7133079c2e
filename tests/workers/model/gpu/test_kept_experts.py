"""Experts that a GPU keeps in fewer bits stand for the numbers that a CPU makes of them, whoever holds which part."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.models.zoo import make
from tests.shared.quantising import AWQ, FORMATS, FP8, MXFP4, Format, awq, fp8, is_quantised, is_stack, quantise
from workers.config import ReadingConfig
from workers.kernels.experts.stacked import Stacked
from workers.model.config.architectures import ModelConfig
from workers.model.decoders.native import Decoder, load_model
from workers.model.gpu.fused_experts import FusedMixture
from workers.model.layers.experts import Experts, Mixture
from workers.model.reading import read_model
from workers.parallel.silent import Silent
from workers.process.footprint import footprint

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CPU = torch.device("cpu")


def is_linear(name: str) -> bool:
    return is_quantised(name) or ".experts." in name


SMALL = {"num_hidden_layers": 1, "vocab_size": 61, "num_local_experts": 4}
OSS = {"layer_types": ["sliding_attention"]}
BLOCKS = Format(FP8 | {"weight_block_size": [32, 32]}, fp8((32, 32), "weight_scale_inv"))
CASES: dict[str, tuple[str, dict[str, Any], Format | None, Callable[[str], bool]]] = {
    "mxfp4": ("gpt_oss", OSS | {"intermediate_size": 64}, MXFP4, is_stack),
    "mxfp4-cut": ("gpt_oss", OSS | {"intermediate_size": 32}, MXFP4, is_stack),
    "fp8": ("qwen3_moe", {"moe_intermediate_size": 16}, FORMATS["fp8-channel"], is_linear),
    "fp8-blocks": ("mixtral", {"intermediate_size": 64}, BLOCKS, is_linear),
    "awq": ("mixtral", {"intermediate_size": 64}, Format(AWQ | {"group_size": 32}, awq(32)), is_linear),
    "made": ("qwen3_moe", {"moe_intermediate_size": 32}, None, is_linear),
    "made-stacks": ("gpt_oss", OSS | {"intermediate_size": 32}, None, is_stack),
}
CUT = ("mxfp4-cut", "fp8", "awq")
"""Of which a rank of two has a part of down that no kernel takes, and has it plain."""


@pytest.fixture(autouse=True)
def _as_in_a_step(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for module in ("experts", "linear"):
        monkeypatch.setattr(f"workers.model.layers.{module}.can_pack", lambda *_: False)
    with torch.inference_mode():
        yield


@pytest.fixture(params=CASES, scope="module")
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    kind, fields, chosen, wanted = CASES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    plain = make(kind, folder / "plain", **SMALL | fields)
    if chosen is None:
        return request.param, plain
    quantise(plain, folder / "quantised", chosen, wanted)
    return request.param, folder / "quantised"


class Loader:
    def __init__(self, name: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._name, self._path, self._patch = name, path, monkeypatch

    def config(self, parallel: bool = False) -> ModelConfig:
        how = ReadingConfig(enable_expert_parallel=parallel, quantization="fp8" if self._name.startswith("made") else "auto")
        config = read_model(self._path, how)
        assert isinstance(config, ModelConfig)
        return config

    def decoder(self, keeps: bool, rank: int = 0, size: int = 1, parallel: bool = False) -> Decoder:
        self._patch.setattr("workers.model.decoders.native.keeps_fewer_bits", lambda _: keeps)
        device = DEVICE if keeps else CPU
        return load_model(self._path, self.config(parallel), Silent(size, rank), torch.float32, device, None)

    def mixture(self, *asked: Any) -> Mixture:
        found = self.decoder(*asked).layers[0].mlp
        assert isinstance(found, Mixture)
        return found


def numbers(experts: Experts, name: str) -> Tensor:
    weight: Tensor | Stacked = getattr(experts, name)
    if isinstance(weight, Tensor):
        return weight.cpu()
    return torch.stack([weight.numbers(expert, torch.float32) for expert in range(weight.experts)]).cpu()


@pytest.mark.parametrize(("rank", "size", "parallel"), [(0, 1, False), (1, 2, False), (1, 2, True)])
def test_the_same_numbers(
    rank: int, size: int, parallel: bool, case: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, path = case
    load = Loader(name, path, monkeypatch)
    kept, plain = (load.mixture(keeps, rank, size, parallel).experts for keeps in (True, False))
    for each in ("gate_up", "down"):
        cut = size == 2 and not parallel and name in CUT and each == "down"
        assert isinstance(getattr(kept, each), Tensor) == cut
        assert torch.equal(numbers(kept, each), numbers(plain, each))


def test_a_plan_knows_the_bytes(case: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    load = Loader(*case, monkeypatch)
    for keeps in (True, False):
        decoder = load.decoder(keeps)
        found = sum(piece.target.nbytes for part in decoder.parts() for piece in part.pieces())
        planned = footprint(load.config(), 1, torch.float32, 16, keeps=keeps)
        assert planned.weight_bytes == found
        assert planned.kept.endswith("as they are" if keeps else "plain numbers")


@pytest.mark.few
@pytest.mark.parametrize("case", ["mxfp4", "mxfp4-cut", "fp8-blocks"], indirect=True)
@pytest.mark.parametrize("parallel", [False, True])
def test_ranks_of_a_mixture_add_up(parallel: bool, case: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    load = Loader(*case, monkeypatch)
    x = torch.randn(3, 64)
    expected = load.mixture(False)(x)
    counters = torch.zeros(64, dtype=torch.int32, device=DEVICE)
    shares = [FusedMixture(load.mixture(True, rank, 2, parallel), counters)(x.to(DEVICE), None).cpu() for rank in range(2)]
    torch.testing.assert_close(sum(shares), expected, rtol=0, atol=1e-4 * float(expected.std()))


@pytest.mark.parametrize("case", ["mxfp4", "fp8", "awq"], indirect=True)
def test_it_adds_the_experts_of_the_norm(case: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    load = Loader(*case, monkeypatch)
    plain = load.decoder(False)
    layer, fused = plain.layers[0], FusedMixture(load.mixture(True), torch.zeros(64, dtype=torch.int32, device=DEVICE))
    assert isinstance(layer.mlp, Mixture)
    hidden = 3 * torch.randn(1, 64)
    expected = layer.mlp(layer.mlp_norm(hidden))
    out = hidden.clone().to(DEVICE)
    fused.add_to(out, layer.mlp_norm.weight.to(DEVICE), plain.config.rms_eps, None)
    torch.testing.assert_close(out.cpu() - hidden, expected, rtol=0, atol=1e-4 * float(expected.std()))
