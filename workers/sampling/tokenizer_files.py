"""The tokenizer in a checkpoint's folder, as transformers opens it. Imports transformers only when one is opened; no torch."""

import importlib.util
import re
from pathlib import Path
from typing import Any

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")


def has_tokenizer(checkpoint: Path) -> bool:
    return any((checkpoint / name).exists() for name in TOKENIZER_FILES)


def open_tokenizer(checkpoint: Path) -> Any:
    """transformers' tokenizer, without network. Errors: ValueError, which names the file at fault, or the package that is
    missing."""
    _need_package(checkpoint)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(checkpoint), local_files_only=True)
    except Exception as error:  # the library raises whatever its parsers raise
        if _is_of_config(error, checkpoint):
            said = f"transformers cannot read it ({' '.join(str(error).split())})"
            raise ValueError(f"{checkpoint / 'config.json'}: {said}: repair or download the file again") from error
        raise ValueError(f"cannot read the tokenizer in {checkpoint}: {error}") from error


def _is_of_config(error: Exception, checkpoint: Path) -> bool:
    """The library reads config.json first, and checks more of it than a tokenizer needs."""
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(str(checkpoint), local_files_only=True)
    except Exception as fault:
        return (type(fault), str(fault)) == (type(error), str(error))
    return False


def _need_package(checkpoint: Path) -> None:
    """`tokenizer.model` may be of two kinds, each with a package of its own; transformers tries one after the other and asks
    for the last."""
    path = checkpoint / "tokenizer.model"
    if (checkpoint / "tokenizer.json").exists() or not path.exists():
        return
    with path.open("rb") as file:
        kind, package = ("tiktoken", "tiktoken") if TIKTOKEN_LINE.match(file.read(4096)) else ("SentencePiece", "sentencepiece")
    if importlib.util.find_spec(package) is None:
        raise ValueError(
            f"cannot read the tokenizer in {checkpoint}: {path.name} is a {kind} model, and the package for it is missing: "
            f"pip install {package}; or put the tokenizer.json of the same tokenizer beside it"
        )
