"""A generation without a front end: what is told, and when."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.doors.openai.answers.logprobs import TokenNames
from deploy.frontend.generation.choice import OutputGap, Told
from deploy.frontend.generation.generation import Generation
from deploy.frontend.generation.submission import Submission
from deploy.frontend.outputs import ChoiceDelta, OutputDelta
from deploy.text.prompts import Prompt
from deploy.text.tokenizer import Tokenizer
from scheduler.protocol.messages import Failure, Finished, FinishReason, PromptLogprobs, TokenLogprobs
from scheduler.protocol.sampling import SamplingParams
from tests.shared.tokenizers import BOS, EOS, KINDS, SPECIAL, TURN_END, save, sentencepiece_bpe

STREAM = 40
PROMPT = Prompt([5, 6, 7])


class Caller:
    """One who waits for a generation, and counts how often it is woken."""

    def __init__(
        self, params: SamplingParams, tokenizer: Tokenizer | None = None, each_token: bool = True, prompt: Prompt = PROMPT,
        stop_ids: tuple[int, ...] = (), had: Sequence[Told] = (),
    ) -> None:  # fmt: skip
        prompt = replace(prompt, params=params)
        submission = Submission(STREAM, prompt, stop_ids, 16, 0.0)
        self.generation = Generation(submission, prompt, tokenizer, self._count, each_token, had)
        self.woken = 0
        self.prompt_tokens = len(prompt.token_ids)
        self.committed = [0] * params.n

    def _count(self, generation: Generation) -> None:
        assert generation is self.generation
        self.woken += 1

    def extend(self, tokens: Sequence[int], choice: int = 0, logprobs: Sequence[TokenLogprobs] = ()) -> int | None:
        position = self.prompt_tokens + self.committed[choice]
        self.committed[choice] += len(tokens)
        keep_tokens = self.generation.extend(STREAM + choice, position, tokens, logprobs)
        self.generation.wake()
        return keep_tokens

    def end(self, reason: FinishReason, choice: int = 0, message: str = "", failure: Failure = Failure.FAULT) -> None:
        self.generation.end(Finished(STREAM + choice, reason, 3, self.committed[choice], message, failure))
        self.generation.wake()

    def take_delta(self) -> OutputDelta:
        delta = self.generation.take_delta()
        assert delta is not None
        return delta


def test_each_delta_has_what_is_new() -> None:
    caller = Caller(SamplingParams(n=2))
    caller.extend([1, 2])
    caller.extend([3], choice=1)
    caller.extend([4])
    first = caller.take_delta()
    assert [(choice.index, choice.token_ids) for choice in first.choices] == [(0, [1, 2, 4]), (1, [3])]
    assert (first.finished, first.cached_tokens, first.ends) == (False, None, [])
    assert caller.generation.take_delta() is None
    caller.end(FinishReason.STOP, choice=1)
    second = caller.take_delta()
    assert [(choice.index, choice.token_ids, choice.finish_reason) for choice in second.choices] == [(1, [], "stop")]
    assert (second.finished, second.cached_tokens, [end.stream for end in second.ends]) == (False, 3, [STREAM + 1])
    caller.extend([5])
    caller.end(FinishReason.LENGTH)
    third = caller.take_delta()
    assert [(choice.index, choice.token_ids, choice.finish_reason) for choice in third.choices] == [(0, [5], "length")]
    assert (third.finished, [end.stream for end in third.ends]) == (True, [STREAM])
    assert caller.generation.take_delta() is None


def test_a_caller_is_woken_once_until_it_takes() -> None:
    caller = Caller(SamplingParams())
    caller.extend([1])
    caller.extend([2])
    assert caller.woken == 1
    caller.take_delta()
    caller.extend([3])
    assert caller.woken == 2
    caller.end(FinishReason.LENGTH)
    caller.take_delta()
    caller.generation.wake()
    assert caller.woken == 2


def test_who_wants_only_the_end_is_woken_at_the_end(tokenizer: Tokenizer) -> None:
    caller = Caller(SamplingParams(n=2), tokenizer, each_token=False)
    words = tokenizer.encode("hello world")
    for choice in range(2):
        caller.extend(words, choice)
        assert caller.generation.take().outputs[choice].text == ""
        assert caller.woken == 0
        caller.end(FinishReason.LENGTH, choice)
    assert caller.woken == 1
    assert [output.text for output in caller.generation.take().outputs] == ["hello world"] * 2


def test_a_stop_string_is_told_with_the_end(tokenizer: Tokenizer) -> None:
    caller = Caller(SamplingParams(stop=("d",)), tokenizer)
    words = tokenizer.encode("hello world, hello")
    keep_tokens = caller.extend(words)
    assert keep_tokens is not None
    assert tokenizer.decode(words[:keep_tokens]).startswith("hello world")
    assert caller.extend(words) is None
    [before] = caller.take_delta().choices
    assert (before.text, before.token_ids) == ("hello worl", words[:keep_tokens])
    assert (before.finish_reason, before.stop_reason) == (None, None)
    caller.end(FinishReason.LENGTH)
    [after] = caller.take_delta().choices
    assert (after.text, after.token_ids, after.finish_reason, after.stop_reason) == ("", [], "stop", "d")


@pytest.mark.parametrize("whole", [True, False])
def test_a_failure_after_a_stop_string_is_none(tokenizer: Tokenizer, whole: bool) -> None:
    """All that the client asked for is there: its group dies, or its deadline passes, before the scheduler has heard."""
    caller = Caller(SamplingParams(stop=("d",)), tokenizer)
    assert caller.extend(tokenizer.encode("hello world")) is not None
    caller.end(FinishReason.FAILED, message="its group has died")
    if whole:
        output = caller.generation.take()
        assert (output.error, output.outputs[0].finish_reason, output.outputs[0].text) == (None, "stop", "hello worl")
    else:
        delta = caller.take_delta()
        assert (delta.failed, delta.choices[0].finish_reason, delta.choices[0].text) == (None, "stop", "hello worl")
        assert [(end.reason, end.message, end.cached_tokens) for end in delta.ends] == [(FinishReason.STOP, "", 3)]


@pytest.mark.parametrize("each_token", [True, False])
def test_what_comes_after_the_end_is_nothing(tokenizer: Tokenizer, each_token: bool) -> None:
    """A deadline passes on the caller's thread while the front end's has the next tokens in hand."""
    caller = Caller(SamplingParams(), tokenizer, each_token)
    words = tokenizer.encode("hello")
    caller.extend(words)
    caller.end(FinishReason.FAILED, message="too late", failure=Failure.TIMED_OUT)
    assert caller.extend(words) is None
    output = caller.generation.take()
    assert (output.outputs[0].text, output.outputs[0].token_ids, output.error) == ("hello", words, "too late")


def test_log_probabilities_of_the_prompt_come_once_and_whole() -> None:
    caller = Caller(SamplingParams(prompt_logprobs=0))
    for part, whole in ((PromptLogprobs(1, (entry(-1.0),)), False), (PromptLogprobs(1, (entry(-1.0), entry(-2.0))), True)):
        caller.generation.fill_prompt(part)
        output = caller.generation.take()
        assert (output.prompt_logprobs is not None) == whole
    delta = caller.take_delta()
    assert delta.choices == []
    assert delta.prompt_logprobs is not None
    first, *rest = delta.prompt_logprobs
    assert first is None
    assert [{token: value.logprob for token, value in (each or {}).items()} for each in rest] == [{6: -1.0}, {7: -2.0}]
    caller.extend([1])
    assert caller.take_delta().prompt_logprobs is None


def test_log_probabilities_that_have_not_arrived_are_no_answer() -> None:
    caller = Caller(SamplingParams(prompt_logprobs=0))
    with pytest.raises(OutputGap, match="1 to 1 have not arrived"):
        caller.generation.fill_prompt(PromptLogprobs(2, (entry(-2.0),)))
    caller.generation.fill_prompt(PromptLogprobs(1, (entry(-1.0),)))
    with pytest.raises(OutputGap, match="last log-probabilities"):
        caller.end(FinishReason.LENGTH)
    with pytest.raises(OutputGap, match="0 log-probabilities came with 1 tokens"):
        Caller(SamplingParams(logprobs=0)).extend([1])


def entry(logprob: float) -> TokenLogprobs:
    return TokenLogprobs(logprob, (), ())


@pytest.fixture(scope="module", params=KINDS)
def of_each_kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    loaded = Tokenizer.load(save(KINDS[request.param](), tmp_path_factory.mktemp("tokenizer") / "files"))
    assert loaded is not None
    return loaded


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    loaded = Tokenizer.load(save(sentencepiece_bpe(), tmp_path_factory.mktemp("tokenizer") / "files"))
    assert loaded is not None
    return loaded


def told(tokenizer: Tokenizer, prompt: Prompt, tokens: Sequence[int], each_token: bool) -> tuple[str, bytes]:
    """The text of an output, and the bytes of its tokens as its log-probabilities have them."""
    caller = Caller(SamplingParams(logprobs=0), tokenizer, each_token, prompt)
    caller.extend(tokens, logprobs=[TokenLogprobs(-1.0, (), ()) for _ in tokens])
    caller.end(FinishReason.LENGTH)
    [choice] = caller.generation.take().outputs
    names = TokenNames(tokenizer)
    assert choice.logprobs is not None
    return choice.text, b"".join(
        names.content(token, entry[token].decoded_token) for token, entry in zip(tokens, choice.logprobs, strict=True)
    )


@given(
    asked=st.sampled_from(["", "the", "hello world", " café", "says ,"]),
    said=st.sampled_from(["the café niño", " again", "你好", "a.", ""]),
    answered=st.booleans(),
    each_token=st.booleans(),
    specials=st.lists(st.tuples(st.integers(0, 9), st.integers(0, len(SPECIAL) - 1)), max_size=3),
)
def test_the_bytes_of_an_output_s_tokens_are_its_text(
    of_each_kind: Tokenizer, asked: str, said: str, answered: bool, each_token: bool, specials: list[tuple[int, int]]
) -> None:
    tokens = of_each_kind.encode(said)
    for at, token in specials:
        tokens.insert(at, token)
    prompt = Prompt([BOS, *of_each_kind.encode(asked)], answered=answered)
    text, joined = told(of_each_kind, prompt, tokens, each_token)
    assert joined.decode() == text
    if answered:
        assert text == of_each_kind.decode(tokens)
    else:
        assert of_each_kind.decode(prompt.token_ids) + text == of_each_kind.decode([*prompt.token_ids, *tokens])


def test_an_answer_does_not_begin_with_a_blank_and_what_continues_does(sentencepiece: Tokenizer) -> None:
    tokens = [token for token in sentencepiece.encode("hello world") if token != BOS]
    asked = sentencepiece.encode("the café")
    assert told(sentencepiece, Prompt(asked, answered=True), tokens, each_token=True) == ("hello world", b"hello world")
    assert told(sentencepiece, Prompt(asked), tokens, each_token=True) == (" hello world", b" hello world")
    assert told(sentencepiece, Prompt([BOS]), tokens, each_token=True) == ("hello world", b"hello world")


@pytest.mark.parametrize("stop_ids", [(), (TURN_END,)])
def test_a_stop_string_that_names_a_special_token(sentencepiece: Tokenizer, stop_ids: tuple[int, ...]) -> None:
    """Whether or not the token ends the output by itself."""
    caller = Caller(SamplingParams(stop=("<|im_end|>",)), sentencepiece, stop_ids=stop_ids)
    tokens = [token for token in sentencepiece.encode("hello world") if token != BOS]
    assert caller.extend([*tokens, EOS]) is None
    assert caller.extend([TURN_END, *tokens]) == len(tokens) + 2
    caller.end(FinishReason.STOP)
    [choice] = caller.generation.take().outputs
    assert (choice.text, choice.finish_reason, choice.stop_reason) == (" hello world", "stop", "<|im_end|>")
    assert choice.token_ids == [*tokens, EOS, TURN_END]


def test_what_nobody_has_taken_is_counted_by_choice() -> None:
    caller = Caller(SamplingParams(n=2))
    caller.extend([1, 2])
    caller.extend([3], choice=1)
    assert [caller.generation.unread(stream) for stream in caller.generation.streams] == [2, 1]
    caller.take_delta()
    assert [caller.generation.unread(stream) for stream in caller.generation.streams] == [0, 0]
    caller.extend([4])
    assert [caller.generation.unread(stream) for stream in caller.generation.streams] == [1, 0]


def run_through(caller: Caller, pieces: Sequence[Sequence[int]], take_after: int) -> list[ChoiceDelta]:
    """All that is told of an output that comes in pieces. take_after: pieces, each time."""
    told: list[ChoiceDelta] = []
    for number, piece in enumerate(pieces, start=1):
        caller.extend(piece)
        if number % take_after == 0 and (delta := caller.generation.take_delta()) is not None:
            told += delta.choices
    caller.end(FinishReason.LENGTH)
    while (delta := caller.generation.take_delta()) is not None:
        told += delta.choices
    return told


@given(
    cuts=st.lists(st.integers(1, 11), max_size=5), take_after=st.integers(1, 4), tokens=st.integers(0, 12), ended=st.booleans()
)
def test_what_a_caller_had_comes_first_and_by_itself(
    tokenizer: Tokenizer, cuts: list[int], take_after: int, tokens: int, ended: bool
) -> None:
    """However the output comes, this time and the last time; its text is split where it was."""
    words = tokenizer.encode("hello world, hello the quick brown fox")[:12]
    bounds = sorted({0, *cuts, len(words)})
    pieces = [words[first:end] for first, end in pairwise(bounds)]
    params = SamplingParams(stop=("fox jumps",))
    had = Told(len(words), ended=True) if ended else Told(min(tokens, len(words)))
    before = Caller(params, tokenizer)
    one_by_one = run_through(before, [[word] for word in words], 1)
    expected = "".join(part.text for part in one_by_one)
    parts = run_through(Caller(params, tokenizer, had=[had]), pieces, take_after)
    assert "".join(part.text for part in parts) == expected
    assert [token for part in parts for token in part.token_ids] == words
    known = [part for part in parts if part.known]
    if had == Told():
        assert not known
        return
    assert parts[:1] == known
    assert known[0].token_ids == words[: had.tokens]
    upto = one_by_one if ended else one_by_one[: had.tokens]
    assert known[0].text == "".join(part.text for part in upto), "as it was told then"
    assert (known[0].finish_reason is not None) == ended
    assert len(parts) == 1 if ended else parts[-1].finish_reason == "length"
