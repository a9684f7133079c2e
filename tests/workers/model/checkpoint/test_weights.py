"""Checkpoints are read in slices, from one file or several, and refused with what to change."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.shared.checkpoints import generate_reference, make_checkpoint
from tests.workers.decoding import CPU, Ranks
from workers.model.checkpoint.weights import Checkpoint, Piece, StoredNumbers
from workers.model.config.architectures import read_config
from workers.model.config.fields import CheckpointError
from workers.model.decoders.native import load_model
from workers.parallel.silent import Silent

PROMPT = [5, 6, 7]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "checkpoint", "Qwen3ForCausalLM")


def edit(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    raw = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in raw.items() if value != "absent"}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("size", [1, 2])
def test_several_files(tmp_path: Path, size: int) -> None:
    folder = make_checkpoint(tmp_path / "sharded", "LlamaForCausalLM", max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    with Ranks(folder, size) as ranks:
        assert ranks.generate(PROMPT, 10) == generate_reference(folder, PROMPT, 10)


def test_a_rank_reads_only_its_share(folder: Path) -> None:
    config, totals = read_config(folder), []
    for size in (1, 2):
        reports: list[tuple[int, int]] = []

        def progress(done: int, total: int, to: list[tuple[int, int]] = reports) -> None:
            to.append((done, total))

        load_model(folder, config, Silent(size), torch.float32, CPU, _NoAttention(), progress)
        assert [done for done, _ in reports] == sorted({done for done, _ in reports})
        assert reports[-1][0] == reports[-1][1]
        totals.append(reports[-1][1])
    assert 0.5 * totals[0] < totals[1] < 0.51 * totals[0]


class _NoAttention:
    name = "none"

    def plan(self, step: object) -> None: ...

    def attend(self, *_: object) -> torch.Tensor:
        raise AssertionError


def test_slices_of_rows_and_columns(tmp_path: Path) -> None:
    whole = torch.arange(24.0).view(4, 6)
    save_file({"w": whole}, tmp_path / "model.safetensors")
    rows, columns = torch.empty(2, 6, dtype=torch.float64), torch.empty(4, 2, dtype=torch.bfloat16)

    class Both:
        def pieces(self) -> list[Piece]:
            return [Piece(rows, "w", (4, 6), 1), Piece(columns, "w", (4, 6), 3, dim=1)]

        def filled(self) -> None: ...

    with Checkpoint(tmp_path) as checkpoint:
        checkpoint.load([Both()])
    assert torch.equal(rows, whole[1:3].double())
    assert torch.equal(columns, whole[:, 3:5].bfloat16())


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder: give the path of a checkpoint folder"):
        read_config(tmp_path / "nowhere")


def test_missing_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        read_config(tmp_path)


@pytest.mark.parametrize(("text", "match"), [("{", "cannot be read"), ("[]", "holds no JSON object")])
def test_malformed_config(tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=match):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel.* is not supported: .*LlamaForCausalLM, Mistral"),
        ({"architectures": None}, "architectures=.* is not supported"),
        ({"hidden_size": "absent"}, "hidden_size must be a positive integer, found None"),
        ({"vocab_size": "many"}, "vocab_size must be a positive integer, found 'many'"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple of num_key_value_heads=3"),
        ({"head_dim": 15}, "head_dim=15 is odd"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"quantization_config": {"quant_method": "hqq"}}, "quantization_config.quant_method='hqq' is not supported"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compression_config.format=None is not supported"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "RoPE scaling 'longrope' is not supported"),
        ({"rope_parameters": {"rope_type": "linear"}}, "RoPE scaling 'linear' has no factor"),
        ({"rope_parameters": 5}, "rope_parameters must be an object"),
        ({"rope_parameters": {"full_attention": {}}}, r"a block for each kind of layer \(full_attention\)"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor must be above 0, found 0"),
        (
            {"rope_parameters": {"rope_theta": 5e5}, "rope_scaling": {"type": "yarn", "factor": 4.0}},
            "rope_parameters has rope_theta 500000, but rope_scaling beside it .*: move what rope_scaling says",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor other than 1"),
        ({"dtype": "int4"}, "dtype 'int4' is not supported"),
        ({"dtype": {"": "bfloat16"}}, "dtype {'': 'bfloat16'} is not supported"),
        ({"eos_token_id": "end"}, "eos_token_id must be an integer"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps must be a number"),
    ],
)
def test_refused_config(folder: Path, fields: dict[str, object], match: str) -> None:
    edit(folder, **fields)
    with pytest.raises(CheckpointError, match=match):
        read_config(folder)


def test_kv_heads_that_do_not_divide(folder: Path) -> None:
    edit(folder, num_attention_heads=12)
    match = r"size 3 neither divides the model's 2 KV heads nor is a multiple .*: choose one of \[1, 2, 4, 6, 12\]"
    with pytest.raises(CheckpointError, match=match):
        read_config(folder).shard(0, 3)


def test_sizes_that_do_not_divide(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"size 8 does not divide the model's 4 attention heads.*\[1, 2, 4\]"):
        read_config(folder).shard(0, 8)
    edit(folder, intermediate_size=97)
    with pytest.raises(CheckpointError, match=r"size 2 does not divide the intermediate size 97: choose one of \[1\]"):
        read_config(folder).shard(0, 2)


def test_old_and_new_spellings(folder: Path) -> None:
    scaling = {"type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}
    edit(folder, rope_parameters={"rope_theta": 5e5, "rope_type": "llama3", **scaling}, dtype="bfloat16")
    modern = read_config(folder)
    edit(folder, rope_parameters="absent", rope_theta=5e5, rope_scaling=scaling, dtype="absent", torch_dtype="bfloat16")
    assert read_config(folder) == modern
    assert (modern.rope.theta, modern.rope.kind, modern.dtype) == (5e5, "llama3", torch.bfloat16)


@pytest.mark.parametrize(
    ("fields", "dtype"),
    [
        ({"dtype": "torch.bfloat16"}, torch.bfloat16),
        ({"dtype": "absent", "torch_dtype": "torch.float16"}, torch.float16),
        ({"dtype": "half"}, torch.float16),
        ({"dtype": "bfloat16", "torch_dtype": "float16"}, torch.bfloat16),
        ({"dtype": "auto"}, None),
        ({"dtype": "absent"}, None),
    ],
)
def test_spellings_of_dtype(folder: Path, fields: dict[str, object], dtype: torch.dtype | None) -> None:
    edit(folder, **fields)
    assert read_config(folder).dtype == dtype


def test_what_the_weights_are_stored_in(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "half", dtype=torch.float16)
    edit_weights(folder, lambda tensors: tensors.update({"model.rotary_emb.inv_freq": torch.ones(10**6)}))
    numbers = sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values()) - 10**6
    with Checkpoint(folder) as checkpoint:
        assert checkpoint.stored() == StoredNumbers(torch.float16, numbers)


def test_stop_ids_of_both_files(folder: Path) -> None:
    edit(folder, eos_token_id=7)
    (folder / "generation_config.json").write_text('{"eos_token_id": [9, 7]}')
    assert read_config(folder).eos_ids == (7, 9)


def windows(folder: Path) -> list[int | None]:
    return [form.window for form in read_config(folder).forms]


@pytest.mark.few
@pytest.mark.parametrize(
    "said",
    [
        {},
        {"sliding_window": 100},
        {"sliding_window": 100, "use_sliding_window": True},
        {"sliding_window": 100, "use_sliding_window": True, "max_window_layers": 1},
        {"sliding_window": 100, "use_sliding_window": True, "max_window_layers": 0},
        {"sliding_window": None, "use_sliding_window": True, "max_window_layers": 0},
        {"use_sliding_window": True, "max_window_layers": 1},
        {"sliding_window": 7, "use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"]},
        {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 0, "layer_types": ["full_attention"] * 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM", "LlamaForCausalLM"])
def test_windows_are_those_of_transformers(architecture: str, said: dict[str, Any], tmp_path: Path) -> None:
    """And the context is the model's own, whatever the window."""
    path = make_checkpoint(tmp_path, architecture)
    config = json.loads((path / "config.json").read_text())
    for name in ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types"):
        config.pop(name, None)
    (path / "config.json").write_text(json.dumps(config | said))
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    expected = []
    for layer in model.model.layers:
        whole = model.config.sliding_window if architecture.startswith("Mistral") else None  # it masks all layers alike
        expected.append(getattr(layer.self_attn, "sliding_window", None) or whole)
    assert windows(path) == expected
    assert read_config(path).max_position == 512


def test_windows_that_no_layer_has_a_place_for(folder: Path) -> None:
    edit(folder, use_sliding_window=True, sliding_window=7, layer_types=["sliding_attention"])
    with pytest.raises(CheckpointError, match="layer_types must name full_attention or sliding_attention for each of 2 layers"):
        read_config(folder)
    edit(folder, layer_types=["sliding_attention", "linear_attention"])
    with pytest.raises(CheckpointError, match="layer_types must name"):
        read_config(folder)


def test_no_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither model.safetensors nor model.safetensors.index.json is in"):
        Ranks(folder)


def test_truncated_safetensors(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model.safetensors is truncated or damaged .*: download it again"):
        Ranks(folder)


def test_missing_shard(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "sharded", max_shard_size="60KB")
    min(folder.glob("model-*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match=r"model-00001-of-.*safetensors is not in"):
        Ranks(folder)


def test_malformed_index(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"index.json cannot be read .*: download the file again"):
        Ranks(folder)


def as_shards(folder: Path, **files: dict[str, torch.Tensor]) -> None:
    """Puts the tensors into files of these names, and an index that lists each in the first that has it."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    listed: dict[str, str] = {}
    for name, tensors in files.items():
        save_file(tensors, folder / f"{name}.safetensors", metadata={"format": "pt"})
        listed = dict.fromkeys(tensors, f"{name}.safetensors") | listed
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))


def test_index_that_lies(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    as_shards(folder, shard=tensors)
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "shard.safetensors")
    with pytest.raises(CheckpointError, match=r"model.norm.weight is not in .*, where .*index.json places it"):
        Ranks(folder)


def test_a_tensor_in_two_files(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    as_shards(folder, new=tensors, old={"model.norm.weight": tensors["model.norm.weight"] + 1, "model.old": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"model.norm.weight is in two files of .*new.safetensors and old.safetensors"):
        Ranks(folder)


def test_the_single_file_goes_before_a_stale_index(tmp_path: Path, folder: Path) -> None:
    stale = load_file(make_checkpoint(tmp_path / "stale", "Qwen3ForCausalLM", seed=1) / "model.safetensors")
    new = load_file(folder / "model.safetensors")
    as_shards(folder, stale=stale)
    old_answer = generate_reference(folder, PROMPT, 10)
    save_file(new, folder / "model.safetensors", metadata={"format": "pt"})
    with Ranks(folder) as ranks:
        assert ranks.generate(PROMPT, 10) == generate_reference(folder, PROMPT, 10) != old_answer


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kept", ["both, different", "both, equal", "the head alone"])
def test_a_tied_head_that_is_in_the_file(tmp_path: Path, size: int, kept: str) -> None:
    """As transformers 5: the file's own head where it differs, and either of the two where only one is there."""
    folder = make_checkpoint(tmp_path / "tied", "LlamaForCausalLM", tied=True)

    def keep(tensors: dict[str, torch.Tensor]) -> None:
        embedding = tensors["model.embed_tokens.weight"]
        tensors["lm_head.weight"] = embedding.flip(0) if kept == "both, different" else embedding.clone()
        if kept == "the head alone":
            del tensors["model.embed_tokens.weight"]

    tied = generate_reference(folder, PROMPT, 10)
    edit_weights(folder, keep)
    with Ranks(folder, size) as ranks:
        tokens = ranks.generate(PROMPT, 10)
    assert tokens == generate_reference(folder, PROMPT, 10)
    assert (tokens == tied) == (kept != "both, different")


@pytest.mark.parametrize("size", [1, 2])
def test_leftovers_that_are_computed_are_not_missed(tmp_path: Path, size: int) -> None:
    folder = make_checkpoint(tmp_path / "old", "LlamaForCausalLM", attention_bias=True, mlp_bias=True)
    leftovers = {
        f"model.{layer}rotary_emb.{name}": torch.ones(8)
        for layer in ("", "layers.0.self_attn.", "layers.1.self_attn.")
        for name in ("inv_freq", "cos_cached")
    }
    edit_weights(folder, lambda tensors: tensors.update(leftovers))
    with Ranks(folder, size) as ranks:
        assert ranks.generate(PROMPT, 10) == generate_reference(folder, PROMPT, 10)


@pytest.mark.parametrize(
    "names",
    [
        ["model.layers.0.mlp.up_proj.weight_scale"],
        ["model.layers.1.self_attn.k_proj.input_zero_point"],
        ["model.layers.0.self_attn.q_proj.qweight", "model.layers.0.self_attn.q_proj.scales"],
        ["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"],
        ["model.layers.0.self_attn.q_proj.bias"],
        ["model.layers.2.mlp.up_proj.weight"],
        ["score.weight"],
    ],
)
def test_a_tensor_that_nothing_reads(folder: Path, names: list[str]) -> None:
    """Whether it is a scale or a bias, or a layer too many: without it, the others mean something else."""
    edit_weights(folder, lambda tensors: tensors.update({name: torch.ones(1) for name in names}))
    with pytest.raises(CheckpointError, match=f"does not read: {', '.join(sorted(names))}. The weights may be quantized"):
        Ranks(folder)


def test_many_tensors_that_nothing_reads(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.update({f"scale.{number:02}": torch.ones(1) for number in range(30)}))
    with pytest.raises(CheckpointError, match=r"does not read: scale.00, .*, scale.04 and 25 more\. "):
        Ranks(folder)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.int32, torch.bool])
def test_stored_types_that_are_no_numbers_by_themselves(folder: Path, dtype: torch.dtype) -> None:
    """FP8 without a word in config.json, as some exporters write it: its scales are elsewhere, or left out."""
    name = "model.layers.1.mlp.up_proj.weight"
    edit_weights(folder, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    with pytest.raises(CheckpointError, match=f"tensor {name} in .* is stored as .*: config.json does not say how"):
        Ranks(folder)


def test_an_adapter_beside_the_weights(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"an adapter .*adapter_config.json.* name that with --lora"):
        Ranks(folder)


def test_missing_tensor(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"tensor model.layers.1.mlp.up_proj.weight is missing"):
        Ranks(folder)


def test_wrong_shape(folder: Path) -> None:
    edit(folder, intermediate_size=104)
    match = r"gate_proj.weight in .* has shape \[96, 64\] but config.json asks for \[104, 64\]"
    with pytest.raises(CheckpointError, match=match):
        Ranks(folder)
