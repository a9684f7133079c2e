"""Thoughts told apart from answers, whichever borders cut the output; which tokens are thought; grammars behind a thought."""

import json
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path

import pytest

from deploy.config import serve as serve_config
from deploy.doors.dialects.reasoning.channels import ChannelParser
from deploy.doors.dialects.reasoning.reasoning import REASONING_FORMATS, ReasoningFormat, Thinking
from deploy.doors.dialects.reasoning.sections import ReasoningParser
from deploy.doors.dialects.reasoning.think import AnswerOnly, ThinkParser
from deploy.text.tokenizer import CHANNEL_MARKS, THINK_MARKS, Tokenizer
from scheduler.protocol.sampling import Grammar
from tests.deploy.doors.dialects.conftest import QWEN_TEMPLATE, MakeCheckpoint, opened, vocabulary
from tests.deploy.doors.dialects.matching import accepts
from workers.sampling.grammar import compile_grammar, load_tokenizer

Told = list[tuple[bool, str]]
"""Thoughts (True) and answers by turns."""

HARMONY_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message.role }}<|message|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}{# <|channel|>analysis #}"
)


def read(parser: ReasoningParser, pieces: Sequence[str]) -> Told:
    sections = [section for piece in pieces for section in parser.push(piece)] + parser.flush()
    assert all(section.text for section in sections)
    return [(side, "".join(section.text for section in run)) for side, run in groupby(sections, lambda s: s.thought)]


def cuts(text: str) -> list[list[str]]:
    """Whole, in characters, and in two at every place."""
    return [[text], list(text), *([text[:at], text[at:]] for at in range(1, len(text)))]


T, A = True, False
THINKING: list[tuple[bool, str, Told]] = [
    (False, "<think>\nHm. <b>x</b>\n</think>\n\nYes.", [(T, "Hm. <b>x</b>"), (A, "Yes.")]),
    (False, " \n<think>Hm.</think>Yes.", [(T, "Hm."), (A, "Yes.")]),
    (False, "<think>\n\n</think>\n\nYes.", [(A, "Yes.")]),
    (False, "<think>Hm. </thi", [(T, "Hm. </thi")]),
    (False, "<think>Hm.\n", [(T, "Hm.\n")]),
    (False, "<think>a </think", [(T, "a </think")]),
    (False, "<think>", []),
    (False, "<thin", [(A, "<thin")]),
    (False, "\n <thing> is not a mark", [(A, "\n <thing> is not a mark")]),
    (False, "Say <think>x</think>.", [(A, "Say <think>x</think>.")]),
    (False, "Yes.</think>", [(A, "Yes.</think>")]),
    (False, "<think>a<think>b</think>c</think>d", [(T, "a<think>b"), (A, "c</think>d")]),
    (False, "<think>\u3000Hm.\xa0</think>\xa0Yes.", [(T, "\u3000Hm.\xa0"), (A, "\xa0Yes.")]),
    (False, "", []),
    (True, "\nHm.\n</think>\n\nYes.", [(T, "Hm."), (A, "Yes.")]),
    (True, "<think>\nHm.</think>Yes.", [(T, "Hm."), (A, "Yes.")]),
    (True, "</think>Yes.", [(A, "Yes.")]),
    (True, "<thin", [(T, "<thin")]),
    (True, "Hm.", [(T, "Hm.")]),
    (True, "", []),
]


@pytest.mark.parametrize(("begun", "output", "told"), THINKING)
def test_thoughts_between_tags(begun: bool, output: str, told: Told) -> None:
    for pieces in cuts(output):
        assert read(ThinkParser(opened=begun), pieces) == told, pieces


CALL = '<|channel|>commentary to=functions.get <|constrain|>json<|message|>{"a": 1}'
CHANNELS: list[tuple[str, Told]] = [
    ("<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.", [(T, "Hm."), (A, "Yes.")]),
    ("<|channel|>final<|message|>Yes. <b>\n<|return|>", [(A, "Yes. <b>\n")]),
    ("<|channel|>analysis<|message|>Hm. <|en", [(T, "Hm. <|en")]),
    ("<|channel|>analysis<|message|>Hm.<|end|><|start|>assist", [(T, "Hm.")]),
    (
        "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>analysis<|message|>b<|end|>"
        "<|start|>assistant<|channel|>commentary<|message|>I look.<|end|><|start|>assistant<|channel|>final<|message|>c",
        [(T, "a\nb"), (A, "I look.\nc")],
    ),
    (
        f"<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant{CALL}<|call|>",
        [(T, "Hm."), (A, CALL)],
    ),
    (CALL, [(A, CALL)]),
    (f" to=functions.get{CALL[:21]}<|message|>{{}}", [(A, f" to=functions.get{CALL[:21]}<|message|>{{}}")]),
    ("<|channel|>analysis<|message|>Hm.<|start|>assistant<|channel|>final<|message|>Yes.", [(T, "Hm."), (A, "Yes.")]),
    ("No channels: <b>to=1</b>", [(A, "No channels: <b>to=1</b>")]),
    ("<|channel|>fin", []),
    ("<|channel|>" + "x" * 600, [(A, "<|channel|>" + "x" * 600)]),
    ("", []),
]


@pytest.mark.parametrize(("output", "told"), CHANNELS)
def test_thoughts_on_channels(output: str, told: Told) -> None:
    for pieces in cuts(output):
        assert read(ChannelParser(), pieces) == told, pieces


# ---- one checkpoint ----

OPENING = QWEN_TEMPLATE.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n")
USER = {"role": "user", "content": "hello"}


@pytest.fixture(scope="module", params=["no token", "text", "special"])
def thinker(request: pytest.FixtureRequest, make_checkpoint: MakeCheckpoint) -> Path:
    """Folder of a checkpoint whose marks are no tokens, tokens, or tokens that are called special."""
    marks = () if request.param == "no token" else THINK_MARKS
    return make_checkpoint(QWEN_TEMPLATE, marks, request.param == "special")


def of(tokenizer: Tokenizer, name: str = "auto", /, **template_kwargs: bool) -> Thinking | None:
    chosen = ReasoningFormat.of(tokenizer, name)
    if chosen is None:
        return None
    return chosen.thinking(tokenizer.encode(tokenizer.template.rendered([USER], None, template_kwargs), around=False))


def thinking_of(folder: Path, **template_kwargs: bool) -> Thinking:
    thinking = of(opened(folder), "auto", **template_kwargs)
    assert thinking is not None
    return thinking


def test_the_template_says_how_it_thinks(make_checkpoint: MakeCheckpoint) -> None:
    def kind(template: str | None, name: str = "auto", **template_kwargs: bool) -> type[ReasoningParser] | None:
        thinking = of(opened(make_checkpoint(template)), name, **template_kwargs)
        return None if thinking is None else type(thinking.parser())

    plain = "{% for message in messages %}{{ message.content }}{% endfor %}"
    assert (kind(plain), kind(QWEN_TEMPLATE), kind(HARMONY_TEMPLATE)) == (None, ThinkParser, ChannelParser)
    assert kind(QWEN_TEMPLATE, enable_thinking=False) is AnswerOnly
    assert kind(QWEN_TEMPLATE, enable_thinking=True) is ThinkParser
    assert (kind(QWEN_TEMPLATE, "none"), kind(plain, "think")) == (None, ThinkParser)
    assert kind(QWEN_TEMPLATE, "openai") is ChannelParser
    assert ReasoningFormat.of(opened(make_checkpoint(None)), "auto") is None
    assert ReasoningFormat.of(None, "think") is None


def test_the_option_names_what_there_is() -> None:
    assert set(serve_config.REASONING_PARSERS) == {"auto", "none", *REASONING_FORMATS}
    with pytest.raises(ValueError, match="reasoning_parser='qwen' is unknown: choose one of auto, none, openai, think"):
        serve_config.ServeConfig(reasoning_parser="qwen")


def test_a_prompt_that_has_begun_a_thought(make_checkpoint: MakeCheckpoint) -> None:
    for marks in ((), THINK_MARKS):
        folder = make_checkpoint(OPENING, marks)
        assert read(thinking_of(folder).parser(), ["Hm.</think>Yes."]) == [(T, "Hm."), (A, "Yes.")]
        assert read(thinking_of(folder, enable_thinking=False).parser(), ["Hm.</think>Yes."]) == [(A, "Hm.</think>Yes.")]


def sort(thinking: Thinking, tokens: Sequence[int]) -> tuple[int, list[int]]:
    """How many are thought, and those of the answer, given one by one and all at once."""
    each, whole = thinking.sorter(), thinking.sorter()
    answer = [place for at, token in enumerate(tokens) for place in each.push([(token, at)])] + each.flush()
    assert answer == whole.push((token, at) for at, token in enumerate(tokens)) + whole.flush()
    assert each.thought_tokens == whole.thought_tokens
    return each.thought_tokens, [tokens[at] for at in answer]


def test_which_tokens_are_thought(thinker: Path) -> None:
    tokenizer, thinking = opened(thinker), thinking_of(thinker)
    encoded: Callable[[str], list[int]] = tokenizer.encode
    thought, answer = encoded("<think>hm \u00e9\u4f60</think>"), encoded("hello \u4f60")
    assert sort(thinking, thought + answer) == (len(thought), answer)
    assert sort(thinking, thought + encoded("\n\n") + answer) == (len(thought), answer), "white space between is neither"
    assert sort(thinking, answer) == (0, answer)
    assert sort(thinking, encoded("<th") + answer) == (0, encoded("<th") + answer)
    assert sort(thinking, encoded("<th")) == (0, encoded("<th"))
    assert sort(thinking, thought[:-1]) == (len(thought) - 1, [])
    assert sort(thinking_of(thinker, enable_thinking=False), thought) == (0, thought)


def test_which_tokens_are_thought_on_channels(make_checkpoint: MakeCheckpoint) -> None:
    for special in (False, True):
        folder = make_checkpoint(HARMONY_TEMPLATE, CHANNEL_MARKS, special)
        tokenizer = opened(folder)
        thought = tokenizer.encode("<|channel|>analysis<|message|>hm<|end|>")
        between = tokenizer.encode("<|start|>assistant<|channel|>final<|message|>")
        answer = tokenizer.encode("hello")
        assert sort(thinking_of(folder), thought + between + answer) == (len(thought), answer)
        call = tokenizer.encode(CALL)
        assert sort(thinking_of(folder), thought + call) == (len(thought), call)


NUMBER = Grammar("json_schema", json.dumps({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}))
OWN: list[tuple[Grammar, str, str]] = [
    (NUMBER, '{"a": 1}', '{"b": 1}'),
    (Grammar("regex", "a/b|c"), "a/b", "ab"),
    (Grammar("lark", 'start: "x" text\ntext: "y"'), "xy", "yx"),
]


@pytest.mark.parametrize(("own", "right", "wrong"), OWN)
def test_a_grammar_holds_behind_the_thought(thinker: Path, own: Grammar, right: str, wrong: str) -> None:
    tokenizer, known = opened(thinker), vocabulary(thinker)
    grammar = Grammar(own.kind, own.text, thinking_of(thinker).preamble)

    def accepted(output: str) -> bool:
        return accepts(grammar, known, tokenizer, output)

    assert accepted(right)
    assert accepted(f"<think>\nhm {wrong} {right}\n</think>\n\n{right}")
    assert not accepted(wrong)
    assert not accepted(f"<think>hm</think>{wrong}")
    assert not accepted(f"<think>hm {right}"), "a thought is closed"
    assert not accepts(own, known, tokenizer, f"<think>hm</think>{right}")


def test_a_grammar_where_the_prompt_has_begun_the_thought(make_checkpoint: MakeCheckpoint) -> None:
    for marks in ((), THINK_MARKS):
        folder = make_checkpoint(OPENING, marks)
        tokenizer, known = opened(folder), vocabulary(folder)
        grammar = Grammar(NUMBER.kind, NUMBER.text, thinking_of(folder).preamble)
        assert accepts(grammar, known, tokenizer, 'hm\n</think>{"a": 1}')
        assert not accepts(grammar, known, tokenizer, '{"a": 1}')
        assert thinking_of(folder, enable_thinking=False).preamble == ""


def test_the_end_of_a_thought_is_not_spelled(make_checkpoint: MakeCheckpoint) -> None:
    """Readers would take it for the end, and the grammar would not."""
    folder = make_checkpoint(QWEN_TEMPLATE, THINK_MARKS)
    tokenizer, known = opened(folder), vocabulary(folder)
    grammar = Grammar(NUMBER.kind, NUMBER.text, thinking_of(folder).preamble)
    spelled = [token for letter in "</think>" for token in tokenizer.encode(letter)]
    tokens = [*tokenizer.encode("<think>hm"), *spelled, *tokenizer.encode('</think>{"a": 1}')]
    assert tokenizer.decode(tokens) == '<think>hm</think></think>{"a": 1}'
    assert compile_grammar(grammar, known).try_consume_tokens(tokens) < len(tokens)


def test_a_grammar_on_channels(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint(HARMONY_TEMPLATE, CHANNEL_MARKS, special=True)
    tokenizer, thinking = opened(folder), thinking_of(folder)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|return|>"}')
    known = load_tokenizer(folder, 420, tuple(tokenizer.encode("<|return|>")))
    thought, final = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant", "<|channel|>final<|message|>"
    grammar = Grammar(NUMBER.kind, NUMBER.text, thinking.preamble)
    for begin in (final, thought + final, thought + thought + final):
        assert accepts(grammar, known, tokenizer, begin + '{"a": 1}')
    assert not accepts(grammar, known, tokenizer, thought + '{"a": 1}')
    calls = Grammar("lark", 'start: "call"', thinking.call_preamble)
    assert accepts(calls, known, tokenizer, thought + "call")
    assert accepts(calls, known, tokenizer, "call")
    assert accepts(calls, known, tokenizer, thought + final + "call"), "as calls, or an answer in their place"
