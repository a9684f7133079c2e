"""Errors name options as users write them, never by what they are called inside."""

import ast
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from cluster.config import EngineConfig
from deploy.config.serve import ServeConfig
from kvcache.layout import BlockLayout
from scheduler.protocol.sampling import SamplingParams
from tests.shared.sources import parsed

REPOSITORY = Path(__file__).resolve().parents[3]
ROOMS = ("kvcache", "scheduler", "workers", "cluster", "deploy")
OPTIONS = {each.name for record in (EngineConfig, ServeConfig) for each in fields(record)} | {*SamplingParams.__struct_fields__}
ADVICE = re.compile(r"\b(?:raise|lower|choose|set|use|smaller|larger|another) (?:a |an |the )?([a-z]+(?:_[a-z]+)+)")
FIELDS = {"max_position_embeddings", "cache_salt", "prompt_token_ids", "guided_json", "guided_regex", "tool_choice"}
"""Of checkpoints and of requests: they too are what users write."""


def messages(room: str) -> Iterator[tuple[str, str]]:
    """(where, a text as it is written, with {} for what is put in) of every `raise`."""
    for file in sorted((REPOSITORY / room).rglob("*.py")):
        for node in ast.walk(parsed(file)):
            if isinstance(node, ast.Raise) and node.exc is not None:
                where = f"{file.relative_to(REPOSITORY)}:{node.lineno}"
                texts = (part for part in ast.walk(node.exc) if isinstance(part, ast.Constant | ast.JoinedStr))
                yield from ((where, text_of(part)) for part in texts)


def text_of(part: ast.Constant | ast.JoinedStr) -> str:
    values = part.values if isinstance(part, ast.JoinedStr) else [part]
    return "".join(str(value.value) if isinstance(value, ast.Constant) else "{}" for value in values)


@pytest.mark.parametrize("room", ROOMS)
def test_what_a_message_says_to_change_can_be_changed(room: str) -> None:
    advised = [(where, name) for where, message in messages(room) for name in ADVICE.findall(message)]
    assert not [(where, name) for where, name in advised if name not in OPTIONS | FIELDS]


def test_a_pool_that_holds_no_block() -> None:
    layout = BlockLayout(block_size=256, layers=4, kv_heads=2, head_dim=16, dtype="float32")
    with pytest.raises(ValueError, match="raise kv_memory or lower block_size"):
        layout.blocks_in(1000)
