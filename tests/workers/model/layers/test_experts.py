"""Mixtures of experts in the native decoder: what transformers says, whole and shared out by expert or by width."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from benchmarks.models.zoo import VOCAB, make
from tests.shared.checkpoints import generate_reference, load_reference
from tests.workers.decoding import Ranks, make_step
from workers.attention.forms import Form
from workers.config import ReadingConfig
from workers.model.config.architectures import ModelConfig, read_config
from workers.model.config.fields import CheckpointError
from workers.model.config.mixtures import MixtureConfig
from workers.model.decoders.native import load_model
from workers.model.gpu.fused_experts import FusedMixture
from workers.model.layers.experts import Mixture
from workers.model.reading import read_model
from workers.parallel.connect import Solo
from workers.parallel.silent import Silent
from workers.process.footprint import footprint

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CPU = torch.device("cpu")
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("qwen3_moe", {"norm_topk_prob": True, "num_local_experts": 8, "num_experts_per_tok": 3}),
    "qwen3_moe-some-dense": ("qwen3_moe", {"num_hidden_layers": 5, "decoder_sparse_step": 2, "mlp_only_layers": [3]}),
    "mixtral": ("mixtral", {}),
    "qwen2_moe": ("qwen2_moe", {}),
    "qwen2_moe-some-dense": ("qwen2_moe", {"mlp_only_layers": [0], "qkv_bias": False}),
    "gpt_oss": ("gpt_oss", {"num_hidden_layers": 3, "layer_types": None, "swiglu_limit": 2.0}),
}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 555.0}
PROMPT = [(7 * n + 3) % VOCAB for n in range(40)]


@pytest.fixture(autouse=True)
def _as_in_a_step() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(params=VARIANTS, scope="module")
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    kind, fields = VARIANTS[request.param]
    return make(kind, tmp_path_factory.mktemp("checkpoint"), **fields)


@pytest.fixture
def plain_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU experts keep their plain numbers, which the kernels read."""
    if DEVICE.type == "cpu":
        for module in ("experts", "linear"):
            monkeypatch.setattr(f"workers.model.layers.{module}.can_pack", lambda *_: False)


# ---- whole models


@pytest.mark.few(3)
def test_greedy_tokens_equal_transformers(checkpoint: Path) -> None:
    expected = generate_reference(checkpoint, PROMPT, 30)
    assert len(set(expected)) > 8, "the model does not repeat itself"
    for size, parallel in ((1, False), (2, False), (2, True)):
        with Ranks(checkpoint, size, expert_parallel=parallel) as ranks:
            assert ranks.generate(PROMPT, 30) == expected, f"{size} ranks"


def test_logits_equal_transformers(checkpoint: Path) -> None:
    expected = load_reference(checkpoint)(torch.tensor([PROMPT])).logits[0, -1]
    for size, parallel in ((1, False), (2, True)):
        with Ranks(checkpoint, size, expert_parallel=parallel) as ranks:
            torch.testing.assert_close(ranks.logits(make_step([(0, 0, PROMPT)]))[0], expected, rtol=1e-4, atol=1e-4)


def test_float64_does_not_depend_on_the_ranks(checkpoint: Path) -> None:
    step = make_step([(0, 0, PROMPT)])
    with Ranks(checkpoint, 1, torch.float64) as alone:
        expected = alone.logits(step)
    for size, parallel in ((2, True), (4, False)):
        with Ranks(checkpoint, size, torch.float64, expert_parallel=parallel) as shared:
            torch.testing.assert_close(shared.logits(step), expected, rtol=1e-12, atol=1e-12)


def test_old_spelling_of_the_number_of_experts(tmp_path: Path) -> None:
    """As it is in checkpoints that are older than transformers 5."""
    path = make("qwen3_moe", tmp_path)
    text = (path / "config.json").read_text()
    modern = read_config(path)
    (path / "config.json").write_text(text.replace("num_local_experts", "num_experts"))
    assert read_config(path) == modern


# ---- as a GPU runs them


@pytest.mark.few
@pytest.mark.usefixtures("plain_experts")
@pytest.mark.parametrize("tokens", [1, 11])
def test_the_fused_mixture_equals_the_plain_one(checkpoint: Path, tokens: int) -> None:
    pytest.importorskip("triton")
    decoder = load_model(checkpoint, read_config(checkpoint), Solo(), torch.float32, DEVICE, None)
    mixture = next(layer.mlp for layer in decoder.layers if isinstance(layer.mlp, Mixture))
    plain = next(layer.mlp for layer in _on_cpu(checkpoint) if isinstance(layer.mlp, Mixture))
    x = torch.randn(tokens + 2, 64)
    expected = plain(x[:tokens])
    fused = FusedMixture(mixture, torch.zeros(64, dtype=torch.int32, device=DEVICE))
    live = torch.arange(tokens + 2, device=DEVICE) < tokens
    got = fused(x.to(DEVICE), live)[:tokens].cpu()
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 * float(expected.std()))
    assert torch.equal(mixture.load.cpu(), plain.load)
    assert int(plain.load.sum()) == tokens * mixture.config.per_token


@pytest.mark.few(3)
@pytest.mark.usefixtures("plain_experts")
@pytest.mark.parametrize("tokens", [1, 3, 11])
def test_it_adds_the_experts_of_the_norm(checkpoint: Path, tokens: int) -> None:
    """By one way up to four tokens, by another above."""
    pytest.importorskip("triton")
    decoder = load_model(checkpoint, read_config(checkpoint), Solo(), torch.float32, DEVICE, None)
    mixture = next(layer.mlp for layer in decoder.layers if isinstance(layer.mlp, Mixture))
    plain = next(layer for layer in _on_cpu(checkpoint) if isinstance(layer.mlp, Mixture))
    hidden = 3 * torch.randn(tokens + 1, 64)
    expected = plain.mlp(plain.mlp_norm(hidden[:tokens]))
    fused = FusedMixture(mixture, torch.zeros(64, dtype=torch.int32, device=DEVICE))
    out = hidden.clone().to(DEVICE)
    live = torch.arange(tokens + 1, device=DEVICE) < tokens
    fused.add_to(out, plain.mlp_norm.weight.to(DEVICE), decoder.config.rms_eps, live)
    torch.testing.assert_close((out.cpu() - hidden)[:tokens], expected, rtol=0, atol=1e-4 * float(expected.std()))
    if mixture.shared is None:
        assert torch.equal(out[tokens].cpu(), hidden[tokens])
    assert torch.equal(mixture.load.cpu(), plain.mlp.load)


def _on_cpu(path: Path) -> Sequence[Any]:
    return load_model(path, read_config(path), Solo(), torch.float32, CPU, None).layers


@pytest.mark.usefixtures("plain_experts")
@pytest.mark.parametrize("kind", ["qwen2_moe", "gpt_oss"])
def test_ranks_of_a_fused_mixture_add_up(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    path = make(kind, tmp_path)
    x = torch.randn(5, 64)
    expected = next(layer.mlp for layer in _on_cpu(path) if isinstance(layer.mlp, Mixture))(x)
    for parallel in (False, True):
        config = read_model(path, ReadingConfig(enable_expert_parallel=parallel))
        assert isinstance(config, ModelConfig)
        shares = []
        for rank in range(2):  # one after another: the interpreter is not for several threads
            decoder = load_model(path, config, Silent(2, rank), torch.float32, DEVICE, None)
            mixture = next(layer.mlp for layer in decoder.layers if isinstance(layer.mlp, Mixture))
            counters = torch.zeros(64, dtype=torch.int32, device=DEVICE)
            shares.append(FusedMixture(mixture, counters)(x.to(DEVICE), None).cpu())
        torch.testing.assert_close(sum(shares), expected, rtol=0, atol=1e-4 * float(expected.std()))


# ---- what is known before weights are read


def test_each_rank_holds_its_share(tmp_path: Path) -> None:
    path = make("qwen3_moe", tmp_path)
    experts = 2 * 6 * 3 * 48 * 64 * 4  # layers, experts, matrices
    alone = footprint(read_model(path), 1, torch.float32, 16).weight_bytes
    for parallel in (False, True):
        shared = footprint(read_model(path, ReadingConfig(enable_expert_parallel=parallel)), 2, torch.float32, 16).weight_bytes
        assert experts / 2 <= alone - shared < 0.75 * alone


PARALLEL = ReadingConfig(enable_expert_parallel=True)


def read(tmp_path: Path, kind: str = "qwen3_moe", **fields: Any) -> MixtureConfig:
    mixture = read_config(make(kind, tmp_path, **fields)).mixture
    assert mixture is not None
    return mixture


def test_what_ranks_can_share(tmp_path: Path) -> None:
    """By width what divides the experts' width, by expert what divides their number; a layer without experts by its own."""
    path = make("qwen3_moe", tmp_path, num_local_experts=3, moe_intermediate_size=44, intermediate_size=7)
    read_config(path).require(4)
    with pytest.raises(CheckpointError, match=r"2 does not divide the model's 3 experts: choose one of \[1\]"):
        read_model(path, PARALLEL).require(2)
    path = make("qwen3_moe", tmp_path / "odd", num_local_experts=4, moe_intermediate_size=3)
    with pytest.raises(CheckpointError, match=r"2 does not divide the experts' intermediate size 3: choose one of \[1\]"):
        read_config(path).require(2)
    read_model(path, PARALLEL).require(2)
    path = make("qwen3_moe", tmp_path / "dense", intermediate_size=7, mlp_only_layers=[0])
    with pytest.raises(CheckpointError, match="2 does not divide the intermediate size 7"):
        read_config(path).require(2)
    path = make("qwen2_moe", tmp_path / "shared", shared_expert_intermediate_size=9)
    with pytest.raises(CheckpointError, match="2 does not divide the shared expert's intermediate size 9"):
        read_config(path).require(2)


@pytest.mark.parametrize(
    ("kind", "windows"),
    [("qwen2_moe", [7, None, None]), ("qwen3_moe", [7, 7, 7]), ("mixtral", [7, 7, 7]), ("gpt_oss", [7, None, 7])],
)
def test_windows_are_those_of_transformers(kind: str, windows: list[int | None], tmp_path: Path) -> None:
    """Of a `config.json` that names no layers; Mixtral and gpt-oss ask no switch."""
    path = make(kind, tmp_path, num_hidden_layers=3, layer_types=None)
    said = json.loads((path / "config.json").read_text())
    said.pop("layer_types", None)
    slides = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2}
    (path / "config.json").write_text(json.dumps(said | slides))
    assert [form.window for form in read_config(path).forms] == windows
    config = transformers.AutoConfig.from_pretrained(path)
    named = getattr(config, "layer_types", None) or ["sliding_attention"] * 3
    assert [config.sliding_window if name == "sliding_attention" else None for name in named] == windows


@pytest.mark.parametrize("said", [{}, {"rope_theta": 777.0}, {"rope_parameters": None}, {"rope_scaling": LINEAR}], ids=str)
def test_what_config_json_of_gpt_oss_leaves_out(said: dict[str, Any], tmp_path: Path) -> None:
    """Is as transformers' class has it: YaRN, biases, a window of its own."""
    path = make("gpt_oss", tmp_path)
    told = json.loads((path / "config.json").read_text())
    for name in ("rope_parameters", "attention_bias", "rms_norm_eps", "sliding_window", "head_dim", "layer_types"):
        del told[name]
    (path / "config.json").write_text(json.dumps(told | said))
    config, ours = transformers.AutoConfig.from_pretrained(path), read_config(path)
    rope = config.rope_parameters
    assert (ours.rope.kind, ours.rope.theta, ours.rope.factor) == (rope["rope_type"], rope["rope_theta"], rope["factor"])
    assert ours.rope.truncate == rope.get("truncate", True)
    assert (ours.attention_bias, ours.o_bias) == (config.attention_bias, config.attention_bias) == (True, True)
    assert (ours.head_dim, ours.rms_eps) == (config.head_dim, config.rms_norm_eps)
    assert ours.forms == (Form(ours.head_dim**-0.5, config.sliding_window, sinks=True), Form(ours.head_dim**-0.5, sinks=True))


def test_refusals(tmp_path: Path) -> None:
    path = make("qwen3_moe", tmp_path / "experts")
    text = (path / "config.json").read_text()
    (path / "config.json").write_text(text.replace('"num_experts_per_tok": 2', '"num_experts_per_tok": 9'))
    with pytest.raises(CheckpointError, match="num_experts_per_tok=9 is above num_local_experts=6"):
        read_config(path)
    (path / "config.json").write_text(text.replace('"mlp_only_layers": []', '"mlp_only_layers": 1'))
    with pytest.raises(CheckpointError, match="mlp_only_layers must be a list, found 1"):
        read_config(path)
    with pytest.raises(CheckpointError, match="enable_expert_parallel: Qwen3ForCausalLM has no experts: leave it out"):
        read_model(make("qwen3", tmp_path / "dense"), PARALLEL)
    with pytest.raises(CheckpointError, match=r"enable_expert_parallel: .* is served by transformers' class"):
        read_model(make("olmoe", tmp_path / "olmoe"), PARALLEL)
