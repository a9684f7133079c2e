"""Weights reach transformers' classes under whatever names and in whatever shapes they are stored, each rank its own part."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.core_model_loading import Split, Transpose, WeightConverter

from benchmarks.models.zoo import MORE, SIZES, ZOO, make, sharpen
from tests.shared.checkpoints import generate_reference, load_reference
from tests.workers.decoding import Ranks as NativeRanks
from tests.workers.decoding import make_step
from tests.workers.model.transformers.ranks import Ranks
from workers.model.config.fields import CheckpointError
from workers.model.decoders.transformers import loading
from workers.model.decoders.transformers.decoder import load_transformers
from workers.model.transformers.config import read_transformers
from workers.parallel.in_process import Solo

PROMPT = [(7 * n + 3) % 199 for n in range(40)]
STEP = make_step([(0, 0, PROMPT)])


def changed(path: Path, **tensors: Tensor | None) -> Path:
    """The checkpoint with these tensors (with __ for a dot), or without them."""
    stored = load_file(path / "model.safetensors")
    for name, tensor in tensors.items():
        stored.pop(name.replace("__", "."), None)
        if tensor is not None:
            stored[name.replace("__", ".")] = tensor
    save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
    return path


def logits(path: Path, size: int = 1) -> Tensor:
    with Ranks(path, size) as ranks:
        return ranks.logits(STEP)


@torch.inference_mode()
def expected(path: Path) -> Tensor:
    found: Tensor = load_reference(path)(torch.tensor([PROMPT])).logits[:, -1]
    return found


@pytest.mark.parametrize("kind", ["mixtral", "llama4_text", "phi3", "gemma2"])
def test_a_rank_reads_its_share(kind: str, tmp_path: Path) -> None:
    """Of two ranks each about half; nothing twice but what every rank must have."""
    path = make(kind, tmp_path / kind)
    totals = []
    for size in (1, 2):
        with Ranks(path, size, progress=lambda _, total: totals.append(total)):
            pass
    alone, shared = totals[0], totals[-1]
    assert alone == sum(tensor.nbytes for tensor in load_file(path / "model.safetensors").values())
    assert 0.5 * alone <= shared < 0.55 * alone


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("both", [True, False], ids=["equal", "different"])
def test_a_tied_pair_that_is_stored_twice(both: bool, size: int, tmp_path: Path) -> None:
    """One table where they are equal, two where they are not, as in transformers."""
    path = make("gemma", tmp_path / "gemma")
    table = load_file(path / "model.safetensors")["model.embed_tokens.weight"]
    changed(path, lm_head__weight=table.clone() if both else table.flip(0))
    torch.testing.assert_close(logits(path, size), expected(path), rtol=1e-4, atol=1e-4)


def test_a_tied_pair_of_which_the_head_is_stored(tmp_path: Path) -> None:
    path = make("gemma", tmp_path / "gemma")
    wanted = expected(path)
    table = load_file(path / "model.safetensors")["model.embed_tokens.weight"]
    torch.testing.assert_close(
        logits(changed(path, lm_head__weight=table, model__embed_tokens__weight=None), 2), wanted, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"model__layers__1__self_attn__o_proj__weight": None}, "tensor model.layers.1.self_attn.o_proj.weight is missing"),
        ({"model__layers__0__mlp__scale": torch.ones(3)}, "does not read: model.layers.0.mlp.scale"),
        ({"model__norm__weight": torch.ones(65)}, "model.norm.weight .* has shape .65. but config.json asks for .64."),
        ({"model__layers__0__mlp__experts__3__w1__weight": None}, "the checkpoint has 3 experts for .*gate_up_proj"),
        ({"model__norm__weight": torch.ones(64, dtype=torch.int8)}, "model.norm.weight .* is stored as I8"),
    ],
)
def test_what_does_not_fit_is_refused(tensors: dict[str, Tensor | None], reason: str, tmp_path: Path) -> None:
    path = make("mixtral", tmp_path / "mixtral")
    # mixtral's experts are stored under another name than the class has for their layer
    tensors = {name if "experts" not in name else name.replace("mlp", "block_sparse_moe"): t for name, t in tensors.items()}
    with pytest.raises(CheckpointError, match=reason):
        logits(changed(path, **tensors))


def newer(name: str) -> str:
    if "language_model" in name:
        return name.replace("language_model.model.", "model.language_model.")
    return f"model.{name}"


VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
          "patch_size": 14}  # fmt: skip


def assert_served_as(model: Any, path: Path) -> None:
    """What the model's text part says to a prompt is what one rank says that has read `path`, and two."""
    with torch.inference_mode():
        wanted = model.eval()(torch.tensor([PROMPT])).logits[:, -1]
    for size in (1, 2):
        torch.testing.assert_close(logits(path, size), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("old", [True, False], ids=["old", "new"])
def test_the_text_part_of_a_checkpoint_that_also_sees(old: bool, tmp_path: Path) -> None:
    """As text, whatever transformers calls its parts: what sees is not read."""
    text = SIZES | ZOO["gemma3_text"] | {"tie_word_embeddings": True}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
              "patch_size": 14}  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_id=198, boi_token_id=197, eoi_token_id=196
    )
    model = transformers.Gemma3ForConditionalGeneration(config)
    sharpen(model.model.language_model)
    path = tmp_path / "gemma3"
    model.save_pretrained(path)
    stored = load_file(path / "model.safetensors")
    assert any("vision" in name for name in stored)
    if not old:
        stored = {newer(name): tensor for name, tensor in stored.items()}
        save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
    read = read_transformers(path)
    assert (read.architecture, read.vocab_size) == ("Gemma3ForCausalLM", 199)
    assert read.remarks(1) == ["the text part of gemma3 is served: it sees and hears nothing"]
    assert_served_as(model, path)


def test_a_text_part_that_is_called_text_model(tmp_path: Path) -> None:
    text = SIZES | {"model_type": "llama"}
    config = transformers.Idefics3Config(text_config=text, vision_config=VISION, tie_word_embeddings=False, image_token_id=198)
    model = transformers.Idefics3ForConditionalGeneration(config)
    sharpen(model.model.text_model)
    path = tmp_path / "idefics3"
    model.save_pretrained(path)
    assert "model.text_model.embed_tokens.weight" in load_file(path / "model.safetensors")
    assert_served_as(model, path)


def test_the_names_that_the_whole_checkpoint_has_for_its_text_part(tmp_path: Path) -> None:
    """Of the experts of MiniMax M3 transformers knows the stored names by the model type of the whole alone."""
    text = SIZES | MORE["minimax_m3_vl_text"] | {"model_type": "minimax_m3_vl_text"}
    config = transformers.CONFIG_MAPPING["minimax_m3_vl"](text_config=text, vision_config=VISION, tie_word_embeddings=False)
    model = transformers.AutoModelForImageTextToText.from_config(config, attn_implementation="eager")
    sharpen(model.model.language_model)
    path = tmp_path / "minimax"
    model.save_pretrained(path)
    names = load_file(path / "model.safetensors")
    assert "language_model.model.layers.1.block_sparse_moe.experts.0.w1.weight" in names
    assert_served_as(model, path)


@pytest.mark.parametrize("size", [1, 2])
def test_any_conversion_of_transformers(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors that a converter splits, or turns, are converted whole, and the rank's part is kept."""
    path = make("olmo2", tmp_path / "olmo2")
    wanted = expected(path)
    stored = load_file(path / "model.safetensors")
    for layer in range(2):
        name = f"model.layers.{layer}.mlp"
        stored[f"{name}.gate_and_up"] = torch.cat([stored.pop(f"{name}.{half}_proj.weight") for half in ("gate", "up")])
        stored[f"{name}.down_turned"] = stored.pop(f"{name}.down_proj.weight").T.contiguous()
    save_file(stored, path / "model.safetensors", metadata={"format": "pt"})

    def conversions(_: Any) -> list[WeightConverter]:
        return [
            WeightConverter("mlp.gate_and_up", ["mlp.gate_proj.weight", "mlp.up_proj.weight"], [Split(dim=0)]),
            WeightConverter("mlp.down_turned", "mlp.down_proj.weight", [Transpose(0, 1, check_dims=True)]),
        ]

    monkeypatch.setattr(loading, "get_model_conversion_mapping", conversions)
    torch.testing.assert_close(logits(path, size), wanted, rtol=1e-4, atol=1e-4)


def test_odd_shares(tmp_path: Path) -> None:
    """Two ranks with 49 of 98 columns each."""
    path = make("olmo2", tmp_path / "olmo2", intermediate_size=98)
    torch.testing.assert_close(logits(path, 2), expected(path), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "kv_heads"), [("qwen3_moe", 2), ("seed_oss", 2), ("gemma2", 1)])
def test_kv_heads_that_are_fewer_than_ranks_are_replicated(kind: str, kv_heads: int, tmp_path: Path) -> None:
    """With their biases (seed_oss), and one for all (gemma2)."""
    path = make(kind, tmp_path / kind, num_key_value_heads=kv_heads, moe_intermediate_size=64)
    wanted = expected(path)
    with Ranks(path, 4) as ranks:
        assert [(decoder.shape.heads, decoder.shape.kv_heads) for decoder in ranks.decoders] == [(1, 1)] * 4
        assert [decoder.shape.kv_head_start for decoder in ranks.decoders] == [rank * kv_heads // 4 for rank in range(4)]
        torch.testing.assert_close(ranks.logits(STEP), wanted, rtol=1e-4, atol=1e-4)


def test_heads_behind_gathered_projections_are_whole_on_every_rank(tmp_path: Path) -> None:
    path = make("olmo2", tmp_path / "olmo2")
    wanted = expected(path)
    with Ranks(path, 4) as ranks:
        assert [(decoder.shape.heads, decoder.shape.kv_heads) for decoder in ranks.decoders] == [(4, 2)] * 4
        torch.testing.assert_close(ranks.logits(STEP), wanted, rtol=1e-4, atol=1e-4)


def test_a_head_that_is_divided_by_its_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As some plans have it: then every rank has all logits, and keeps its part of them."""
    monkeypatch.setattr(transformers.Olmo2ForCausalLM, "_tp_plan", {"lm_head": "rowwise_split_input"})
    path = make("olmo2", tmp_path / "olmo2")
    wanted = expected(path)
    with Ranks(path, 2) as ranks:
        assert [local.shape for local in ranks.local_logits(STEP)] == [(1, 100), (1, 100)]
        torch.testing.assert_close(ranks.logits(STEP), wanted, rtol=1e-4, atol=1e-4)


def test_several_files(tmp_path: Path) -> None:
    path = make("qwen3_moe", tmp_path / "whole")
    parts = tmp_path / "parts"
    load_reference(path).save_pretrained(parts, max_shard_size="60KB")
    assert (parts / "model.safetensors.index.json").exists()
    torch.testing.assert_close(logits(parts, 2), expected(path), rtol=1e-4, atol=1e-4)


def test_numbers_that_stay_exact_in_a_narrow_dtype(tmp_path: Path) -> None:
    """Where the class says so: the bias that chooses experts."""
    path = make("deepseek_v3", tmp_path / "deepseek")
    decoder = load_transformers(path, read_transformers(path), Solo(), torch.bfloat16, torch.device("cpu"))
    kinds = {name: tensor.dtype for name, tensor in decoder._model.state_dict().items()}
    assert kinds.pop("model.layers.1.mlp.gate.e_score_correction_bias") == torch.float32
    assert set(kinds.values()) == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["gemma3_text", "mixtral", "gpt_oss", "deepseek_v3"])
def test_narrow_dtypes(kind: str, tmp_path: Path) -> None:
    path = make(kind, tmp_path / kind)
    with Ranks(path) as exact, Ranks(path, 1, torch.bfloat16) as narrow:
        found, wanted = narrow.logits(STEP), exact.logits(STEP)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), wanted, rtol=0, atol=0.6 * float(wanted.std()))
    assert float((found.float() - wanted).std()) < 0.15 * float(wanted.std())


def test_padding_and_logits_of_wanted_rows_alone(tmp_path: Path) -> None:
    path = make("gemma2", tmp_path / "gemma2")
    with Ranks(path, 2) as ranks:
        *_, last = ranks.local_logits(STEP)
        assert last.shape == (1, 100)
        assert last[:, :99].isfinite().all()
        assert (last[:, 99:] == -torch.inf).all()
        nothing = replace(STEP, sample_at=torch.empty(0, dtype=torch.int64))
        assert [local.shape for local in ranks.local_logits(nothing)] == [(0, 100), (0, 100)]
        with torch.inference_mode():
            wanted = load_reference(path)(torch.tensor([PROMPT])).logits[0, [4, 2]]
        found = ranks.logits(replace(STEP, sample_at=torch.tensor([4, 2])))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


LONG = {
    "rope_type": "longrope", "rope_theta": 10_000.0, "original_max_position_embeddings": 64, "factor": 8.0,
    "short_factor": [1.0 + n / 10 for n in range(8)], "long_factor": [2.0 + n for n in range(8)],
}  # fmt: skip


def test_longrope_is_that_of_the_longest_sequence(tmp_path: Path) -> None:
    """Short factors up to the original length, long ones beyond, whatever the sequence."""
    path = make("phi3", tmp_path / "phi3", rope_parameters=LONG, original_max_position_embeddings=64, sliding_window=None)
    prompt = [(7 * n + 3) % 199 for n in range(100)]
    with Ranks(path, positions=512) as ranks:
        long = ranks.generate([prompt], 6, 40)[0]
        assert not torch.allclose(ranks.logits(STEP), expected(path), rtol=1e-2, atol=1e-2)
    assert long == generate_reference(path, prompt, 6)
    with Ranks(path, positions=64) as ranks:
        torch.testing.assert_close(ranks.logits(STEP), expected(path), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_the_native_decoder_says_the_same(kind: str, tmp_path: Path) -> None:
    path = make(kind, tmp_path / kind, sliding_window=None)
    for size in (1, 2):
        with NativeRanks(path, size) as native, Ranks(path, size) as ours:
            torch.testing.assert_close(ours.logits(STEP), native.logits(STEP), rtol=1e-4, atol=1e-4)


def test_an_index_that_config_json_contradicts_names_the_experts(tmp_path: Path) -> None:
    path = make("mixtral", tmp_path / "mixtral")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"num_local_experts": 5}))
    with pytest.raises(CheckpointError, match=r"has 4 experts for .*gate_up_proj, config.json asks for 5"):
        logits(path)
