"""Every spelling of RoPE in config.json means what transformers makes of it, and a stretched context is served."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from tests.shared.checkpoints import LLAMA3_ROPE, generate_reference, make_checkpoint
from tests.workers.decoding import Ranks
from workers.model.config.architectures import read_config
from workers.model.layers.rotary import Rotary

LLAMA3 = {name: value for name, value in LLAMA3_ROPE.items() if name != "rope_theta"}
LINEAR = {"rope_type": "linear", "factor": 4.0}
DEFAULT = {"rope_type": "default", "rope_theta": 5e5}
ORIGINAL = "original_max_position_embeddings"
YARN = {"rope_type": "yarn", "factor": 4.0, ORIGINAL: 128}
SPELLINGS: dict[str, dict[str, Any]] = {
    "both blocks": {"rope_parameters": LINEAR, "rope_scaling": YARN, "rope_theta": 7e4},
    "both blocks, one theta": {"rope_parameters": DEFAULT, "rope_scaling": YARN | {"rope_theta": 5e5}},
    "both blocks, theta outside": {"rope_parameters": {"rope_theta": 7e4}, "rope_scaling": LLAMA3, "rope_theta": 7e4},
    "an empty block": {"rope_parameters": LINEAR, "rope_scaling": {}, "rope_theta": 7e4},
    "a block of null": {"rope_parameters": LINEAR, "rope_scaling": None},
    "theta twice": {"rope_parameters": DEFAULT, "rope_theta": 7e4},
    "theta twice, old": {"rope_scaling": LINEAR | {"rope_theta": 5e5}, "rope_theta": 7e4},
    "type twice": {"rope_scaling": {"type": "linear", **YARN}},
    "the old word": {"rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_theta": 7e4},
    "the length outside": {"rope_scaling": LLAMA3 | {ORIGINAL: 32}, ORIGINAL: 64},
    "the length outside, of yarn": {"rope_scaling": YARN, ORIGINAL: 16, "rope_theta": 1e6},
    "no factor": {"rope_scaling": YARN | {"factor": None}},
    "betas of 0": {"rope_scaling": YARN | {"beta_fast": 0, "beta_slow": 0}},
    "a magnitude": {"rope_scaling": YARN | {"attention_factor": 0.5}},
    "half of the scales": {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 0.0}},
    "both scales": {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}},
    "not truncated": {"rope_scaling": YARN | {"truncate": False}},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
    "no type": {"rope_scaling": {"factor": 4.0}},
    "nothing": {},
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("rope") / "model", "Qwen3ForCausalLM")


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    """The same checkpoint, of which config.json may be edited."""
    for file in trained.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def say(folder: Path, **fields: Any) -> None:
    raw = json.loads((folder / "config.json").read_text())
    del raw["rope_parameters"]
    (folder / "config.json").write_text(json.dumps(raw | fields))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_frequencies_are_those_of_transformers(folder: Path, spelling: str) -> None:
    say(folder, **SPELLINGS[spelling])
    expected = Qwen3RotaryEmbedding(AutoConfig.from_pretrained(folder))
    rope = read_config(folder).rope
    assert torch.equal(rope.frequencies(16, torch.float32), expected.inv_freq)
    assert rope.magnitude() == pytest.approx(expected.attention_scaling, abs=1e-12)


def test_tokens_are_those_of_transformers_with_both_blocks(folder: Path) -> None:
    plain = generate_reference(folder, list(range(60)), 20)
    say(folder, rope_parameters={"rope_type": "default"}, rope_scaling=YARN | {ORIGINAL: 16})
    with Ranks(folder) as ranks:
        assert ranks.generate(list(range(60)), 20) == generate_reference(folder, list(range(60)), 20) != plain


def test_yarn_stretches_the_length_that_config_json_still_has(folder: Path) -> None:
    """As Qwen's model cards say: the factor is added, and max_position_embeddings left alone."""
    yarn = {"rope_type": "yarn", "factor": 4.0, ORIGINAL: 32}
    say(folder, max_position_embeddings=32, rope_scaling=yarn)
    assert read_config(folder).max_position == 4 * 32
    prompt = [token % 199 for token in range(100)]
    with Ranks(folder) as ranks:
        assert ranks.generate(prompt, 27) == generate_reference(folder, prompt, 27)


@pytest.mark.parametrize(
    ("fields", "positions"),
    [
        ({"max_position_embeddings": 40, "rope_scaling": YARN | {ORIGINAL: 32}}, 128),
        ({"max_position_embeddings": 200, "rope_scaling": YARN | {ORIGINAL: 32}}, 200),
        ({"max_position_embeddings": 32, "rope_scaling": {"type": "yarn", "factor": 2.5}}, 80),
        ({"max_position_embeddings": 32, "rope_scaling": LLAMA3}, 32),
        ({"max_position_embeddings": 32, "rope_scaling": LINEAR}, 32),
        ({"max_position_embeddings": 32, "rope_scaling": {"type": "dynamic", "factor": 4.0}}, 32),
    ],
)
def test_positions_of_a_scaled_model(folder: Path, fields: dict[str, Any], positions: int) -> None:
    say(folder, **fields)
    assert read_config(folder).max_position == positions


def test_a_table_is_as_long_as_it_was_asked_for(folder: Path) -> None:
    rotary = Rotary(read_config(folder).rope, 16, 70, torch.float32, torch.device("cpu"))
    rotary.at(torch.tensor([69]))
    with pytest.raises(IndexError):
        rotary.at(torch.tensor([70]))
