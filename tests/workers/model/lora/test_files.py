"""Adapters as PEFT saves them: what they scale by, and what is refused, by name, before a number is read."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.models.zoo import make
from tests.shared.adapters import OF_EXPERTS, make_adapter, make_stacked
from tests.shared.checkpoints import make_checkpoint
from workers.config import LoraRoom
from workers.model.config.architectures import ModelConfig, read_config
from workers.model.config.fields import CheckpointError
from workers.model.lora.files import CONFIG, TENSORS, read_adapter
from workers.model.reading import read_model

ROOM = LoraRoom(2, 16, experts=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "base")


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> ModelConfig:
    return read_config(checkpoint)


def say(folder: Path, **fields: Any) -> None:
    said = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(said | fields))


@pytest.mark.parametrize(
    ("fields", "scaling"),
    [({}, 2.0), ({"use_rslora": True}, 4.0), ({"lora_alpha": 3}, 0.75), ({"alpha_pattern": {"q_proj": 2}}, 0.5),
     ({"alpha_pattern": {"layers.1.self_attn.q_proj": 2, "self_attn.q_proj": 6}}, 1.5),
     ({"alpha_pattern": {"^q_proj": 2, "proj": 4, r"layers\.\d+\.self_attn\.q_proj": 1}}, 0.25)],
)  # fmt: skip
def test_what_b_is_multiplied_by(
    fields: dict[str, Any], scaling: float, checkpoint: Path, model: ModelConfig, tmp_path: Path
) -> None:
    folder = make_adapter(tmp_path, checkpoint, rank=4, alpha=8, targets=("q_proj",))
    say(folder, **fields)
    first = read_adapter("a", folder, model, ROOM).linears[0]
    assert (first.layer, first.projection, first.scaling) == (0, "q_proj", scaling)


def test_projections_may_have_ranks_of_their_own(checkpoint: Path, model: ModelConfig, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path, checkpoint, rank=4, alpha=8, ranks={"down_proj": 16})
    found = read_adapter("a", folder, model, ROOM)
    ranks = {(each.projection, each.rank, each.scaling) for each in found.linears}
    assert ranks >= {("q_proj", 4, 2.0), ("down_proj", 16, 0.5)}
    assert found.rank == 16


@pytest.mark.parametrize(
    ("fields", "said"),
    [({"use_dora": True}, "use_dora"), ({"modules_to_save": ["lm_head"]}, "modules_to_save"), ({"bias": "all"}, "bias"),
     ({"trainable_token_indices": [1]}, "trainable_token_indices"), ({"fan_in_fan_out": True}, "fan_in_fan_out"),
     ({"init_lora_weights": "pissa"}, "init_lora_weights"), ({"peft_type": "IA3"}, "IA3"), ({"lora_bias": True}, "lora_bias"),
     ({"layer_replication": [[0, 1]]}, "layer_replication"), ({"one_that_nobody_knows": 3}, "one_that_nobody_knows"),
     ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"), ({"r": 5}, "shape"), ({"r": None}, "r must be"),
     ({"alpha_pattern": {"(": 2}}, "regular expression")],
)  # fmt: skip
def test_what_is_not_served_is_refused_by_name(
    fields: dict[str, Any], said: str, checkpoint: Path, model: ModelConfig, tmp_path: Path
) -> None:
    folder = make_adapter(tmp_path, checkpoint)
    read_adapter("a", folder, model, ROOM)
    say(folder, **fields)
    with pytest.raises(CheckpointError, match=said.replace("(", r"\(")):
        read_adapter("a", folder, model, ROOM)


@pytest.mark.parametrize(
    "fields",
    [{"layers_to_transform": [0]}, {"layers_to_transform": 0}, {"exclude_modules": ["q_proj"]}, {"exclude_modules": ".*q_proj"},
     {"target_modules": ["q_proj"]}, {"target_modules": r".*\.q_proj"}],
    ids=str,
)  # fmt: skip
def test_tensors_of_modules_that_are_left_out_are_refused(
    fields: dict[str, Any], checkpoint: Path, model: ModelConfig, tmp_path: Path
) -> None:
    folder = make_adapter(tmp_path, checkpoint)
    for same in ({"layers_to_transform": [0, 1]}, {"target_modules": "all-linear"}, {"target_modules": r".*_proj"}):
        say(folder, **same)
        read_adapter("a", folder, model, ROOM)
    say(folder, **fields)
    with pytest.raises(CheckpointError, match=r"adapts model\.layers\..*, which adapter_config.json leaves out"):
        read_adapter("a", folder, model, ROOM)


@pytest.mark.parametrize("name", ["none_such", "lora_embedding", "magnitude", "half", "layer", "float8", "empty"])
def test_tensors_that_would_be_passed_over_are_refused(
    name: str, checkpoint: Path, model: ModelConfig, tmp_path: Path
) -> None:
    folder = make_adapter(tmp_path, checkpoint, targets=("q_proj",))
    tensors, prefix = load_file(folder / TENSORS), "base_model.model.model.layers"
    a, b = (f"{prefix}.0.self_attn.q_proj.lora_{half}.weight" for half in "AB")
    match name:
        case "none_such":
            tensors["base_model.model.lm_head.lora_A.weight"] = torch.zeros(4, 64)
        case "lora_embedding":
            tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = torch.zeros(4, 199)
        case "magnitude":
            tensors[f"{prefix}.0.self_attn.q_proj.lora_magnitude_vector"] = torch.zeros(64)
        case "half":
            del tensors[b]
        case "layer":
            tensors |= {each.replace("layers.0", "layers.2"): tensors[each].clone() for each in (a, b)}
        case "float8":
            tensors[a] = tensors[a].to(torch.float8_e4m3fn)
        case "empty":
            tensors.clear()
    save_file(tensors, folder / TENSORS)
    with pytest.raises(CheckpointError, match=r"lm_head|lora_embedding|magnitude|missing|layer 2|F8|no tensor"):
        read_adapter("a", folder, model, ROOM)


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A "square" one has as many numbers in an expert as in a token."""
    root = tmp_path_factory.mktemp("mixtures")
    square = make("mixtral", root / "square", intermediate_size=64, num_hidden_layers=1)
    return {"square": square} | {family: make(family, root / family) for family in ("mixtral", "gpt_oss", "qwen2_moe")}


def test_experts_one_by_one(mixtures: dict[str, Path], tmp_path: Path) -> None:
    folder = make_adapter(tmp_path, mixtures["mixtral"], targets=OF_EXPERTS)
    say(folder, rank_pattern={r"experts\.3\.w2": 4, "w1": 4}, alpha_pattern={r"experts\.3\.w2": 2, "gate": 6})
    found = read_adapter("a", folder, read_config(mixtures["mixtral"]), ROOM).linears
    scalings = {(each.projection, each.expert): each.scaling for each in found if each.layer == 1}
    assert scalings["experts.down_proj", 3] == 0.5
    assert scalings["experts.down_proj", 2] == scalings["experts.gate_proj", 0] == scalings["experts.up_proj", 3] == 2.0
    assert scalings["router", None] == 1.5
    assert len(scalings) == 4 + 1 + 3 * 4
    assert not any(each.stacked for each in found)


def test_experts_in_stacks(mixtures: dict[str, Path], tmp_path: Path) -> None:
    """Which stack has the shorter name depends on which of them are adapted, layer by layer."""
    model, folder = read_config(mixtures["gpt_oss"]), make_stacked(tmp_path, mixtures["gpt_oss"], rank=6)
    say(folder, alpha_pattern={"layers.1.mlp.experts.gate_up_proj": 3, "gate_up_proj": 12}, use_rslora=True)
    found = read_adapter("a", folder, model, ROOM).linears
    assert {(each.layer, each.projection): each.scaling for each in found} == {
        (0, "experts.gate_up_proj"): 12 / 6**0.5, (1, "experts.gate_up_proj"): 3 / 6**0.5,
        (0, "experts.down_proj"): 8 / 6**0.5, (1, "experts.down_proj"): 8 / 6**0.5,
    }  # fmt: skip
    say(folder, target_parameters=["layers.0.mlp.experts.gate_up_proj", "experts.down_proj"])
    with pytest.raises(CheckpointError, match=r"adapts model\.layers\.1\.mlp\.experts\.base_layer, which adapter_config.json"):
        read_adapter("a", folder, model, ROOM)
    tensors = load_file(folder / TENSORS)
    save_file({name: tensor for name, tensor in tensors.items() if ".1.mlp.experts.base" not in name}, folder / TENSORS)
    assert len(read_adapter("a", folder, model, ROOM).linears) == 3


@pytest.mark.parametrize(
    ("fields", "said"),
    [({"target_parameters": ["experts.gate_up_proj_bias", "experts.down_proj"]}, r"adapts .*\.mlp\.experts\.base_layer, which"),
     ({"target_parameters": "experts.down_proj"}, "must be a list"), ({"r": 3}, "shape"),
     ({"target_parameters": None, "target_modules": "all-linear"}, "leaves out")],
)  # fmt: skip
def test_stacks_that_are_not_meant_are_refused(
    fields: dict[str, Any], said: str, mixtures: dict[str, Path], tmp_path: Path
) -> None:
    folder = make_stacked(tmp_path, mixtures["qwen2_moe"])
    say(folder, **fields)
    with pytest.raises(CheckpointError, match=said):
        read_adapter("a", folder, read_config(mixtures["qwen2_moe"]), ROOM)


def test_outputs_and_inputs_are_told_apart(mixtures: dict[str, Path], tmp_path: Path) -> None:
    """By shapes, and where these are square by PEFT's version."""
    square, other = (read_config(mixtures[name]) for name in ("square", "mixtral"))
    for turned in (False, True):
        for name, model in (("square", square), ("mixtral", other)):
            folder = make_stacked(tmp_path / f"{name}{turned}", mixtures[name], turned=turned)
            assert {each.turned for each in read_adapter("a", folder, model, ROOM).linears} == {turned}
    folder = make_stacked(tmp_path / "downs", mixtures["square"], target_parameters=["experts.down_proj"])
    tensors = {name: tensor for name, tensor in load_file(folder / TENSORS).items() if ".base_layer" not in name}
    save_file(tensors, folder / TENSORS)
    for version, told in ((None, False), ("0.18.2", False), ("0.19.1", True), ("0.20.0.dev0", True)):
        say(folder, peft_version=version)
        if told:
            assert not read_adapter("a", folder, square, ROOM).linears[0].turned
        else:
            with pytest.raises(CheckpointError, match="nothing tells outputs from inputs"):
                read_adapter("a", folder, square, ROOM)


def test_what_a_family_has_not_is_refused(mixtures: dict[str, Path], tmp_path: Path) -> None:
    """Single experts of gpt-oss, a shared expert of Mixtral, MLPs where there are experts."""
    folder = make_adapter(tmp_path, mixtures["qwen2_moe"], targets=OF_EXPERTS)
    for family in ("gpt_oss", "mixtral"):
        with pytest.raises(CheckpointError, match=r"not served \(.*experts.*and its experts and their router are"):
            read_adapter("a", folder, read_config(mixtures[family]), ROOM)
    tensors = {name.replace("shared_expert.", ""): tensor for name, tensor in load_file(folder / TENSORS).items()}
    save_file(tensors, folder / TENSORS)
    with pytest.raises(CheckpointError, match=r"not served \(.*mlp\.down_proj"):
        read_adapter("a", folder, read_config(mixtures["qwen2_moe"]), ROOM)


def test_an_adapter_of_another_model_or_a_larger_one_is_refused(
    checkpoint: Path, model: ModelConfig, tmp_path: Path
) -> None:
    other = make_checkpoint(tmp_path / "other", hidden_size=32, num_attention_heads=2, num_key_value_heads=1)
    with pytest.raises(CheckpointError, match="another model"):
        read_adapter("a", make_adapter(tmp_path / "a", other), model, ROOM)
    with pytest.raises(CheckpointError, match="max_lora_rank"):
        read_adapter("a", make_adapter(tmp_path / "b", checkpoint, rank=17), model, ROOM)


def test_a_folder_that_is_damaged_is_refused(checkpoint: Path, model: ModelConfig, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", checkpoint)
    whole = (folder / TENSORS).read_bytes()
    for damaged in (whole[:-1], whole[:50], b"", b"\xff" * 100):
        (folder / TENSORS).write_bytes(damaged)
        with pytest.raises(CheckpointError, match=TENSORS):
            read_adapter("a", folder, model, ROOM)
    (folder / TENSORS).unlink()
    with pytest.raises(CheckpointError, match="missing"):
        read_adapter("a", folder, model, ROOM)
    with pytest.raises(CheckpointError, match="not a folder"):
        read_adapter("a", tmp_path / "none", model, ROOM)
    (folder / CONFIG).unlink()
    with pytest.raises(CheckpointError, match=r"has no adapter_config\.json: it is no LoRA adapter"):
        read_adapter("a", folder, model, ROOM)


def test_a_checkpoint_is_no_adapter_and_an_adapter_no_checkpoint(
    checkpoint: Path, model: ModelConfig, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"has no adapter_config\.json: it is the folder of a checkpoint"):
        read_adapter("a", checkpoint, model, ROOM)
    with pytest.raises(CheckpointError, match="is a LoRA adapter: give the folder of its model"):
        read_model(make_adapter(tmp_path, checkpoint))


def test_a_version_is_what_the_files_hold(checkpoint: Path, model: ModelConfig, tmp_path: Path) -> None:
    def version(folder: Path) -> str:
        return read_adapter("a", folder, model, ROOM).adapter.version

    first, same, other = (make_adapter(tmp_path / name, checkpoint, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert version(first) == version(same) != version(other)
    before = version(first)
    say(first, lora_alpha=9)
    assert version(first) != before


def test_an_adapter_of_experts_wants_room_beside_them(mixtures: dict[str, Path], tmp_path: Path) -> None:
    model, without = read_config(mixtures["qwen2_moe"]), ROOM._replace(experts=False)
    of_experts = make_adapter(tmp_path / "experts", mixtures["qwen2_moe"], targets=OF_EXPERTS)
    with pytest.raises(CheckpointError, match="start with lora_experts"):
        read_adapter("a", of_experts, model, without)
    attention = make_adapter(tmp_path / "attention", mixtures["qwen2_moe"], targets=("q_proj", "o_proj"))
    assert read_adapter("a", attention, model, without) == read_adapter("a", attention, model, ROOM)
