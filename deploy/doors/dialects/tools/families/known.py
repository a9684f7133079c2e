"""The formats that are read here, and which of them a chat template shows to its model."""

from collections.abc import Callable

from deploy.doors.dialects.tools.families.format import ToolFormat
from deploy.doors.dialects.tools.families.named import DEEPSEEK_V3, DEEPSEEK_V31, KIMI_K2, MISTRAL_V11, OPENAI
from deploy.doors.dialects.tools.families.objects import HERMES, LLAMA3_JSON, MISTRAL
from deploy.doors.dialects.tools.families.pythonic import PYTHONIC
from deploy.doors.dialects.tools.families.tagged import GLM45, QWEN3_CODER

TOOL_FORMATS: dict[str, ToolFormat] = {
    form.name: form
    for form in (
        HERMES, QWEN3_CODER, LLAMA3_JSON, PYTHONIC, MISTRAL, MISTRAL_V11, DEEPSEEK_V3, DEEPSEEK_V31, GLM45, KIMI_K2, OPENAI,
    )
}  # fmt: skip

_SIGNS: tuple[tuple[ToolFormat, Callable[[str], bool]], ...] = (
    (OPENAI, lambda text: "<|channel|>" in text and "to=functions." in text),
    (KIMI_K2, lambda text: KIMI_K2.begins[0] in text),
    (DEEPSEEK_V3, lambda text: DEEPSEEK_V3.begins[0] in text and "```json" in text),
    (DEEPSEEK_V31, lambda text: DEEPSEEK_V31.begins[0] in text),
    (MISTRAL_V11, lambda text: "[TOOL_CALLS]" in text and "[ARGS]" in text),
    (MISTRAL, lambda text: "[TOOL_CALLS]" in text),
    (GLM45, lambda text: "<tool_call>" in text and "<arg_key>" in text),
    (QWEN3_CODER, lambda text: "<function=" in text and "<parameter=" in text),
    (HERMES, lambda text: "<tool_call>" in text and "<function=" not in text),
    (PYTHONIC, lambda text: "[func_name1(" in text),
    (LLAMA3_JSON, lambda text: '"name": ' in text and '"parameters": ' in text),
)
"""What only a template of that family writes. The first that holds counts."""


def format_shown(template: str) -> ToolFormat | None:
    """By what the chat template shows the model. None: no format that is known here."""
    return next((form for form, shown in _SIGNS if shown(template)), None)
