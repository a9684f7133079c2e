"""Grammars against a checkpoint's vocabulary: reading the tokenizer, compiling, and refusing what cannot be compiled.

Imports llguidance and the wire type; no torch, so that a request can be checked at the door.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, assert_never

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.numpy import fill_next_token_bitmask

from scheduler.protocol.sampling import Grammar
from workers.sampling.tokenizer_files import has_tokenizer, open_tokenizer

WHITE_SPACE = r"\x20|\r?\n[\x20\t]{0,32}"
"""Between the parts of a JSON text: one blank, or a new line and its indent. Without a bound a model that has lost its way
writes blanks until max_tokens."""

_LIMITS = LLParserLimits(verbose_errors=False)  # a message says what is wrong, it does not repeat the whole grammar


class GrammarError(ValueError):
    """The grammar cannot be followed with this checkpoint; the message has the library's words."""


def load_tokenizer(checkpoint: Path, vocab_size: int, eos_ids: tuple[int, ...]) -> LLTokenizer:
    """Reads the checkpoint's vocabulary as bytes, which is what a grammar is matched against. Takes about a second for
    150,000 tokens: do it once, in a thread.

    vocab_size: of the model; ids beyond the tokenizer's own match nothing. eos_ids: what may follow a complete output, beside
    the tokenizer's own end.
    Errors: GrammarError where there is no tokenizer, or one that it cannot read, or no end-of-sequence id.
    """
    if not has_tokenizer(checkpoint):
        raise GrammarError(f"there is no tokenizer in {checkpoint}, and a grammar is matched against the tokens' text")
    try:
        settings = _tokenizer_json(checkpoint)
        own = _own_end(checkpoint, settings)
        ends = sorted(end for end in {*eos_ids, *own} if 0 <= end < vocab_size)
        if not ends:
            raise GrammarError("the checkpoint names no end-of-sequence id, so no output could end: set its eos_token_id")
        several = ends if len(ends) > 1 else ends[0]  # older releases of the library take one id only
        return LLTokenizer(json.dumps(settings), n_vocab=vocab_size, eos_token=several)
    except GrammarError:
        raise
    except Exception as error:  # transformers and llguidance raise whatever their parsers raise
        raise GrammarError(f"no grammar can be matched with the tokenizer in {checkpoint}: {error}") from error


def check(grammar: Grammar, tokenizer: LLTokenizer) -> tuple[str, ...]:
    """Compiles the grammar once (milliseconds; a large schema a fraction of a second), and looks whether an output can begin.
    Returns what of a schema that asks to be read leniently is passed over. Errors: GrammarError."""
    wrong, messages = LLMatcher.validate_grammar_with_warnings(_source(grammar), tokenizer, limits=_LIMITS)
    if wrong:
        raise GrammarError(f"{grammar.kind}: {messages[0].strip()}")
    matcher = compile_grammar(grammar, tokenizer)
    mask = np.zeros((1, -(-tokenizer.vocab_size // 32)), np.int32)
    fill_next_token_bitmask(matcher, mask)
    if matcher.is_error() or not mask.any():
        why = matcher.get_error().strip().partition("\n")[0]
        raise GrammarError(f"{grammar.kind}: no text can match it, or none can begin{f' ({why})' if why else ''}")
    return tuple(message.strip() for message in messages)


def compile_grammar(grammar: Grammar, tokenizer: LLTokenizer) -> LLMatcher:
    """A matcher at the beginning of an output. What `check` refuses compiles into a matcher that is in error, or raises
    GrammarError if it is no schema at all."""
    return LLMatcher(tokenizer, _source(grammar), log_level=0, limits=_LIMITS)


def _source(grammar: Grammar) -> str:
    """As the library reads it: Lark, or JSON that holds several grammars, of which the first may name the others."""
    source = _own_source(grammar)
    if not grammar.preamble:
        return source
    own = {"lark_grammar": source} if grammar.kind == "lark" else json.loads(source)["grammars"][0]
    first = {"name": "", "lark_grammar": f"start: preamble @own\n{grammar.preamble}"}
    return json.dumps({"grammars": [first, own | {"name": "own"}]})


def _own_source(grammar: Grammar) -> str:
    """Without its preamble."""
    match grammar.kind:
        case "json_schema":
            try:
                return LLMatcher.grammar_from_json_schema(grammar.text, defaults={"whitespace_pattern": WHITE_SPACE})
            except ValueError as error:
                raise GrammarError(f"json_schema: not an object in JSON: {error}") from None
        case "regex":
            return LLMatcher.grammar_from_regex(grammar.text)
        case "lark":
            return LLMatcher.grammar_from_lark(grammar.text)
        case _:
            assert_never(grammar.kind)


def _tokenizer_json(checkpoint: Path) -> dict[str, Any]:
    """The checkpoint's tokenizer as the tokenizers library writes it, without padding or truncation."""
    path = checkpoint / "tokenizer.json"
    text = path.read_text(encoding="utf-8") if path.exists() else str(open_tokenizer(checkpoint).backend_tokenizer.to_str())
    settings: dict[str, Any] = json.loads(text)
    return settings | {"padding": None, "truncation": None}


def _own_end(checkpoint: Path, settings: Mapping[str, Any]) -> list[int]:
    """The id of the end of text that tokenizer_config.json names, if the vocabulary has it."""
    path = checkpoint / "tokenizer_config.json"
    named = json.loads(path.read_text(encoding="utf-8")).get("eos_token") if path.exists() else None
    content = named.get("content") if isinstance(named, dict) else named
    return [token["id"] for token in settings.get("added_tokens") or () if token["content"] == content]
