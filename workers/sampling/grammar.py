"""Grammars against a checkpoint's vocabulary: reading the tokenizer, compiling, and refusing what cannot be compiled.

Imports llguidance and the wire type; no torch, so that a request can be checked at the door.
"""

import json
from pathlib import Path
from typing import assert_never

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from scheduler.sampling import Grammar

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
WHITE_SPACE = r"\x20|\r?\n[\x20\t]{0,32}"
"""Between the parts of a JSON text: one blank, or a new line and its indent. Without a bound a model that has lost its way
writes blanks until max_tokens."""

_LIMITS = LLParserLimits(verbose_errors=False)  # a message says what is wrong, it does not repeat the whole grammar


class GrammarError(ValueError):
    """The grammar cannot be followed with this checkpoint; the message has the library's words."""


def load_tokenizer(checkpoint: Path, vocab_size: int, eos_ids: tuple[int, ...]) -> LLTokenizer:
    """Reads the checkpoint's vocabulary as bytes, which is what a grammar is matched against. Takes about a second for
    150,000 tokens: do it once, in a thread.

    vocab_size: of the model; ids beyond the tokenizer's own match nothing. eos_ids: what may follow a complete output.
    Errors: GrammarError where there is no tokenizer, or one that it cannot read, or no end-of-sequence id.
    """
    if not any((checkpoint / name).exists() for name in TOKENIZER_FILES):
        raise GrammarError(f"there is no tokenizer in {checkpoint}, and a grammar is matched against the tokens' text")
    if not eos_ids:
        raise GrammarError("the checkpoint names no end-of-sequence id, so no output could end: set its eos_token_id")
    try:
        ends = list(eos_ids) if len(eos_ids) > 1 else eos_ids[0]  # older releases of the library take one id only
        return LLTokenizer(_tokenizer_json(checkpoint), n_vocab=vocab_size, eos_token=ends)
    except Exception as error:  # transformers and llguidance raise whatever their parsers raise
        raise GrammarError(f"no grammar can be matched with the tokenizer in {checkpoint}: {error}") from error


def check(grammar: Grammar, tokenizer: LLTokenizer) -> None:
    """Compiles the grammar once (milliseconds; a large schema a fraction of a second). Errors: GrammarError."""
    wrong, messages = LLMatcher.validate_grammar_with_warnings(_source(grammar), tokenizer, limits=_LIMITS)
    if wrong:
        raise GrammarError(f"{grammar.kind}: {messages[0].strip()}")


def compile_grammar(grammar: Grammar, tokenizer: LLTokenizer) -> LLMatcher:
    """A matcher at the beginning of an output. What `check` refuses compiles into a matcher that is in error, or raises
    GrammarError if it is no schema at all."""
    return LLMatcher(tokenizer, _source(grammar), log_level=0, limits=_LIMITS)


def _source(grammar: Grammar) -> str:
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


def _tokenizer_json(checkpoint: Path) -> str:
    """The checkpoint's tokenizer as the tokenizers library writes it, without padding or truncation."""
    path = checkpoint / "tokenizer.json"
    if path.exists():
        return json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"padding": None, "truncation": None})
    from transformers import AutoTokenizer

    backend = AutoTokenizer.from_pretrained(str(checkpoint), local_files_only=True).backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    return str(backend.to_str())
