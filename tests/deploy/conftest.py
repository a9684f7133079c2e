"""A checkpoint folder without weights: the settings and a tokenizer trained here and now."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

import deploy.doors.python.llm
from deploy.doors.python.llm import LLM
from deploy.text.tokenizer import Tokenizer
from tests.deploy.frontend.fake_engine import FakeEngine, Reply

EOS, USER = 0, 1
MAX_TOKENS = 512
CORPUS = [
    "def add(a, b):\n    return a + b\n",
    "the quick brown fox jumps over the lazy dog. ",
    "hello world, hello",
] * 20
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|user|>{{ message.content }}\n{% endfor %}"
)


def train_backend() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>", "<|user|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


@pytest.fixture(scope="session")
def bare_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """No tokenizer."""
    folder = tmp_path_factory.mktemp("bare")
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": 400,
        "max_position_embeddings": MAX_TOKENS,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "eos_token_id": EOS,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS]}))
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, bare_checkpoint: Path) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    for file in bare_checkpoint.iterdir():
        (folder / file.name).write_text(file.read_text())
    train_backend().save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="session")
def tokenizer(checkpoint: Path) -> Tokenizer:
    loaded = Tokenizer.load(checkpoint)
    assert loaded is not None
    return loaded


Open = Callable[..., tuple[LLM, FakeEngine]]


@pytest.fixture
def open_llm(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> Iterator[Open]:
    """Opens an LLM on a fake engine with the given script and behaviour."""
    opened: list[LLM] = []

    def open_(reply: Reply | Sequence[int], model: Path = checkpoint, **behaviour: object) -> tuple[LLM, FakeEngine]:
        engine = FakeEngine(reply, **behaviour)  # type: ignore[arg-type]
        monkeypatch.setattr(deploy.doors.python.llm, "engine_starter", lambda _: engine.start)
        llm = LLM(model)
        opened.append(llm)
        return llm, engine

    yield open_
    for llm in opened:
        llm.shutdown()
