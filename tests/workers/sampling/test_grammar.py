"""Grammars compiled against the example's vocabulary: what they let through, and what is refused in which words."""

import json
import re
import shutil
from pathlib import Path

import pytest
from llguidance import LLTokenizer

from scheduler.protocol.sampling import Grammar
from workers.sampling.grammar import GrammarError, check, compile_grammar, load_tokenizer

TINY = Path(__file__).parents[3] / "examples" / "tiny"
EOS = (0, 2)
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer() -> LLTokenizer:
    return load_tokenizer(TINY, 4096, EOS)


def accepts(tokenizer: LLTokenizer, grammar: Grammar, text: str) -> bool:
    """The text is a whole output of the grammar."""
    matcher = compile_grammar(grammar, tokenizer)
    tokens = tokenizer.tokenize_str(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (r"a+b", "aab"),
        (r"a+b", "ab "),
        (r"a/b\d", "a/b7"),
        (r'"x"|y', '"x"'),
        (r"[^\n]*", "no new line"),
        (r"[^\n]*", "a new\nline"),
        (r"\w+é", "caféé"),
        (r"(?i)ab", "aB"),
        (r"", ""),
        (r"", "a"),
    ],
)
def test_a_regular_expression_is_matched_whole(tokenizer: LLTokenizer, pattern: str, text: str) -> None:
    assert accepts(tokenizer, Grammar("regex", pattern), text) == (re.fullmatch(pattern, text) is not None)


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ('{"name":"Ada","age":36}', True),
        ('{"name": "Ada", "age": 36}', True),
        ('{\n    "name": "Ada",\n    "age": 36\n}', True),
        ('{"name": "Ada"}', False),
        ('{"name": "Ada", "age": "36"}', False),
        ('{"name": "Ada", "age": 36, "more": 1}', False),
        ('{"name":    "Ada", "age": 36}', False),  # no room for a model to lose its way in
        ('{"name":\n\n"Ada", "age": 36}', False),
    ],
)
def test_json_of_a_schema_with_the_usual_white_space(tokenizer: LLTokenizer, text: str, valid: bool) -> None:
    assert accepts(tokenizer, Grammar("json_schema", json.dumps(PERSON)), text) == valid


def test_lark(tokenizer: LLTokenizer) -> None:
    grammar = Grammar("lark", 'start: "<" name ">"\nname: /[a-z]+/')
    check(grammar, tokenizer)
    assert accepts(tokenizer, grammar, "<abc>")
    assert not accepts(tokenizer, grammar, "<>")


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        (Grammar("regex", "a("), "unclosed group"),
        (Grammar("regex", "(?=a)b"), "look-around"),
        (Grammar("json_schema", '{"type": "objekt"}'), "objekt"),
        (Grammar("json_schema", '{"enum": []}'), "Unsatisfiable"),
        (Grammar("json_schema", '{"not": {}}'), "Unimplemented"),
        (Grammar("lark", "start: nothing"), "nothing"),
        (Grammar("lark", ""), "Empty"),
    ],
)
def test_a_bad_grammar_is_refused_in_the_librarys_words(tokenizer: LLTokenizer, grammar: Grammar, words: str) -> None:
    with pytest.raises(GrammarError, match=rf"^{grammar.kind}: (.|\n)*{re.escape(words)}"):
        check(grammar, tokenizer)
    assert compile_grammar(grammar, tokenizer).is_error()


@pytest.mark.parametrize("text", ["[]", "3", "", '{"type"'])
def test_a_schema_is_an_object(tokenizer: LLTokenizer, text: str) -> None:
    for use in (check, compile_grammar):
        with pytest.raises(GrammarError, match="not an object in JSON"):
            use(Grammar("json_schema", text), tokenizer)


def test_ids_beyond_the_tokenizers_own_match_nothing() -> None:
    wide = load_tokenizer(TINY, 4096 + 7, EOS)
    assert wide.vocab_size == 4096 + 7
    mask = int.from_bytes(compile_grammar(Grammar("regex", r"(?s).*"), wide).compute_bitmask(), "little")
    assert mask.bit_count() > 4000
    assert mask >> 4096 == 0


def test_padding_and_truncation_in_the_checkpoint_do_not_matter(tokenizer: LLTokenizer, tmp_path: Path) -> None:
    stored = json.loads((TINY / "tokenizer.json").read_text())
    stored["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    text = "def fibonacci(n):"
    assert load_tokenizer(tmp_path, 4096, EOS).tokenize_str(text) == tokenizer.tokenize_str(text)


def test_a_checkpoint_without_a_tokenizer_or_without_an_end_says_so(tmp_path: Path) -> None:
    with pytest.raises(GrammarError, match="no tokenizer in"):
        load_tokenizer(tmp_path, 4096, EOS)
    shutil.copy(TINY / "tokenizer.json", tmp_path)
    with pytest.raises(GrammarError, match="end-of-sequence"):
        load_tokenizer(tmp_path, 4096, ())
    with pytest.raises(GrammarError, match="end-of-sequence"):
        load_tokenizer(tmp_path, 4096, (-1, 4096))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(GrammarError, match=re.escape(str(tmp_path))):
        load_tokenizer(tmp_path, 4096, EOS)


@pytest.mark.parametrize("named", ["<|im_end|>", {"content": "<|im_end|>", "special": True}])
def test_an_output_may_end_with_the_tokenizer_s_own_end(tmp_path: Path, named: object) -> None:
    """config.json may name another one, or none."""
    shutil.copy(TINY / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": named}))
    for ends in ((), (0,)):
        matcher = compile_grammar(Grammar("regex", "a"), load_tokenizer(tmp_path, 4096, ends))
        matcher.consume_tokens(load_tokenizer(TINY, 4096, EOS).tokenize_str("a"))
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        assert [token for token in range(4096) if mask >> token & 1] == [*ends, 2]


def test_a_tokenizer_in_another_form_is_read_through_transformers(tokenizer: LLTokenizer, tmp_path: Path) -> None:
    stored = json.loads((TINY / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(stored["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in stored["merges"]]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    shutil.copy(TINY / "config.json", tmp_path)
    other = load_tokenizer(tmp_path, 4096, EOS)
    text = "café\n"
    assert other.decode_str(tokenizer.tokenize_str(text)) == text
