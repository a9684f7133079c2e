"""Tokens, their bytes and the text, for every kind of tokenizer: joined, the bytes of the tokens are the text."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from deploy.doors.openai.answers.logprobs import CompletionTable, TokenNames, chat_logprobs, of_prompt, sampled
from deploy.frontend.outputs import Logprob
from deploy.text.tokenizer import REPLACEMENT, Detokenizer, Tokenizer
from tests.shared.tokenizers import BOS, CHATML, EOS, KINDS, LLAMA2, TURN_END, byte_level, save, sentencepiece_bpe
from workers.sampling.grammar import load_tokenizer

TEXTS = ["hello world", "the café niño says hello, and again.", "你好 Ünïcode", "  two  blanks  ", "don't stop!", "👩‍👧 naïve"]
TEXT = st.one_of(st.sampled_from(TEXTS), st.text(max_size=20))


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load(save(KINDS[request.param](), tmp_path_factory.mktemp("tokenizer") / "files"))


def load(folder: Path) -> Tokenizer:
    loaded = Tokenizer.load(folder)
    assert loaded is not None
    return loaded


def joined(tokenizer: Tokenizer, tokens: Sequence[int]) -> bytes:
    first = tokenizer.first_shown(tokens)
    return b"".join(tokenizer.token_bytes(token, at == first) for at, token in enumerate(tokens))


def is_text(tokenizer: Tokenizer, tokens: Sequence[int]) -> bool:
    """Whole characters only: what is not has no text of its own."""
    try:
        joined(tokenizer, tokens).decode()
    except UnicodeDecodeError:
        return False
    return True


@given(text=TEXT)
def test_the_bytes_of_a_text_s_tokens_are_the_text(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text)
    assert joined(tokenizer, tokens).decode() == tokenizer.decode(tokens)


@given(data=st.data())
def test_the_bytes_of_any_tokens_are_their_text(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """Specials among them, and characters spelt in bytes; beyond whole characters, nothing is promised but the bytes."""
    size = len(tokenizer._implementation)
    tokens = data.draw(st.lists(st.one_of(st.integers(0, size - 1), st.integers(0, 4)), max_size=12))
    text = tokenizer.decode(tokens)
    if is_text(tokenizer, tokens):
        assert joined(tokenizer, tokens).decode() == text
        names = "".join(tokenizer.token_texts([token for token in tokens if token not in tokenizer.special]))
        assert names == text or REPLACEMENT in names
    else:
        assert REPLACEMENT in text


@given(text=TEXT, data=st.data())
def test_pieces_of_an_output_are_its_text(tokenizer: Tokenizer, text: str, data: st.DataObject) -> None:
    """Wherever the output begins, with special tokens anywhere, and in windows that are cut."""
    tokens = tokenizer.encode(text) * 5
    for at in data.draw(st.lists(st.integers(0, len(tokens)), max_size=30)):
        tokens.insert(at, EOS)
    border = data.draw(st.integers(0, len(tokens)))
    if not is_text(tokenizer, tokens[:border]):
        return
    detokenizer = Detokenizer(tokenizer.decode, tokens[:border], tokenizer.special)
    pieces = [*(detokenizer.push((token,)) for token in tokens[border:]), detokenizer.flush()]
    assert tokenizer.decode(tokens[:border]) + "".join(pieces) == tokenizer.decode(tokens)


def test_transformers_decodes_the_same(tokenizer: Tokenizer) -> None:
    for text in TEXTS:
        tokens = tokenizer.encode(text)
        reference = tokenizer._implementation.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert tokenizer.decode(tokens) == reference


def table(tokenizer: Tokenizer, tokens: Sequence[int]) -> tuple[list[str], list[int]]:
    """Of an echoed prompt whose every token has an entry but the first."""
    texts = tokenizer.token_texts(tokens)
    entries = [None, *({token: Logprob(-1.0, 1, text)} for token, text in list(zip(tokens, texts, strict=True))[1:])]
    made = CompletionTable(TokenNames(tokenizer)).part(of_prompt(tokens, entries, tokenizer))
    return made.tokens, made.text_offset


@given(text=st.sampled_from(TEXTS))
def test_offsets_are_where_the_tokens_stand_in_the_text(tokenizer: Tokenizer, text: str) -> None:
    tokens = [BOS, *(token for token in tokenizer.encode(text) if token not in tokenizer.special), EOS]
    names, offsets = table(tokenizer, tokens)
    shown = tokenizer.decode(tokens)
    assert (names[0], names[-1]) == ("<s>", "</s>")
    assert (offsets[0], offsets[1], offsets[-1]) == (0, 0, len(shown))
    for name, begin, end in zip(names[1:-1], offsets[1:], offsets[2:], strict=False):
        assert name.startswith("bytes:") or shown[begin:end] == name


def test_blanks_of_sentencepiece_are_told(tmp_path: Path) -> None:
    tokenizer = load(save(sentencepiece_bpe(), tmp_path / "files"))
    tokens = tokenizer.encode("the café niño")
    assert tokens[0] == BOS
    assert tokenizer.token_texts(tokens) == ["<s>", "the", " café", " niño"]
    entries = [{token: Logprob(-1.0, 1, tokenizer.token_text(token))} for token in tokens[2:]]
    told = chat_logprobs(entries, TokenNames(tokenizer)).content
    assert [token.token for token in told] == [" café", " niño"]
    assert b"".join(bytes(token.bytes) for token in told) == " café niño".encode()
    made = CompletionTable(TokenNames(tokenizer)).part(sampled(entries))
    assert (made.tokens, made.text_offset) == ([" café", " niño"], [0, 5])


def test_what_no_token_stands_for_has_no_bytes(tokenizer: Tokenizer) -> None:
    """A model's vocabulary may be larger than its tokenizer's."""
    assert tokenizer.token_bytes(100_000) == b""
    assert tokenizer.token_bytes(EOS) == b""
    assert tokenizer.token_text(EOS) == "</s>"


@pytest.mark.parametrize(
    ("eos", "template", "ends"),
    [
        ("</s>", None, {EOS}),
        ("<|im_end|>", None, {TURN_END}),
        ("</s>", CHATML, {EOS, TURN_END}),
        ("</s>", LLAMA2, {EOS}),
        (None, CHATML, {TURN_END}),
        (None, None, set()),
        ("</s>", "{% for message in messages %}<|im_start|>{{ message.content }}\n{% endfor %}", {EOS}),
        ("</s>", "{% for message in messages %}<|im_start|>{{ message.content }}{% endfor %}<|im_start|>", {EOS}),
        ("</s>", "{{ raise_exception('not today') }}", {EOS}),
    ],
)
def test_what_ends_a_text(tmp_path: Path, eos: str | None, template: str | None, ends: set[int]) -> None:
    assert set(load(save(byte_level(), tmp_path / "files", eos=eos, template=template)).end_ids) == ends


def test_a_model_of_sentencepiece_asks_for_its_own_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    with pytest.raises(ValueError, match=r"tokenizer.model is a SentencePiece model, .* pip install sentencepiece; or put"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    with pytest.raises(ValueError, match=r"tokenizer.model is a tiktoken model, .* pip install tiktoken"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_model_of_sentencepiece_is_read_where_its_package_is(tmp_path: Path, kind: str) -> None:
    library = pytest.importorskip("sentencepiece")
    (tmp_path / "words.txt").write_text("\n".join([*TEXTS[:5] * 50, *(f"line {number} of many" for number in range(300))]))
    library.SentencePieceTrainer.train(
        input=str(tmp_path / "words.txt"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=400, model_type=kind,
        byte_fallback=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>"}')
    tokenizer = load(tmp_path)
    assert tokenizer.end_ids == (2,)
    for text in ("hello world", "the café niño 🙂"):
        tokens = tokenizer.encode(text)
        assert tokens[-3:] == library.SentencePieceProcessor(str(tmp_path / "tokenizer.model")).encode(text)[-3:]
        assert joined(tokenizer, tokens).decode() == tokenizer.decode(tokens) == text
    assert load_tokenizer(tmp_path, 512, ()).eos_token == 2


def test_a_tokenizer_is_not_blamed_for_the_settings_beside_it(tmp_path: Path) -> None:
    """transformers reads config.json first, and checks all of it."""
    folder = save(byte_level(), tmp_path)
    settings = {"model_type": "qwen3", "num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}
    for change, said in (
        ({"num_hidden_layers": 4}, r"num_hidden_layers` \(4\) must be equal to the number of `layer_types` \(2\)"),
        ({"head_dim": "wide"}, "'head_dim' expected int"),
    ):
        (folder / "config.json").write_text(json.dumps(settings | change))
        with pytest.raises(ValueError, match=rf"config\.json: transformers cannot read it \(.*{said}.*: repair or download"):
            Tokenizer.load(folder)
    (folder / "config.json").write_text(json.dumps(settings))
    assert Tokenizer.load(folder) is not None
    for broken in (settings, settings | {"model_type": "of-another-day"}):
        (folder / "config.json").write_text(json.dumps(broken))
        (folder / "tokenizer.json").write_text("{")
        with pytest.raises(ValueError, match="cannot read the tokenizer in"):
            Tokenizer.load(folder)


def test_files_of_a_tokenizer_are_those_of_transformers(tmp_path: Path) -> None:
    folder = save(sentencepiece_bpe(), tmp_path / "files")
    assert load(folder).encode("the café") == AutoTokenizer.from_pretrained(folder).encode("the café")
