"""Prompts are valid or refused with what to change."""

import json
from pathlib import Path

import numpy as np
import pytest

from cluster.config import EngineConfig
from cluster.resolve import MAX_MODEL_LEN_DEFAULT, resolve
from deploy.frontend.service import ServedModel
from deploy.text.prompts import (
    ModelLimits,
    PromptError,
    PromptParser,
    Source,
    as_chat,
    as_token_ids,
    read_jsonl,
    read_model_limits,
)
from deploy.text.tokenizer import Tokenizer
from scheduler.protocol.sampling import SamplingParams
from tests.deploy.conftest import EOS, MAX_TOKENS, USER
from tests.tokenizers import CHATML, TURN_END, byte_level, save
from tests.tokenizers import EOS as TOKENIZER_EOS

LIMITS = ModelLimits(vocab_size=400, max_tokens=MAX_TOKENS, eos_ids=(EOS,))


@pytest.fixture
def parser(tokenizer: Tokenizer) -> PromptParser:
    return PromptParser(LIMITS, tokenizer)


def test_every_kind(parser: PromptParser, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("hello world")
    assert parser.parse("hello world").token_ids == ids
    assert parser.parse({"prompt": "hello world", "cache_salt": "me"}).salt == "me"
    own = parser.parse({"prompt": "hello world", "tenant": "ann", "deadline_s": 3})
    assert (own.tenant, own.deadline_s) == ("ann", 3.0)
    assert (parser.parse("hello world").tenant, parser.parse(ids).deadline_s) == (None, None)
    assert parser.parse("hello world").text == "hello world"
    assert parser.parse(ids).text is None
    assert parser.parse({"prompt_token_ids": np.array(ids)}).token_ids == ids
    chat = parser.parse({"messages": [{"role": "user", "content": "hello"}]})
    assert chat.token_ids == [USER, *tokenizer.encode("hello\n")]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "the prompt is empty"),
        ([], "the prompt is empty"),
        ([3, 400], "token id 400 is outside the vocabulary of 400 entries: use ids from 0 to 399"),
        ([3, -1], "token id -1 is outside the vocabulary of 400 entries"),
        (
            [5] * MAX_TOKENS,
            f"the prompt has {MAX_TOKENS} tokens and the model takes {MAX_TOKENS}, output included: shorten it to 511",
        ),
        ([1.5], "must be a list of integers"),
        ({"prompt_token_ids": "12"}, "must be a list of integers"),
        ({"prompt": [1]}, "prompt must be a string, not list"),
        (
            {"prompt": "a", "messages": []},
            "give exactly one of prompt, prompt_token_ids, messages; found prompt and messages",
        ),
        ({}, "found none"),
        ({"prompt": "a", "tenant": 1}, "tenant must be a string, not int"),
        ({"prompt": "a", "deadline_s": "1"}, "deadline_s must be a number of seconds, not '1'"),
        ({"messages": []}, "at least one entry"),
        ({"messages": [{"content": "x"}]}, "not a chat message"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "chat template refuses these messages: no tools here"),
    ],
)
def test_refusals(parser: PromptParser, source: Source, message: str) -> None:
    with pytest.raises(PromptError) as caught:
        parser.parse(source)
    assert message in str(caught.value)


def test_longest_prompt_leaves_room_for_one_token(parser: PromptParser) -> None:
    assert len(parser.parse([5] * (MAX_TOKENS - 1)).token_ids) == MAX_TOKENS - 1


def test_without_tokenizer() -> None:
    bare = PromptParser(LIMITS, None)
    assert bare.parse([3, 4]).token_ids == [3, 4]
    for source in ("text", {"messages": [{"role": "user", "content": "x"}]}):
        with pytest.raises(PromptError, match="no tokenizer: give prompt_token_ids"):
            bare.parse(source)
    with pytest.raises(PromptError, match="use stop_token_ids"):
        bare.params(SamplingParams(stop=("x",)))


def test_without_chat_template(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer._implementation, "chat_template", None)
    with pytest.raises(PromptError, match="no chat template: give the prompt as text or as token ids"):
        PromptParser(LIMITS, tokenizer).chat([{"role": "user", "content": "x"}])


def test_hand_made_parameters(parser: PromptParser) -> None:
    assert parser.params(SamplingParams(stop="END")).stop == ("END",)  # type: ignore[arg-type]
    assert parser.params(SamplingParams(stop=["a"])).stop == ("a",)  # type: ignore[arg-type]
    with pytest.raises(PromptError, match="stop_token_ids: token id 400 is outside"):
        parser.params(SamplingParams(stop_token_ids=(400,)))
    with pytest.raises(PromptError, match="logit_bias: token id 999 is outside"):
        parser.params(SamplingParams(logit_bias={999: 1.0}))
    with pytest.raises(PromptError, match="max_tokens: expected `int \\| null`, got `float`"):
        parser.params(SamplingParams(max_tokens=1.5))  # type: ignore[arg-type]


def test_jsonl() -> None:
    lines = ['{"prompt": "a", "max_tokens": 3}', "", '{"prompt_token_ids": [1], "logit_bias": {"7": 2}}']
    default = SamplingParams(temperature=0.0)
    (first, params), (second, biased) = read_jsonl(lines, "file", default)
    assert (first, params) == ({"prompt": "a"}, SamplingParams(temperature=0.0, max_tokens=3))
    assert (second, biased.logit_bias) == ({"prompt_token_ids": [1]}, {7: 2.0})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"', "not valid JSON: Expecting ',' delimiter at column 15"),
        ('"a"', "expected an object such as"),
        ('{"promt": "a"}', "unknown key 'promt': did you mean 'prompt'?"),
        ('{"prompt": "a", "temprature": 1}', "did you mean 'temperature'?"),
        ('{"prompt": "a", "deadline": 1}', "did you mean 'deadline_s'?"),
        ('{"prompt": "a", "top_p": 2}', "top_p=2.0 is outside (0.0, 1.0]"),
        ('{"prompt": "a", "max_tokens": "9"}', "max_tokens: expected `int | null`, got `str`"),
    ],
)
def test_bad_jsonl_names_the_line(line: str, message: str) -> None:
    with pytest.raises(PromptError) as caught:
        list(read_jsonl(['{"prompt": "fine"}', line], "prompts.jsonl", SamplingParams()))
    assert str(caught.value).startswith("prompts.jsonl, line 2: ")
    assert message in str(caught.value)


def test_texts_as_messages_and_ids() -> None:
    assert as_chat("hi") == {"messages": [{"role": "user", "content": "hi"}]}
    salted = as_chat({"prompt": "hi", "cache_salt": "s"})
    assert salted == {"cache_salt": "s", "messages": [{"role": "user", "content": "hi"}]}
    assert as_token_ids("1, 2 3\n") == [1, 2, 3]
    with pytest.raises(PromptError, match="not token ids: '1 x'"):
        as_token_ids("1 x")
    with pytest.raises(PromptError, match="cannot be put through a chat template"):
        as_chat({"prompt_token_ids": [1]})


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
