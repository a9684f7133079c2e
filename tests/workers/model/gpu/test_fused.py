"""The decoder with its fused kernels says what the plain one says."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.models.zoo import make
from kvcache.layout import BlockLayout
from kvcache.pool import KVPool
from tests.shared.checkpoints import make_checkpoint
from tests.shared.quantising import FORMATS, FP8, Format, fp8, quantise
from tests.workers.decoding import BLOCK_SIZE, BLOCKS_EACH, SEQUENCES, make_step
from workers.attention.cpu.plain import CpuAttention
from workers.attention.select import select_backend
from workers.kernels.heads.turn import HeadTurn
from workers.kernels.products.tilings import Tiling
from workers.kernels.reduced import Reduced, Rounded
from workers.kernels.rows.rounding import rounded
from workers.model.config.architectures import read_config
from workers.model.decoders.native import Decoder, load_model
from workers.model.gpu.adapters import DeviceRows
from workers.model.gpu.fused import FusedDecoder
from workers.model.layers.linear import reduced_product
from workers.parallel.connect import Solo
from workers.step import StepInput

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 32}),
    "qwen3-biases": ("Qwen3ForCausalLM", {"attention_bias": True, "tied": True}),
    "llama-biases": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "qwen2-odd": ("Qwen2ForCausalLM", {"hidden_size": 72, "head_dim": 18, "num_attention_heads": 4}),
}
STEPS = [
    [(0, 0, [7, 8, 9]), (1, 0, list(range(20, 37)))],
    [(0, 3, [4]), (1, 17, [5]), (2, 0, [111, 112]), (3, 0, [5] * 3)],
    [(0, 4, [9]), (1, 18, [3]), (2, 2, [1]), (3, 3, [2])],
    [(3, 4, [2])],
]


@dataclass(frozen=True)
class Plain:
    """Attention that takes queries which are turned."""

    attend: Callable[[int, Tensor, Tensor | None], Tensor]
    turns: bool = False

    def __call__(self, layer: int, query: Tensor, turn: HeadTurn | None = None, sinks: Tensor | None = None) -> Tensor:
        assert turn is None
        return self.attend(layer, query, sinks)


class Fused:
    """The fused decoder over a pool, with the plain backend to attend."""

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        config = read_config(path)
        shape = config.shard(0, 1)
        layout = BlockLayout(BLOCK_SIZE, shape.layers, shape.kv_heads, shape.head_dim, str(dtype).removeprefix("torch."))
        self.pool = KVPool(layout, SEQUENCES * BLOCKS_EACH, DEVICE)
        self.plain = KVPool(layout, SEQUENCES * BLOCKS_EACH, "cpu")
        self.attention = select_backend("cpu", pool=self.plain, heads=shape.heads, forms=config.forms, native=False)
        self.decoder: Decoder = load_model(path, config, Solo(), dtype, DEVICE, None)
        self.fused = FusedDecoder(self.decoder, self.pool)

    def logits(self, step: StepInput, *, all_tokens: bool = False, adapters: DeviceRows | None = None) -> Tensor:
        plan = self.attention.plan(step)

        def attend(layer: int, query: Tensor, sinks: Tensor | None) -> Tensor:
            sinks = sinks.cpu() if sinks is not None else None
            key, value = (view.flatten(0, 1)[step.slots].cpu() for view in (self.pool.keys(layer), self.pool.values(layer)))
            return self.attention.attend(layer, query.cpu(), key, value, step, plan, sinks).to(DEVICE)

        tokens, positions, slots, rows = (
            getattr(step, name).int().to(DEVICE) for name in ("tokens", "positions", "slots", "sample_at")
        )
        return self.fused.logits(tokens, positions, slots, Plain(attend), None if all_tokens else rows, adapters).cpu()


FEW: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "gpt_oss": {"layer_types": ["sliding_attention"]},
}


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("family", "whose"), [("llama", "ours"), ("llama", "the library's"), ("llama", "tiles"), ("gpt_oss", "ours")]
)
def test_steps_of_few_tokens_choose_whose_product_each_is(
    family: str, whose: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if whose == "tiles" and DEVICE.type == "cuda":
        pytest.skip("tensor cores round float32; of 16 bits: tests/gpu/test_graphs_equal_eager.py")
    if whose != "ours":
        tiling = Tiling(16, 16, 4, 2, 1, tokens=16) if whose == "tiles" else None  # which leave norms to one another
        monkeypatch.setattr("workers.model.gpu.fused.choose", lambda *_: tiling)
    path = make(family, tmp_path, num_hidden_layers=1, vocab_size=37, hidden_size=32, intermediate_size=48, **FEW[family])
    if DEVICE.type == "cpu":
        for module in ("linear", "experts"):
            monkeypatch.setattr(f"workers.model.layers.{module}.can_pack", lambda *_: False)
    few, many = Fused(path, torch.float32), Fused(path, torch.float32)
    if DEVICE.type == "cpu":
        few.fused._few_tokens = SEQUENCES
    many.fused._few_tokens = 0
    for chunks in [[(0, 0, [9]), (1, 0, [3]), (2, 0, [1]), (3, 0, [2])], [(3, 1, [2])]]:  # all that is attended to is written
        step = make_step(chunks)
        decodes = len(chunks) == step.tokens.shape[0]
        got, expected = few.logits(step, all_tokens=decodes), many.logits(step, all_tokens=decodes)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 * float(expected.std()))


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("family", "fields", "computed"),
    [
        ("llama", {}, [0, 5]),
        ("gpt_oss", {"layer_types": ["sliding_attention", "full_attention"] * 3}, [0, 1, 5]),  # each before the other
        ("gpt_oss", {"layer_types": ["full_attention"] * 4 + ["sliding_attention"] * 2}, [0, 3, 4, 5]),
    ],
)
def test_layers_of_one_kind_are_represented_by_one(
    family: str, fields: dict[str, Any], computed: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("linear", "experts"):
        monkeypatch.setattr(f"workers.model.layers.{module}.can_pack", lambda *_: False)
    path = make(family, tmp_path, num_hidden_layers=6, vocab_size=37, hidden_size=32, intermediate_size=48, **fields)
    fused, step, attended = Fused(path, torch.float32), make_step([(0, 0, [7, 8, 9])]), []
    attend = fused.attention.attend

    def counted(layer: int, *rest: Any) -> Tensor:
        attended.append(layer)
        return attend(layer, *rest)

    monkeypatch.setattr(fused.attention, "attend", counted)
    expected = fused.logits(step)
    assert attended == [*range(6)]
    attended.clear()
    with fused.fused.representatives():
        fused.logits(step)
    assert attended == computed
    assert torch.equal(fused.logits(step), expected), "all of them again"


@pytest.mark.few(1)
@pytest.mark.parametrize(("variant", "dtype"), [*((name, torch.float32) for name in VARIANTS), ("qwen3", torch.bfloat16)])
def test_it_equals_the_plain_decoder(variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    architecture, fields = VARIANTS[variant]
    path = make_checkpoint(tmp_path, architecture, vocab_size=113, **fields)
    config = read_config(path)
    fused = Fused(path, dtype)
    plain_pool = KVPool(fused.plain.layout, SEQUENCES * BLOCKS_EACH, "cpu")
    plain = load_model(path, config, Solo(), dtype, torch.device("cpu"), CpuAttention(plain_pool, config.heads))
    for chunks in STEPS:
        step = make_step(chunks)
        expected, got = plain.forward(step).float(), fused.logits(step).float()
        share = 1e-4 if dtype == torch.float32 else 0.25
        torch.testing.assert_close(got, expected, rtol=0, atol=share * float(expected.std()))


def test_a_step_that_wants_no_logits_writes_all_its_keys_and_values(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "Qwen3ForCausalLM")
    fused, wanted = Fused(path, torch.float32), Fused(path, torch.float32)
    step = make_step([(1, 0, list(range(20, 37)))])
    wanted.logits(step)
    step.sample_at.resize_(0)
    assert fused.logits(step).shape == (0, 199)
    written = step.slots
    for layer in range(2):
        for view in (KVPool.keys, KVPool.values):
            got, expected = (view(each.pool, layer).flatten(0, 1)[written] for each in (fused, wanted))
            torch.testing.assert_close(got, expected)


@pytest.mark.few(1)
@pytest.mark.skipif(DEVICE.type == "cuda", reason="there the library says what it takes")
@pytest.mark.parametrize(
    "stored",
    [FORMATS["fp8-channel"], Format(FP8 | {"weight_block_size": [128, 128]}, fp8((128, 128), "weight_scale_inv"))],
    ids=["rows", "blocks"],
)
def test_norms_and_swiglu_round_what_products_would(stored: Format, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = make_checkpoint(
        tmp_path / "plain", "LlamaForCausalLM", attention_bias=True, mlp_bias=True, hidden_size=256, intermediate_size=512,
        head_dim=64,
    )  # fmt: skip
    quantise(plain, tmp_path / "fp8", stored)
    monkeypatch.setattr("workers.model.decoders.native.keeps_fewer_bits", lambda _: True)
    came: list[bool] = []

    def product(x: Tensor | Rounded, weight: Reduced, bias: Tensor | None) -> Tensor:
        came.append(isinstance(x, Rounded))
        return reduced_product(rounded(x, weight.group) if isinstance(x, Tensor) else x, weight, bias)

    monkeypatch.setattr("workers.model.layers.linear.reduced_product", product)
    logits = {}
    for whose in ("norm's", "product's"):
        monkeypatch.setattr("workers.model.gpu.fused.rounds", lambda *_, ours=whose == "norm's": ours)
        fused, came = Fused(tmp_path / "fp8", torch.float32), []
        logits[whose] = torch.cat([fused.logits(make_step(chunks)) for chunks in STEPS])
        assert came == ([False, False, True, True, True, False, True, True] if whose == "norm's" else [False] * 8) * len(STEPS)
    torch.testing.assert_close(logits["norm's"], logits["product's"], rtol=0, atol=1e-4 * float(logits["norm's"].std()))
