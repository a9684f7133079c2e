"""`/v1/completions`, driven by the `openai` package over the checkpoint that ships with Manta."""

import math

import openai
import pytest
from openai.types import Completion

from deploy.config.load import EMBEDDED_MODEL
from deploy.config.serve import ServeConfig
from deploy.frontend.service.service import Service
from deploy.text.tokenizer import Tokenizer
from scheduler.server.stats import EngineStats
from tests.deploy.doors.http.conftest import MODEL, Host, Stats

PROMPT = "def add(a, b):\n"
LONG_PROMPT = "def add(a, b):\n    return a + b\n\n" * 40
UNUSUAL = "你好 🙂 and café"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    loaded = Tokenizer.load(EMBEDDED_MODEL)
    assert loaded is not None
    return loaded


def complete(client: openai.OpenAI, prompt: object = PROMPT, **fields: object) -> Completion:
    """Greedy, unless the fields say otherwise."""
    asked = {"model": MODEL, "prompt": prompt, "temperature": 0, "max_tokens": 8} | fields
    answer = client.completions.create(**asked)  # type: ignore[call-overload]
    assert isinstance(answer, Completion)
    return answer


def text_of(client: openai.OpenAI, prompt: object = PROMPT, **fields: object) -> str:
    return complete(client, prompt, **fields).choices[0].text


def forced(text: str, **extra: object) -> dict[str, object]:
    """Makes the model say exactly this."""
    return {"extra_body": {"guided_choice": [text]} | extra, "max_tokens": 64}


def test_model_and_shape(client: openai.OpenAI) -> None:
    answer = complete(client)
    assert (answer.object, answer.model, answer.id[:5]) == ("text_completion", MODEL, "cmpl-")
    assert [(choice.index, choice.finish_reason) for choice in answer.choices] == [(0, "length")]
    assert answer.choices[0].text
    assert answer.choices[0].logprobs is None


def test_prompt_in_every_form(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    ids, other = tokenizer.encode(PROMPT), tokenizer.encode("class A")
    alone = text_of(client, PROMPT), text_of(client, "class A")
    assert text_of(client, ids) == alone[0]
    for prompts in ([PROMPT, "class A"], [ids, other]):
        answer = complete(client, prompts)
        assert [(choice.index, choice.text) for choice in answer.choices] == [(0, alone[0]), (1, alone[1])]
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(ids) + len(other)


def test_max_tokens(client: openai.OpenAI) -> None:
    usage = complete(client, max_tokens=3, extra_body={"ignore_eos": True}).usage
    assert usage is not None
    assert (usage.completion_tokens, usage.total_tokens) == (3, 3 + usage.prompt_tokens)
    default = client.completions.create(model=MODEL, prompt=PROMPT, extra_body={"ignore_eos": True}).usage
    assert default is not None
    assert default.completion_tokens == 16


def test_n(client: openai.OpenAI) -> None:
    answer = complete(client, [PROMPT, "class A"], n=3, temperature=1.0, seed=5)
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert len({choice.text for choice in answer.choices[:3]}) > 1
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 6 * 8


def test_best_of(client: openai.OpenAI) -> None:
    asked = {"temperature": 1.0, "seed": 5, "logprobs": 0}
    every = complete(client, n=5, **asked)
    best = complete(client, n=2, best_of=5, **asked)

    def mean(position: int) -> float:
        logprobs = every.choices[position].logprobs
        assert logprobs is not None
        values = [value for value in logprobs.token_logprobs or () if value is not None]
        return math.fsum(values) / len(values)

    ranked = sorted(range(5), key=mean, reverse=True)
    assert [choice.text for choice in best.choices] == [every.choices[position].text for position in ranked[:2]]
    assert [choice.index for choice in best.choices] == [0, 1]
    assert best.usage == every.usage  # what was sampled and not returned has been paid for
    assert complete(client, best_of=3, temperature=1.0).choices[0].logprobs is None


@pytest.mark.parametrize("fields", [{"best_of": 2, "stream": True}, {"best_of": 1, "n": 2}, {"best_of": 17}])
def test_best_of_refused(client: openai.OpenAI, fields: dict[str, object]) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model=MODEL, prompt=PROMPT, **fields)  # type: ignore[call-overload]
    assert refused.value.param == "best_of"


def test_suffix_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="fill in the middle") as refused:
        complete(client, suffix="return")
    assert refused.value.param == "suffix"


def test_echo(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    plain = text_of(client)
    assert text_of(client, echo=True) == PROMPT + plain
    assert text_of(client, tokenizer.encode(PROMPT), echo=True) == PROMPT + plain
    pieces = [
        chunk.choices[0].text
        for chunk in client.completions.create(model=MODEL, prompt=PROMPT, temperature=0, max_tokens=8, echo=True, stream=True)
    ]
    assert "".join(pieces) == PROMPT + plain


def test_echo_with_logprobs_shows_the_prompts(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(PROMPT)
    choice = complete(client, echo=True, logprobs=2, max_tokens=2).choices[0]
    table = choice.logprobs
    assert table is not None
    assert table.tokens is not None
    assert table.token_logprobs is not None
    assert table.top_logprobs is not None
    assert table.text_offset is not None
    assert "".join(table.tokens) == choice.text
    assert len(table.tokens) == len(table.token_logprobs) == len(table.top_logprobs) == len(ids) + 2
    assert table.token_logprobs[0] is None
    assert all(value is not None and value <= 0 for value in table.token_logprobs[1:])
    assert all(choice.text[at:].startswith(token) for at, token in zip(table.text_offset, table.tokens, strict=True))
    # The model given the beginning of a text finds its next token as likely as the echo of the whole says.
    prefix = complete(client, ids[:-1], max_tokens=1, logprobs=20).choices[0].logprobs
    assert prefix is not None
    assert prefix.top_logprobs is not None
    assert prefix.top_logprobs[0][tokenizer.token_text(ids[-1])] == pytest.approx(table.token_logprobs[len(ids) - 1], abs=0.1)


def test_no_output_tokens_but_the_echo_with_its_logprobs(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    """How a harness asks for the likelihood of a text."""
    ids = tokenizer.encode(PROMPT)
    whole = complete(client, echo=True, logprobs=2, max_tokens=2).choices[0].logprobs
    answer = complete(client, [PROMPT, PROMPT], echo=True, logprobs=2, max_tokens=0, temperature=1.0)
    assert whole is not None
    assert whole.token_logprobs is not None
    for choice in answer.choices:
        assert (choice.text, choice.finish_reason, choice.logprobs and choice.logprobs.tokens) == (
            PROMPT, "length", [tokenizer.token_text(token) for token in ids],
        )  # fmt: skip
        assert choice.logprobs is not None
        assert choice.logprobs.token_logprobs is not None
        assert choice.logprobs.token_logprobs[1:] == pytest.approx(whole.token_logprobs[1 : len(ids)], abs=0.05)
    assert answer.usage is not None
    assert (answer.usage.completion_tokens, answer.usage.prompt_tokens) == (0, 2 * len(ids))
    asked = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=0, echo=True, stream=True)
    chunks = [chunk.choices[0] for chunk in asked]
    assert ("".join(chunk.text for chunk in chunks), chunks[-1].finish_reason) == (PROMPT, "length")
    with pytest.raises(openai.BadRequestError, match="goes with echo") as refused:
        complete(client, max_tokens=0)
    assert refused.value.param == "max_tokens"


def test_a_nucleus_of_nothing_is_the_likeliest_token(client: openai.OpenAI) -> None:
    assert text_of(client, temperature=5.0, top_p=0) == text_of(client)


def test_logprobs(client: openai.OpenAI) -> None:
    choice = complete(client, logprobs=3, max_tokens=5, extra_body={"ignore_eos": True}).choices[0]
    table = choice.logprobs
    assert table is not None
    assert table.tokens is not None
    assert table.top_logprobs is not None
    assert table.token_logprobs is not None
    assert "".join(table.tokens) == choice.text
    for token, value, top in zip(table.tokens, table.token_logprobs, table.top_logprobs, strict=True):
        assert len(top) == 3
        assert max(top, key=lambda name: top[name]) == token  # greedy
        assert top[token] == value


def test_logprobs_of_parts_of_characters(client: openai.OpenAI) -> None:
    choice = complete(client, logprobs=0, **forced(UNUSUAL)).choices[0]
    assert choice.text == UNUSUAL
    table = choice.logprobs
    assert table is not None
    assert table.tokens is not None
    assert table.text_offset is not None
    assert table.tokens[:3] == ["bytes:\\xe4", "bytes:\\xbd", "bytes:\\xa0"]
    assert table.text_offset[:7] == [0, 0, 0, 1, 1, 1, 2]


def test_prompt_logprobs(client: openai.OpenAI, tokenizer: Tokenizer, stats: Stats) -> None:
    complete(client, LONG_PROMPT)
    ids = tokenizer.encode(LONG_PROMPT)
    answer = complete(client, LONG_PROMPT, max_tokens=1, extra_body={"prompt_logprobs": 1})
    entries = answer.choices[0].model_extra["prompt_logprobs"] if answer.choices[0].model_extra else None
    assert entries is not None
    assert len(entries) == len(ids)
    assert entries[0] is None
    for token, entry in zip(ids[1:], entries[1:], strict=True):
        assert entry[str(token)]["decoded_token"] == tokenizer.token_text(token)
        assert [one["rank"] for one in entry.values() if one["rank"] == 1]
    assert cached_tokens(answer) == 0  # it had to be computed whole
    with pytest.raises(openai.BadRequestError, match="cannot be streamed"):
        client.completions.create(model=MODEL, prompt=PROMPT, stream=True, extra_body={"prompt_logprobs": 1})
    assert stats().groups[0].up


def cached_tokens(answer: Completion) -> int | None:
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    return answer.usage.prompt_tokens_details.cached_tokens


def test_cached_tokens_are_exact(client: openai.OpenAI, tokenizer: Tokenizer, stats: Stats) -> None:
    def hits(before: EngineStats) -> int:
        return stats().cached_tokens - before.cached_tokens

    salted = {"extra_body": {"cache_salt": "exact"}}
    all_but_one = len(tokenizer.encode(LONG_PROMPT)) - 1  # in blocks of 256 whole blocks would be less
    assert all_but_one % 256 >= 32
    before = stats()
    assert (cached_tokens(complete(client, LONG_PROMPT, **salted)), hits(before)) == (0, 0)
    assert (cached_tokens(complete(client, LONG_PROMPT, **salted)), hits(before)) == (all_but_one, all_but_one)
    assert cached_tokens(complete(client, [LONG_PROMPT, LONG_PROMPT], **salted)) == 2 * all_but_one


def test_cache_salt_isolates(client: openai.OpenAI) -> None:
    for salt in ("one tenant", "another"):
        asked = {"extra_body": {"cache_salt": salt}}
        assert cached_tokens(complete(client, LONG_PROMPT, **asked)) == 0
        assert cached_tokens(complete(client, LONG_PROMPT, **asked)) != 0


def test_stop_strings_across_token_borders(client: openai.OpenAI) -> None:
    for stop in (["🙂 an"], "🙂 an", ["zzz", "🙂 an"], ["d ca", "🙂 an"]):
        choice = complete(client, stop=stop, **forced(UNUSUAL)).choices[0]
        assert (choice.text, choice.finish_reason) == ("你好 ", "stop")
        assert choice.model_extra == {"stop_reason": "🙂 an"}


def test_multi_byte_text_is_never_split(client: openai.OpenAI) -> None:
    chunks = client.completions.create(model=MODEL, prompt=PROMPT, stream=True, **forced(UNUSUAL))  # type: ignore[call-overload]
    pieces = [chunk.choices[0].text for chunk in chunks]
    assert "".join(pieces) == UNUSUAL
    assert len(pieces) > 4


def test_stop_token_ids(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode(text_of(client, max_tokens=6))
    choice = complete(client, extra_body={"stop_token_ids": [tokens[2]]}).choices[0]
    assert choice.finish_reason == "stop"
    assert choice.model_extra == {"stop_reason": tokens[2]}


def test_seed(client: openai.OpenAI) -> None:
    hot = {"temperature": 1.5, "max_tokens": 12}
    assert text_of(client, seed=7, **hot) == text_of(client, seed=7, **hot)
    assert len({text_of(client, seed=seed, **hot) for seed in (1, 2, -3, 2**63 - 1)}) > 1


def test_temperature_top_p_top_k_min_p(client: openai.OpenAI) -> None:
    greedy = text_of(client)
    hot = {"temperature": 2.0, "seed": 3}
    assert text_of(client, **hot) != greedy
    assert text_of(client, **hot, top_p=1e-6) == greedy
    assert text_of(client, **hot, extra_body={"top_k": 1}) == greedy
    assert text_of(client, **hot, extra_body={"min_p": 1.0}) == greedy
    assert text_of(client, **hot, extra_body={"top_k": -1}) == text_of(client, **hot)


def test_penalties(client: openai.OpenAI) -> None:
    prompt, long = "a a a a a a a a", {"max_tokens": 48, "extra_body": {"ignore_eos": True}}
    plain = text_of(client, prompt, **long)
    assert text_of(client, prompt, **long, frequency_penalty=2.0) != plain
    assert text_of(client, prompt, **long, presence_penalty=2.0) != plain
    body = {"ignore_eos": True, "repetition_penalty": 1.8}
    assert text_of(client, prompt, max_tokens=48, extra_body=body) != plain


def test_logit_bias(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    (wanted,) = tokenizer.encode(" return")
    assert text_of(client, max_tokens=3, logit_bias={str(wanted): 100}) == " return return return"


def test_min_tokens_and_ignore_eos(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    (eos,) = tokenizer.encode("<|im_end|>")
    wants_to_end = {"logit_bias": {str(eos): 100}, "max_tokens": 6}

    def output_tokens(**body: object) -> tuple[int, str]:
        answer = complete(client, **wants_to_end, extra_body=body)
        assert answer.usage is not None
        return answer.usage.completion_tokens, answer.choices[0].finish_reason

    assert output_tokens() == (1, "stop")
    assert output_tokens(min_tokens=3) == (4, "stop")
    assert output_tokens(ignore_eos=True) == (6, "length")


def test_priority_user_and_timeout_are_taken(client: openai.OpenAI) -> None:
    plain = text_of(client)
    assert text_of(client, user="somebody", extra_body={"priority": 5, "timeout": 30.0}) == plain


def test_fields_may_be_null(client: openai.OpenAI) -> None:
    nothing = dict.fromkeys(("stop", "n", "seed", "logit_bias", "suffix", "best_of", "logprobs", "echo", "user", "top_p"))
    assert text_of(client, extra_body=nothing) == text_of(client)


def test_why_a_prompt_was_computed_is_told_where_the_server_says_so(
    host: Host, service: Service, tokenizer: Tokenizer
) -> None:
    with openai.OpenAI(base_url=f"{host.serve(service, ServeConfig(miss_reasons=True))}/v1", api_key="none") as telling:
        tokens = len(tokenizer.encode(LONG_PROMPT))
        for cached in (0, tokens - 1):
            asked = complete(telling, LONG_PROMPT, extra_body={"cache_salt": "why"}).usage
            assert asked is not None
            assert asked.prompt_tokens_details is not None
            details = asked.prompt_tokens_details.model_dump(exclude_none=True)
            inside = 1 if cached else tokens % 256
            assert details == {
                "cached_tokens": cached, "cold_tokens": tokens - cached - inside, "evicted_tokens": 0, "routed_tokens": 0,
                "inside_block_tokens": inside,
            }  # fmt: skip
