"""What is not served is refused before a weight is read, by name and reason, with what works."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from benchmarks.models.zoo import SIZES, make
from workers.config import ReadingConfig
from workers.model.config.fields import CheckpointError
from workers.model.reading import is_native, read_model
from workers.model.transformers.compared import COMPARED
from workers.model.transformers.config import read_transformers

SMALL = {"num_hidden_layers": 2, "hidden_size": 64, "vocab_size": 199, "num_attention_heads": 4}


def written(folder: Path, model_type: str, **fields: Any) -> Path:
    """A folder with the config.json of that class, and nothing else."""
    config = transformers.CONFIG_MAPPING[model_type](**fields).to_dict() | {"model_type": model_type}
    (folder / "config.json").write_text(json.dumps(config, default=str))
    return folder


@pytest.mark.parametrize(
    ("model_type", "fields", "reason"),
    [
        ("t5", {}, "t5 is an encoder-decoder, and only decoders are served"),
        ("bart", {}, "bart is an encoder-decoder"),
        ("mamba", {}, "mamba has layers of linear_attention, which are no attention"),
        ("qwen3_next", {}, "qwen3_next has layers of linear_attention"),
        ("falcon_h1", {}, "falcon_h1 has layers of hybrid"),
        ("lfm2", {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2}, "lfm2 has layers of conv"),
        ("bloom", {}, "bloom has no max_position_embeddings, so its positions are told in another way"),
        ("llama", {"architectures": ["LlamaForTokenClassification"]}, "is no language model"),
        ("vit", {}, "transformers has no causal language model for vit alone"),
    ],
)
def test_by_config(tmp_path: Path, model_type: str, fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_model(written(tmp_path, model_type, **fields))
    assert reason in str(caught.value)
    assert all(name in str(caught.value) for name in ("LlamaForCausalLM", *COMPARED)), "the list of what works"


@pytest.mark.parametrize(
    ("model_type", "fields", "reason"),
    [
        ("rwkv", {"context_length": 64, "max_position_embeddings": 64}, "RwkvForCausalLM has recurrent layers"),
        ("gptj", {}, "GPTJForCausalLM has an attention of its own, which cannot be replaced"),
        ("bert", {}, "BertLMHeadModel is not served: its tokens see those that follow"),
        ("doge", SIZES, "DogeForCausalLM is not served: it masks its attention in a way of its own"),
        ("diffllama", SIZES, "DiffLlamaForCausalLM is not served: layer 0 attends twice"),
        ("opt", {"ffn_dim": 96}, "OPTForCausalLM is not served: what it asks of attention is found by running it without"),
        ("gemma3_text", SIZES | {"hidden_size": -4}, "Gemma3ForCausalLM cannot be made of this config.json"),
    ],
)
def test_by_class(tmp_path: Path, model_type: str, fields: dict[str, Any], reason: str) -> None:
    model = read_model(written(tmp_path, model_type, **SMALL | fields))
    with pytest.raises(CheckpointError) as caught:
        model.require(1)
    assert reason in str(caught.value)
    if "cannot be made of this config.json" not in reason:
        assert all(name in str(caught.value) for name in ("LlamaForCausalLM", *COMPARED)), "the list of what works"


def test_code_that_a_checkpoint_brings_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "modeling_mine.py").write_text("raise SystemExit('run')")
    auto_map = {"AutoConfig": "modeling_mine.Config", "AutoModelForCausalLM": "modeling_mine.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": auto_map}))
    with pytest.raises(CheckpointError, match=r"model_type='mine' is not known to transformers .* own, which is not run"):
        read_model(tmp_path)


def test_code_beside_a_known_class_is_left_alone(tmp_path: Path) -> None:
    path = make("phi3", tmp_path / "phi3")
    (path / "modeling_mine.py").write_text("raise SystemExit('run')")
    config = json.loads((path / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "modeling_mine.Config", "AutoModelForCausalLM": "modeling_mine.Model"}
    (path / "config.json").write_text(json.dumps(config))
    assert read_model(path).architecture == "Phi3ForCausalLM"


def test_quantized_weights_of_another_kind(tmp_path: Path) -> None:
    path = written(tmp_path, "qwen3_moe", **SIZES)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "quark"}}))
    with pytest.raises(CheckpointError, match=r"quantization_config\.quant_method='quark' is not supported: choose .* fp8"):
        read_model(path)


@pytest.mark.parametrize(
    ("model_type", "fields", "size", "reason"),
    [
        ("gpt_oss", {}, 2, "GptOssForCausalLM has no tensor-parallel plan in transformers: choose tensor_parallel_size 1"),
        ("gemma", {"num_attention_heads": 6, "num_key_value_heads": 6}, 4, "GemmaForCausalLM cannot be run by 4 ranks"),
        ("gemma", {"num_attention_heads": 6, "num_key_value_heads": 3}, 2, "GemmaForCausalLM cannot be run by 2 ranks"),
        ("gemma", {}, 3, "tensor parallel size 3 does not divide the 64 of model.layers.0.self_attn.q_proj.weight"),
    ],
)
def test_ranks_that_cannot_share_it(tmp_path: Path, model_type: str, fields: dict[str, Any], size: int, reason: str) -> None:
    model = read_model(written(tmp_path, model_type, **SIZES | fields))
    model.require(1)
    with pytest.raises(CheckpointError) as caught:
        model.require(size)
    assert reason in str(caught.value)


def test_a_type_that_has_the_class_of_another_family_is_served(tmp_path: Path) -> None:
    internlm3 = read_transformers(written(tmp_path, "internlm3", **SIZES))
    internlm3.require(2)
    assert (internlm3.architecture, internlm3.text.model_type) == ("LlamaForCausalLM", "internlm3")


def test_which_is_chosen(tmp_path: Path) -> None:
    llama, gemma = make("llama", tmp_path / "llama"), make("gemma", tmp_path / "gemma")
    assert (is_native(llama), is_native(gemma)) == (True, False)
    chosen = {
        (path, how): type(read_model(path, ReadingConfig(model_implementation=how))).__name__
        for path in (llama, gemma)
        for how in ("auto", "transformers")
    }
    assert chosen == {
        (llama, "auto"): "ModelConfig", (llama, "transformers"): "TransformersConfig",
        (gemma, "auto"): "TransformersConfig", (gemma, "transformers"): "TransformersConfig",
    }  # fmt: skip
    with pytest.raises(CheckpointError, match=r"architectures=\['GemmaForCausalLM'\] is not supported"):
        read_model(gemma, ReadingConfig(model_implementation="native"))


def test_limits(tmp_path: Path) -> None:
    path = make("gemma", tmp_path / "gemma", dtype=torch.bfloat16, eos_token_id=[7, 300])
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 9}))
    found = read_transformers(path)
    assert (found.vocab_size, found.max_position, found.eos_ids, found.dtype) == (199, 512, (7, 9), torch.bfloat16)
    yarn = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 512}
    assert read_transformers(make("olmo2", tmp_path / "olmo2", rope_parameters=yarn)).max_position == 4 * 512


def test_what_the_pool_costs_beyond_need_is_said(tmp_path: Path) -> None:
    deepseek = read_transformers(make("deepseek_v3", tmp_path / "deepseek"))
    assert deepseek.remarks(1) == ["keys and values differ in size: both take the room of the larger"]
    assert (deepseek.shard(0, 1).kv_heads, deepseek.shard(0, 1).head_dim) == (4, 24)
    gemma = read_transformers(make("gemma4_text", tmp_path / "gemma4"))
    assert gemma.remarks(1) == ["layers differ in their heads: each takes the room of the widest"]
    assert (gemma.shard(0, 1).kv_heads, gemma.shard(0, 1).head_dim) == (1, 64)
    assert not read_transformers(make("olmo2", tmp_path / "olmo2")).remarks(1)


def test_a_type_that_nobody_has_compared_is_served_with_a_warning(tmp_path: Path) -> None:
    lfm2 = read_transformers(written(tmp_path, "lfm2", **SIZES | {"layer_types": ["full_attention"] * 2}))
    assert lfm2.remarks(1) == ["nobody has compared the outputs of lfm2 with transformers' own (docs/models.md)"]
