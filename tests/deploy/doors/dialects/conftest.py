"""Tokenizers of checkpoints that call tools, trained here and now: one in the manner of Qwen, one in that of Llama 3."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from llguidance import LLTokenizer
from tokenizers import AddedToken

from deploy.text.tokenizer import Tokenizer
from tests.deploy.conftest import EOS, train_backend
from workers.sampling.grammar import load_tokenizer

QWEN_TEMPLATE = """\
{%- if tools %}<|im_start|>system
# Tools
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}
For each call, write <tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call><|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{- '\\n' + message.content }}
{%- for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"""

LLAMA_TEMPLATE = """\
{%- if tools %}Respond in the format {"name": function name, "parameters": dictionary of arguments}.
{% for tool in tools %}{{ tool | tojson(indent=4) }}
{% endfor %}{% endif %}
{%- for message in messages %}<|user|>
{%- if message.tool_calls %}{"name": "{{ message.tool_calls[0].function.name }}", "parameters":
{{- ' ' + (message.tool_calls[0].function.arguments | tojson) }}}
{%- else %}{{ message.content }}{% endif %}
{% endfor %}"""

TOOL_TOKENS = ("<tool_call>", "</tool_call>")

MakeCheckpoint = Callable[..., Path]


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """Writes a tokenizer's folder. tokens: added to the vocabulary. special: as tokens that are no text."""

    def make(template: str | list[dict[str, str]] | None, tokens: tuple[str, ...] = (), special: bool = False) -> Path:
        folder = tmp_path_factory.mktemp("tools")
        backend = train_backend()
        added = [AddedToken(token, normalized=False, special=special) for token in tokens]
        (backend.add_special_tokens if special else backend.add_tokens)(added)
        backend.save(str(folder / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | ({"chat_template": template} if template else {})))
        return folder

    return make


def opened(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer.load(folder)
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(scope="session")
def qwen_folder(make_checkpoint: MakeCheckpoint) -> Path:
    return make_checkpoint(QWEN_TEMPLATE, TOOL_TOKENS)


@pytest.fixture(scope="session")
def qwen(qwen_folder: Path) -> Tokenizer:
    return opened(qwen_folder)


@pytest.fixture(scope="session")
def llama_folder(make_checkpoint: MakeCheckpoint) -> Path:
    return make_checkpoint(LLAMA_TEMPLATE)


@pytest.fixture(scope="session")
def llama(llama_folder: Path) -> Tokenizer:
    return opened(llama_folder)


def vocabulary(folder: Path) -> LLTokenizer:
    return load_tokenizer(folder, 410, (EOS,))
