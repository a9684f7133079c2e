"""Rows that follow grammars: masks that come in time, restarts, failures that stay with their row."""

import json
import re
import threading
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer

from scheduler.protocol.messages import NO_TOKEN
from scheduler.protocol.sampling import Grammar
from tests.workers.sampling.test_grammar import EOS, PERSON, TINY
from workers.sampling import constraints as module
from workers.sampling.constraints import Allowed, Constraints
from workers.sampling.grammar import GrammarError, compile_grammar, load_tokenizer

VOCAB = 4096
NOTHING = np.empty(0, np.int32)
WORD = Grammar("regex", "[a-z]{3,9}")
PAIR = Grammar("lark", 'start: "yes" | "no"')
JSON = Grammar("json_schema", json.dumps(PERSON))
BAD = Grammar("regex", "(")


@pytest.fixture(scope="module")
def tokenizer() -> LLTokenizer:
    return load_tokenizer(TINY, VOCAB, EOS)


@pytest.fixture
def constraints(tokenizer: LLTokenizer) -> Constraints:
    return Constraints(lambda: tokenizer, VOCAB, 1)


def ask(constraints: Constraints, *rows: int) -> Allowed:
    allowed = constraints.allowed(np.array(rows))
    assert allowed is not None
    return allowed


def ids(allowed: Allowed, at: int = 0) -> list[int]:
    """What the constrained sample `at` may be."""
    return [int(token) for token in np.flatnonzero(np.unpackbits(allowed.bits[at].view(np.uint8), bitorder="little"))]


def walk(constraints: Constraints, row: int, seed: int, most: int = 400) -> list[int]:
    """Random allowed tokens up to the end."""
    numbers, output = np.random.default_rng(seed), list[int]()
    while len(output) < most:
        allowed = ask(constraints, row)
        token = int(numbers.choice(ids(allowed)))
        if token in EOS:
            return output
        output.append(token)
        constraints.advance(allowed, np.array([token]))
    return output


def text_of(tokenizer: LLTokenizer, output: list[int]) -> str:
    return tokenizer.decode_bytes(output).decode()


def test_whatever_is_allowed_matches(constraints: Constraints, tokenizer: LLTokenizer) -> None:
    for seed in range(20):
        for row, grammar in enumerate((WORD, PAIR)):
            constraints.release(row)
            constraints.admit(row, grammar, NOTHING)
        assert re.fullmatch(WORD.text, text_of(tokenizer, walk(constraints, 0, seed)))
        assert text_of(tokenizer, walk(constraints, 1, seed)) in ("yes", "no")


def test_whatever_is_allowed_is_json_of_the_schema(constraints: Constraints, tokenizer: LLTokenizer) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": ["x", 1]}, "b": {"type": "boolean"}}, "required": ["a"],
              "additionalProperties": False}  # fmt: skip
    for seed in range(20):
        constraints.release(0)
        constraints.admit(0, Grammar("json_schema", json.dumps(schema)), NOTHING)
        jsonschema.validate(json.loads(text_of(tokenizer, walk(constraints, 0, seed))), schema)


def test_only_ends_may_follow_a_complete_output(constraints: Constraints, tokenizer: LLTokenizer) -> None:
    constraints.admit(0, PAIR, np.array(tokenizer.tokenize_str("yes"), np.int32))
    assert ids(ask(constraints, 0)) == sorted(EOS)


def test_a_restart_is_where_it_was(constraints: Constraints) -> None:
    constraints.admit(0, JSON, NOTHING)
    output = walk(constraints, 0, seed=3, most=12)
    constraints.admit(1, JSON, np.array(output, np.int32))
    allowed = ask(constraints, 0, 1)
    assert (allowed.bits[0] == allowed.bits[1]).all()


def test_rows_without_a_grammar_are_not_spoken_of(constraints: Constraints) -> None:
    constraints.admit(4, None, NOTHING)
    assert constraints.allowed(np.array([4, 5])) is None
    constraints.admit(7, WORD, NOTHING)
    assert constraints.allowed(np.array([4, 5])) is None
    assert ask(constraints, 4, 7, 5).samples.tolist() == [1]
    constraints.release(7)
    assert constraints.allowed(np.array([7])) is None


def test_a_token_of_an_ended_lease_does_not_move_the_one_that_took_over_its_row(constraints: Constraints) -> None:
    constraints.admit(0, PAIR, NOTHING)
    before = ask(constraints, 0)
    constraints.release(0)
    constraints.admit(0, WORD, NOTHING)
    beginning = ids(ask(constraints, 0))
    constraints.advance(before, np.array([ids(before)[0]]))
    allowed = ask(constraints, 0)
    assert ids(allowed) == beginning
    assert not len(allowed.failed)


def test_a_grammar_that_cannot_be_compiled_fails_its_own_row(constraints: Constraints) -> None:
    constraints.admit(0, WORD, NOTHING)
    constraints.admit(1, BAD, NOTHING)
    allowed = ask(constraints, 0, 1)
    assert allowed.failed.tolist() == [1]
    assert len(ids(allowed, 1)) == VOCAB, "sampling itself must go on"
    constraints.advance(allowed, np.array([ids(allowed)[0], 5]))
    assert ask(constraints, 0, 1).failed.tolist() == [1]


def test_a_token_that_was_not_allowed_fails_its_own_row(constraints: Constraints, tokenizer: LLTokenizer) -> None:
    constraints.admit(0, PAIR, NOTHING)
    constraints.admit(1, WORD, NOTHING)
    constraints.admit(2, PAIR, np.array(tokenizer.tokenize_str("maybe"), np.int32))
    allowed = ask(constraints, 0, 1, 2)
    assert allowed.failed.tolist() == [2]
    constraints.advance(allowed, np.array([tokenizer.tokenize_str("z")[0], ids(allowed, 1)[0], 0]))
    assert ask(constraints, 0, 1, 2).failed.tolist() == [0, 2]


def test_a_row_of_which_nothing_could_be_drawn_takes_no_other_along(constraints: Constraints) -> None:
    """Its logits were not finite: it ends, and the rank makes the next masks of those beside it."""
    constraints.admit(0, WORD, NOTHING)
    constraints.admit(1, WORD, NOTHING)
    allowed = ask(constraints, 0, 1)
    beginning = ids(allowed)
    constraints.advance(allowed, np.array([NO_TOKEN, next(token for token in beginning if token not in EOS)]))
    after = ask(constraints, 0, 1)
    assert ids(after) == beginning
    assert ids(after, 1) != beginning
    assert not len(after.failed)


def test_without_a_tokenizer_a_row_fails_and_the_rank_goes_on(tmp_path: Path) -> None:
    bare = Constraints(lambda: load_tokenizer(tmp_path, VOCAB, EOS), VOCAB, 1)
    bare.admit(0, WORD, NOTHING)
    assert ask(bare, 0).failed.tolist() == [0]


def test_a_fault_of_our_own_is_not_taken_for_a_bad_grammar() -> None:
    def broken() -> LLTokenizer:
        raise MemoryError("no room")

    faulty = Constraints(broken, VOCAB, 1)
    faulty.admit(0, WORD, NOTHING)
    with pytest.raises(MemoryError):
        ask(faulty, 0)


def test_one_grammar_is_compiled_once(constraints: Constraints, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Grammar] = []

    def count(grammar: Grammar, tokenizer: LLTokenizer) -> LLMatcher:
        compiled.append(grammar)
        return compile_grammar(grammar, tokenizer)

    monkeypatch.setattr(module, "compile_grammar", count)
    monkeypatch.setattr(module, "MOST_COMPILED", 2)
    for row, grammar in enumerate((WORD, PAIR, WORD, JSON, WORD, PAIR)):
        constraints.admit(row, grammar, NOTHING)
        ask(constraints, row)  # two threads compile: which of two grammars leaves the store first would be theirs to say
    assert compiled == [WORD, PAIR, JSON, PAIR]


def test_masks_are_made_while_another_grammar_compiles(tokenizer: LLTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = threading.Event()

    def compile_slowly(grammar: Grammar, tokenizer: LLTokenizer) -> LLMatcher:
        assert grammar != JSON or slow.wait(timeout=60)
        return compile_grammar(grammar, tokenizer)

    monkeypatch.setattr(module, "compile_grammar", compile_slowly)
    constraints = Constraints(lambda: tokenizer, VOCAB, 1)
    constraints.admit(0, WORD, NOTHING)
    allowed = ask(constraints, 0)
    constraints.admit(1, JSON, NOTHING)
    constraints.advance(allowed, np.array([ids(allowed)[0]]))
    assert ids(ask(constraints, 0))
    slow.set()
    assert not len(ask(constraints, 1).failed)


def test_a_grammar_error_is_a_value_error() -> None:
    assert issubclass(GrammarError, ValueError)


def test_a_grammar_that_takes_long_keeps_neither_the_next_one_nor_a_step(
    constraints: Constraints, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, ready = threading.Event(), threading.Event()

    def compile_slowly(grammar: Grammar, tokenizer: LLTokenizer) -> LLMatcher:
        if grammar is WORD:
            assert slow.wait(60.0)
        return compile_grammar(grammar, tokenizer)

    monkeypatch.setattr(module, "compile_grammar", compile_slowly)
    constraints.on_opened = ready.set
    constraints.admit(0, WORD, NOTHING)
    constraints.admit(1, PAIR, NOTHING)
    assert ready.wait(60.0), "the second is ready before the first"
    assert constraints.opening() == (0,)
    assert len(ids(ask(constraints, 1))) > 0
    ready.clear()
    slow.set()
    assert ready.wait(60.0)
    assert constraints.opening() == ()
    assert len(ids(ask(constraints, 0))) > 0
    constraints.admit(2, WORD, NOTHING)
    constraints.release(2)
    assert constraints.opening() == (), "nobody waits for a row that has left"
