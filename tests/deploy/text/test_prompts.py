"""Prompts are valid or refused with what to change."""

import json
from pathlib import Path

import numpy as np
import pytest

from cluster.config import EngineConfig
from cluster.resolve import MAX_MODEL_LEN_DEFAULT, resolve
from deploy.frontend.service.model import ServedModel
from deploy.text.content import Content, Conversation, PromptError, PromptTooLong
from deploy.text.prompts import ModelLimits, Prompt, PromptParser, Terms, read_model_limits
from deploy.text.tokenizer import Tokenizer
from scheduler.protocol.sampling import SamplingParams
from tests.deploy.conftest import EOS, MAX_TOKENS, USER
from tests.shared.tokenizers import CHATML, TURN_END, byte_level, save
from tests.shared.tokenizers import EOS as TOKENIZER_EOS

LIMITS = ModelLimits(vocab_size=400, max_tokens=MAX_TOKENS, eos_ids=(EOS,))
HELLO = {"role": "user", "content": "hello"}


@pytest.fixture
def parser(tokenizer: Tokenizer) -> PromptParser:
    return PromptParser(LIMITS, tokenizer)


def test_every_kind(parser: PromptParser, tokenizer: Tokenizer) -> None:
    ids, params, terms = tokenizer.encode("hello world"), SamplingParams(n=2), Terms("salt", "ann", 3, 1.5)
    assert parser.prompt("hello world", params, terms) == Prompt(ids, params, terms, "hello world")
    assert parser.prompt(ids, params, terms) == Prompt(ids, params, terms)
    assert parser.prompt(ids).packed == Prompt(ids).packed == np.array(ids, "<i4").tobytes()
    chat = [USER, *tokenizer.encode("hello\n")]
    assert parser.prompt(Conversation([HELLO]), params, terms) == Prompt(chat, params, terms, answered=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the prompt is empty"),
        ([], "the prompt is empty"),
        ([3, 400], "token id 400 is outside the vocabulary of 400 entries: use ids from 0 to 399"),
        ([3, -1], "token id -1 is outside the vocabulary of 400 entries"),
        ([3, 1 << 31], f"token id {1 << 31} is outside the vocabulary of 400 entries"),
        ([3, 4.0], "token ids: required argument is not an integer"),
        (
            [5] * MAX_TOKENS,
            f"length is {MAX_TOKENS} tokens, output included, and the prompt has {MAX_TOKENS}: shorten it to 511",
        ),
        (Conversation([{"role": "tool", "content": "x"}]), "chat template refuses these messages: no tools here"),
    ],
)
def test_refusals(parser: PromptParser, content: Content, message: str) -> None:
    with pytest.raises(PromptError) as caught:
        parser.prompt(content)
    assert message in str(caught.value)


def test_longest_prompt_leaves_room_for_one_token(parser: PromptParser) -> None:
    assert len(parser.prompt([5] * (MAX_TOKENS - 1)).token_ids) == MAX_TOKENS - 1


def test_without_tokenizer() -> None:
    bare = PromptParser(LIMITS, None)
    assert bare.prompt([3, 4]).token_ids == [3, 4]
    for content in ("text", Conversation([HELLO])):
        with pytest.raises(PromptError, match="no tokenizer: give prompt_token_ids"):
            bare.prompt(content)
    with pytest.raises(PromptError, match="use stop_token_ids"):
        bare.prompt([3, 4], SamplingParams(stop=("x",)))


def test_without_chat_template(parser: PromptParser, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer._implementation, "chat_template", None)
    with pytest.raises(PromptError, match="no chat template: give the prompt as text or as token ids"):
        parser.prompt(Conversation([HELLO]))


@pytest.mark.parametrize(
    ("params", "field"),
    [(SamplingParams(stop_token_ids=(400,)), "stop_token_ids"), (SamplingParams(logit_bias={400: 1.0}), "logit_bias")],
)
def test_parameters_are_held_against_the_model(parser: PromptParser, params: SamplingParams, field: str) -> None:
    with pytest.raises(PromptError, match=f"^{field}: token id 400 is outside") as caught:
        parser.prompt([5], params)
    assert caught.value.field == field


def test_room_for_what_is_asked(parser: PromptParser) -> None:
    ids = [5] * (MAX_TOKENS - 10)
    assert parser.prompt(ids, SamplingParams(max_tokens=10)).token_ids == ids
    with pytest.raises(PromptTooLong, match=r"max_tokens=11 with .*: lower max_tokens to 10 or less") as caught:
        parser.prompt(ids, SamplingParams(max_tokens=11))
    assert caught.value.field == "max_tokens"


def settings(folder: Path, source: Path, **fields: object) -> Path:
    """A checkpoint's config.json, edited."""
    folder.mkdir()
    raw = json.loads((source / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps({name: value for name, value in raw.items() if value is not None}))
    return folder


def test_the_length_of_a_stretched_model(bare_checkpoint: Path, tmp_path: Path) -> None:
    """YaRN as Qwen's cards have it; and no door takes more than the engine does where nobody says how much."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": MAX_TOKENS}
    stretched = settings(tmp_path / "yarn", bare_checkpoint, rope_scaling=yarn)
    assert read_model_limits(stretched, 4 * MAX_TOKENS).max_tokens == 4 * MAX_TOKENS
    assert read_model_limits(stretched, None).max_tokens == 4 * MAX_TOKENS
    with pytest.raises(ValueError, match="max_model_len=2049 is above the 2048 tokens"):
        read_model_limits(stretched, 4 * MAX_TOKENS + 1)
    long = settings(tmp_path / "long", bare_checkpoint, max_position_embeddings=10_485_760)
    resolved = resolve(EngineConfig(model=str(long)), "cpu")
    assert read_model_limits(long, None).max_tokens == resolved.max_model_len == MAX_MODEL_LEN_DEFAULT


@pytest.mark.parametrize(
    ("named", "eos", "template", "ends"),
    [
        (0, "<|im_end|>", None, (0, TURN_END)),
        ([0, 399], "</s>", CHATML, (0, TOKENIZER_EOS, TURN_END, 399)),
        (None, "</s>", None, (TOKENIZER_EOS,)),
        (None, None, None, ()),
        ([-1, 400, 7], None, None, (7,)),
    ],
)
def test_every_end_that_a_checkpoint_names(
    bare_checkpoint: Path, tmp_path: Path, named: object, eos: str | None, template: str | None, ends: tuple[int, ...]
) -> None:
    """The settings', the tokenizer's, and the chat template's: fine-tunes often have them in one of these places alone."""
    folder = save(byte_level(), settings(tmp_path / "model", bare_checkpoint, eos_token_id=named), eos=eos, template=template)
    assert ServedModel.read("model", folder, None).limits.eos_ids == ends


def test_a_tokenizer_that_is_larger_than_the_model(bare_checkpoint: Path, tmp_path: Path) -> None:
    folder = save(byte_level(), settings(tmp_path / "model", bare_checkpoint, vocab_size=4, eos_token_id=0), eos="<|im_end|>")
    assert ServedModel.read("model", folder, None).limits.eos_ids == (0,)


def test_model_limits(bare_checkpoint: Path, tmp_path: Path) -> None:
    assert read_model_limits(bare_checkpoint, None) == LIMITS
    assert read_model_limits(bare_checkpoint, 100).max_tokens == 100
    with pytest.raises(ValueError, match="max_model_len=1000 is above the 512 tokens"):
        read_model_limits(bare_checkpoint, 1000)
    with pytest.raises(ValueError, match="tensor parallel size 3 does not divide"):
        read_model_limits(bare_checkpoint, None, 3)
    with pytest.raises(ValueError, match="nowhere"):
        read_model_limits(tmp_path / "nowhere", None)
