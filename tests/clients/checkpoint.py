"""The checkpoint that these tests serve: the one that ships with Manta, which can be told what to think."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
TINY = ROOT / "examples" / "tiny"
TEMPLATE = Path(__file__).with_name("chat_template.jinja")
MARKS = ("<think>", "</think>")
EMBEDDING = "model.embed_tokens.weight"


def make_checkpoint(folder: Path) -> Path:
    """Writes it: the marks of thoughts are tokens of their own, whose weights are nothing, so that a bias can call for them."""
    folder.mkdir()
    for file in TINY.iterdir():
        if file.name not in ("config.json", "model.safetensors", "tokenizer.json"):
            (folder / file.name).symlink_to(file)
    (folder / TEMPLATE.name).unlink()
    (folder / TEMPLATE.name).symlink_to(TEMPLATE)
    config = json.loads((TINY / "config.json").read_text())
    known, vocabulary = config["vocab_size"], config["vocab_size"] + 16
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": vocabulary}))
    settings = json.loads((TINY / "tokenizer.json").read_text())
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    settings["added_tokens"] += [{"id": known + number, "content": mark} | plain for number, mark in enumerate(MARKS)]
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    _widen(TINY / "model.safetensors", folder / "model.safetensors", vocabulary)
    return folder


def _widen(source: Path, target: Path, rows: int) -> None:
    """Copies weights (safetensors: the header's length, the header, the data), with rows of zeros after the embedding's own."""
    content = source.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8:begin]), content[begin:]
    written, parts, place = {}, [], 0
    for name, tensor in header.items():
        if name != "__metadata__":
            part = data[slice(*tensor["data_offsets"])]
            if name == EMBEDDING:
                known, width = tensor["shape"]
                part += bytes(len(part) // known * (rows - known))
                tensor = tensor | {"shape": [rows, width]}
            tensor = tensor | {"data_offsets": [place, place + len(part)]}
            parts.append(part)
            place += len(part)
        written[name] = tensor
    head = json.dumps(written).encode()
    target.write_bytes(len(head).to_bytes(8, "little") + head + b"".join(parts))
