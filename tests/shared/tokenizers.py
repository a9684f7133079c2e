"""Small tokenizers of each kind that a checkpoint may bring, trained here and now with the tokenizers library.

All know `SPECIAL`, and the `WORDS`; what they do not know they spell in bytes, or cannot spell (WordPiece).
"""

import json
from collections.abc import Callable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
UNK, BOS, EOS, TURN_START, TURN_END = range(5)
WORDS = f"the café niño says hello world , and again . don ' t stop ! 你 好 Ünïcode {' '.join('abcdefghijklmnopqrstuvwxyz')}"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "<s>{% for message in messages %}{% if message.role == 'user' %}[INST] {{ message.content }} [/INST]"
    "{% else %} {{ message.content }} </s>{% endif %}{% endfor %}"
)


def _added(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer


def byte_level() -> Tokenizer:
    """GPT-2's kind, and Llama 3's and Qwen's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([WORDS, WORDS, f" {WORDS}"], trainer)
    return tokenizer


def sentencepiece_bpe() -> Tokenizer:
    """Llama 2's and Mistral's kind, as transformers converts them: a blank is prepended, and stripped by the decoder."""
    pieces = ["▁", *dict.fromkeys(f"▁{word}" for word in WORDS.split()), *dict.fromkeys("".join(WORDS.split()))]
    vocab = {piece: at for at, piece in enumerate([*SPECIAL, *BYTES, *pieces])}
    merges: list[tuple[str, str]] = []
    for word in WORDS.split():
        for end in range(len(word)):
            left, right = f"▁{word[:end]}", word[end]
            for piece in (left, left + right):
                vocab.setdefault(piece, len(vocab))
            merges.append((left, right))
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=list(dict.fromkeys(merges)), byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return _added(tokenizer)


def sentencepiece_unigram() -> Tokenizer:
    """T5's kind, with bytes for what it does not know."""
    pieces = ["▁", *dict.fromkeys(f"▁{word}" for word in WORDS.split()), *dict.fromkeys("".join(WORDS.split()))]
    vocab = [(piece, -float(at)) for at, piece in enumerate([*SPECIAL, *BYTES, *pieces])]
    tokenizer = Tokenizer(models.Unigram(vocab, UNK, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    metaspace = decoders.Metaspace(replacement="▁", prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), metaspace])
    return _added(tokenizer)


def word_piece() -> Tokenizer:
    """BERT's kind: blanks belong to no token, and some signs stand close to the word before."""
    pieces = [*dict.fromkeys(WORDS.split()), *(f"##{sign}" for sign in dict.fromkeys("".join(WORDS.split())))]
    vocab = {piece: at for at, piece in enumerate([*SPECIAL, *pieces])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return _added(tokenizer)


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": byte_level,
    "SentencePiece BPE": sentencepiece_bpe,
    "SentencePiece Unigram": sentencepiece_unigram,
    "WordPiece": word_piece,
}


def save(tokenizer: Tokenizer, folder: Path, *, eos: str | None = "</s>", template: str | None = None) -> Path:
    """Writes the files of a tokenizer into a checkpoint's folder, made if need be."""
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps({key: value for key, value in settings.items() if value}))
    return folder

