"""Conversations with tools, as chat templates show them."""

import json
from pathlib import Path
from typing import Any

import pytest

from deploy.doors.dialects.tools.families.known import TOOL_FORMATS
from deploy.doors.python.sources import read_source
from deploy.text.content import Content, Conversation, PromptError
from deploy.text.prompts import ModelLimits, PromptParser
from deploy.text.tokenizer import CHANNEL_MARKS, THINK_MARKS, TOOL_MARKS, Detokenizer, Tokenizer
from tests.deploy.conftest import EOS, MAX_TOKENS
from tests.deploy.doors.dialects.conftest import LLAMA_TEMPLATE, QWEN_TEMPLATE, TOOL_TOKENS, MakeCheckpoint, opened

LIMITS = ModelLimits(vocab_size=410, max_tokens=8 * MAX_TOKENS, eos_ids=(EOS,))
TOOL = {"type": "function", "function": {"name": "get", "parameters": {"type": "object", "properties": {}}}}
USER = {"role": "user", "content": "hello"}


def called(arguments: Any) -> dict[str, Any]:
    function = {"name": "get", "arguments": arguments}
    return {"role": "assistant", "content": None, "tool_calls": [{"id": "call_1", "type": "function", "function": function}]}


def shown(tokenizer: Tokenizer, messages: list[Any], **more: Any) -> str:
    """The prompt as text, special tokens included."""
    content, *_ = read_source({"messages": messages, **more})
    return "".join(map(tokenizer.token_text, ids_of(tokenizer, content)))


def ids_of(tokenizer: Tokenizer, content: Content) -> list[int]:
    return PromptParser(LIMITS, tokenizer).prompt(content).token_ids


def test_tools_are_shown(qwen: Tokenizer, llama: Tokenizer) -> None:
    assert json.dumps(TOOL) in shown(qwen, [USER], tools=[TOOL])
    assert json.dumps(TOOL, indent=4) in shown(llama, [USER], tools=[TOOL])
    assert "# Tools" not in shown(qwen, [USER])


def test_a_call_and_its_result(qwen: Tokenizer, llama: Tokenizer) -> None:
    messages = [USER, called('{"a": ["b"]}'), {"role": "tool", "tool_call_id": "call_1", "content": "42"}]
    text = shown(qwen, messages, tools=[TOOL])
    assert '<|im_start|>assistant\n<tool_call>\n{"name": "get", "arguments": {"a": ["b"]}}\n</tool_call><|im_end|>' in text
    assert "<|im_start|>tool\n42<|im_end|>" in text
    assert '{"name": "get", "parameters": {"a": ["b"]}}' in shown(llama, messages)
    assert shown(qwen, [USER, called({"a": ["b"]})]) == shown(qwen, [USER, called('{"a": ["b"]}')])


def test_arguments_that_are_no_json_are_shown_as_they_are(qwen: Tokenizer) -> None:
    assert '"arguments": "{\\"a"}' in shown(qwen, [USER, called('{"a')])
    assert '"arguments": "[[[' in shown(qwen, [USER, called("[" * 2000)])


def test_the_marks_of_a_call_are_single_tokens(qwen: Tokenizer) -> None:
    ids = ids_of(qwen, Conversation([USER, {**called({}), "content": ""}]))
    assert [text for text in map(qwen.token_text, ids) if text in TOOL_TOKENS] == list(TOOL_TOKENS)


def test_a_template_can_be_told_more(qwen: Tokenizer) -> None:
    assert shown(qwen, [USER], chat_template_kwargs={"enable_thinking": False}).endswith("<think></think>")
    assert not shown(qwen, [USER], chat_template_kwargs={"enable_thinking": True}).endswith("<think></think>")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"messages": [USER], "tools": {}}, "tools: expected array | null, got object"),
        ({"messages": [USER], "chat_template_kwargs": []}, "chat_template_kwargs: expected object | null, got array"),
        ({"messages": [USER], "chat_template_kwargs": {"chat_template": "x"}}, "chat_template is no variable of a template"),
        ({"messages": [USER], "chat_template_kwargs": {"messages": []}}, "messages is no variable of a template"),
        ({"messages": [USER], "chat_template_kwargs": {"tokenize": True}}, "tokenize is no variable of a template"),
        ({"messages": [{"role": "assistant"}]}, "messages[0] says nothing: give it content"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": 3}}]}]},
            "function.name: expected str",
        ),
        ({"messages": [{"role": "assistant", "tool_calls": ["x"]}]}, "messages[0].tool_calls[0]: expected object, got str"),
    ],
)
def test_refusals(qwen: Tokenizer, source: dict[str, Any], message: str) -> None:
    with pytest.raises(PromptError) as caught:
        ids_of(qwen, read_source(source)[0])
    assert message in str(caught.value)


def test_a_template_that_shows_no_tools(tokenizer: Tokenizer) -> None:
    with pytest.raises(PromptError, match=r"does not show tools to the model: leave tools out, or .*--chat-template"):
        ids_of(tokenizer, Conversation([USER], tools=[TOOL]))
    assert ids_of(tokenizer, Conversation([USER], tools=[]))


DEEPSEEK = """\
{%- for message in messages %}<|{{ message.role }}|>{{ message.content }}
{%- for call in message.tool_calls or [] %}
{{- '<｜tool▁call▁begin｜>' + call['function']['name'] + '<｜tool▁sep｜>' + call['function']['arguments'] }}
{%- endfor %}
{%- endfor %}"""


def test_arguments_are_text_to_a_template_that_joins_them(make_checkpoint: MakeCheckpoint) -> None:
    tokenizer = opened(make_checkpoint(DEEPSEEK))
    for given in ({"a": ["é"]}, '{"a": ["é"]}'):
        content, *_ = read_source({"messages": [USER, called(given)]})
        assert tokenizer.decode(ids_of(tokenizer, content)).endswith('get<｜tool▁sep｜>{"a": ["é"]}')
    assert tokenizer.template.rendered([USER, called('{"a')]).endswith('<｜tool▁sep｜>{"a')


def test_a_template_from_a_file(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """In place of the checkpoint's, whatever that is."""
    file = tmp_path / "template.jinja"
    file.write_text("\ufeff" + QWEN_TEMPLATE, encoding="utf-8")
    for own in (LLAMA_TEMPLATE, None, [{"name": "tool_use", "template": "x"}]):
        tokenizer = Tokenizer.load(make_checkpoint(own, TOOL_TOKENS), file)
        assert tokenizer is not None
        assert tokenizer.chat_template == QWEN_TEMPLATE
        assert shown(tokenizer, [USER]).startswith("<|im_start|>user\nhello")
    with pytest.raises(OSError, match="nowhere"):
        Tokenizer.load(make_checkpoint(None), tmp_path / "nowhere")
    file.write_text("{% if %}")
    with pytest.raises(ValueError, match=r"template\.jinja is no chat template: .*, in line 1"):
        Tokenizer.load(make_checkpoint(None), file)
    file.write_text("{{ raise_exception('no user without a system') }}")
    refusing = Tokenizer.load(make_checkpoint(None), file)
    assert refusing is not None
    with pytest.raises(PromptError, match="no user without a system"):
        shown(refusing, [USER])


def test_a_conversation_is_written_once(qwen: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    conversation = Conversation([USER], tools=[TOOL])
    ids_of(qwen, conversation)  # the first with tools asks whether the template shows any
    written: list[object] = []
    render = qwen.template._render

    def watch(*given: Any) -> str:
        written.append(given)
        return render(*given)

    monkeypatch.setattr(qwen.template, "_render", watch)
    ids_of(qwen, conversation)
    assert written == [([USER], [TOOL], {})]


@pytest.mark.parametrize("special", [False, True])
def test_marks_of_calls_are_text(make_checkpoint: MakeCheckpoint, special: bool) -> None:
    tokenizer = opened(make_checkpoint(QWEN_TEMPLATE, TOOL_TOKENS, special))
    ids = [*tokenizer.encode("hello <tool_call>\n{}\n</tool_call>"), EOS]
    assert None not in map(tokenizer.token_id, TOOL_TOKENS)
    detokenizer = Detokenizer(tokenizer.decode)
    pieces = [detokenizer.push([token]) for token in ids]
    assert "".join([*pieces, detokenizer.flush()]) == "hello <tool_call>\n{}\n</tool_call>"


def test_the_marks_of_every_family_are_text(make_checkpoint: MakeCheckpoint) -> None:
    tokenizer = opened(make_checkpoint(None, TOOL_MARKS, special=True))
    assert tokenizer.decode(tokenizer.encode("".join(TOOL_MARKS))) == "".join(TOOL_MARKS)
    marks = {mark for form in TOOL_FORMATS.values() for mark in form.marks}
    assert marks - set(TOOL_MARKS) == {"<|channel|>", "<|constrain|>", "<|message|>"}, "those of channels are no marks of calls"


def test_the_template_with_tools_is_the_one_that_is_read(make_checkpoint: MakeCheckpoint, qwen: Tokenizer) -> None:
    assert qwen.chat_template == QWEN_TEMPLATE
    assert opened(make_checkpoint(None)).chat_template == ""
    several = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": QWEN_TEMPLATE}]
    assert opened(make_checkpoint(several)).chat_template == QWEN_TEMPLATE
    assert opened(make_checkpoint([{"name": "rag", "template": "x"}])).chat_template == ""


def test_marks_of_channels_are_text_where_there_are_channels(make_checkpoint: MakeCheckpoint) -> None:
    shown = opened(make_checkpoint(None, (*CHANNEL_MARKS, *THINK_MARKS), special=True))
    text = "".join((*CHANNEL_MARKS, *THINK_MARKS))
    assert shown.decode(shown.encode(text)) == text
    plain = opened(make_checkpoint(None, ("<|start|>",), special=True))
    assert plain.decode(plain.encode("<|start|>a<|end|>")) == "a"
