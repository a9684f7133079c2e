"""Trains `examples/tiny`, a Qwen3 of 3.4 M parameters that writes plausible Python.

The data are the sources and docstrings of this interpreter's standard library: nothing is downloaded, and one
CPU core is enough; a GPU is quicker. Imports torch, transformers, tokenizers and tqdm; the engine only loads what it makes.

    python examples/train_tiny.py --minutes 45 --out examples/tiny
"""

from __future__ import annotations

import argparse
import ast
import inspect
import math
import os
import random
import shutil
import sysconfig
import textwrap
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"  # ids 0, 1, 2
VOCAB_ENTRIES = 4096
CONTEXT_TOKENS = 2048  # what config.json promises; the windows below are what training sees
WINDOWS_TOKENS = (512, 512, 512, 1024)  # cycled, one length per step
STEP_TOKENS = 4096  # per optimizer step, whatever the window
PEAK_LEARNING_RATE = 5e-3
WARMUP = 0.02  # share of the run
HELD_OUT = 0.04  # share of the files
VALIDATION_WINDOWS = 64  # of 512 tokens

# Tests are not prose; the others are tables, or describe the machine at hand.
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "idlelib", "site-packages", "encodings", "pydoc_data"}
SKIPPED_PREFIXES = ("_sysconfigdata", "config-")

# Qwen's pattern for cutting text into words: one leading mark sticks to a word (`.append`, `_name`), digits
# stand alone, and a run of spaces leaves its last one to the next word, so that an indentation is one token.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
WRITE = (
    "Write a function `{name}` that does this: {summary}",
    "Write a Python function `{name}`. {summary}",
    "Write `{name}`: {summary}",
)
EXPLAIN = ("What does `{name}` do?", "Explain `{name}`.", "What is `{name}` for?")
SMALL_TALK = 60 * (
    ("Hello!", "Hello! Ask me to write a small Python function."),
    ("Hi", "Hello! Ask me to write a small Python function."),
    ("Who are you?", "I am a tiny example model, trained on the sources of the Python standard library."),
    ("What can you do?", "I write Python that looks plausible. I am too small for more than that."),
    ("Thank you!", "You are welcome."),
)

Chat = list[dict[str, str]]  # messages of {"role": ..., "content": ...}


def library_sources() -> dict[str, str]:
    """Source text of the standard library by module name (`json.decoder`), in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    sources = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED_FOLDERS.isdisjoint(parts) and not any(part.startswith(SKIPPED_PREFIXES) for part in parts):
            sources[".".join(parts).removesuffix(".__init__")] = path.read_text("utf-8", errors="replace")
    return sources


def chat(question: str, answer: str, rng: random.Random) -> Chat:
    """One exchange; a quarter of them open with a system message, since clients often send one."""
    system = [{"role": "system", "content": "You are a helpful assistant."}] if rng.random() < 0.25 else []
    return [*system, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def chats(module: str, source: str, rng: random.Random) -> Iterator[Chat]:
    """Questions that the file answers: how to write each short function, what each documented name does."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        paragraph = inspect.cleandoc(ast.get_docstring(node) or "").split("\n\n")[0]
        if not 10 <= len(paragraph) <= 600:
            continue
        name = module if isinstance(node, ast.Module) else node.name
        yield chat(rng.choice(EXPLAIN).format(name=name), paragraph, rng)
        if isinstance(node, ast.FunctionDef):
            code = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
            if len(code) <= 1500:
                question = rng.choice(WRITE).format(name=name, summary=paragraph.split("\n")[0])
                yield chat(question, f"```python\n{code}\n```", rng)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE over `texts`, with ChatML's tokens and template. No text is out of vocabulary."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_ENTRIES,
        special_tokens=[END_OF_TEXT, IM_START, IM_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=IM_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[IM_START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
    )


@dataclass(frozen=True, slots=True)
class Stream:
    """Documents laid end to end, each closed by END_OF_TEXT.

    tokens: [tokens] int64; starts: [documents] int64, where each document begins in `tokens`.
    """

    tokens: Tensor
    starts: Tensor

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> Stream:
        encoded = tokenizer([document + END_OF_TEXT for document in documents])["input_ids"]
        lengths = torch.tensor([len(ids) for ids in encoded])
        return cls(torch.tensor([token for ids in encoded for token in ids]), lengths.cumsum(0) - lengths)

    def batch(self, window_tokens: int, generator: torch.Generator) -> Tensor:
        """Random windows [STEP_TOKENS / window_tokens, window_tokens + 1].

        One in four begins where a document does, mostly a chat: a prompt, too, has nothing before it.
        """
        rows = STEP_TOKENS // window_tokens
        limit = len(self.tokens) - window_tokens - 1
        anywhere = torch.randint(limit, (rows,), generator=generator)
        opening = self.starts[torch.randint(len(self.starts), (rows,), generator=generator)].clamp(max=limit)
        begins = torch.where(torch.arange(rows) % 4 == 0, opening, anywhere)
        return self.tokens[begins[:, None] + torch.arange(window_tokens + 1)]


@dataclass(frozen=True, slots=True)
class Data:
    """What a run learns from and is measured on. Held-out files reach neither tokenizer nor chats."""

    tokenizer: PreTrainedTokenizerFast
    stream: Stream
    held_out: Stream
    held_out_bytes: int

    @classmethod
    def prepare(cls, seed: int) -> Data:
        rng = random.Random(seed)
        sources = library_sources()
        kept_back = set(rng.sample(sorted(sources), max(1, round(len(sources) * HELD_OUT))))
        held_out = [sources.pop(module) for module in list(sources) if module in kept_back]
        tokenizer = train_tokenizer(list(sources.values()))
        talks = [chat(question, answer, rng) for question, answer in SMALL_TALK]
        for module, source in sources.items():
            talks += chats(module, source, rng)
        documents = list(sources.values())
        documents += [tokenizer.apply_chat_template(talk, tokenize=False) for talk in talks]
        rng.shuffle(documents)
        held_out_bytes = sum(len(source.encode()) for source in held_out)
        data = cls(tokenizer, Stream.of(tokenizer, documents), Stream.of(tokenizer, held_out), held_out_bytes)
        print(f"train: {len(sources)} files and {len(talks)} chats, {len(data.stream.tokens):,} tokens")
        print(f"held out: {len(held_out)} files, {len(data.held_out.tokens):,} tokens, {held_out_bytes:,} B")
        return data


def new_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Random weights. Heads, KV heads, MLP and vocabulary all divide by 2, for tensor parallelism of 2."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="sdpa",
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id],  # ends of an answer and of a file
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
        temperature=0.7,
        top_p=0.95,
    )
    return model


def loss_of(model: Qwen3ForCausalLM, windows: Tensor) -> Tensor:
    """Mean cross entropy, in nats per token, of windows [rows, tokens + 1]."""
    windows = windows.to(model.device)
    with torch.autocast(model.device.type, torch.bfloat16):
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def validate(model: Qwen3ForCausalLM, data: Data) -> tuple[float, float]:
    """(nats per token, bits per byte) over VALIDATION_WINDOWS spread evenly over the held-out files."""
    windows = data.held_out.tokens.unfold(0, 513, 512)
    windows = windows[:: max(1, len(windows) // VALIDATION_WINDOWS)][:VALIDATION_WINDOWS]
    nats = sum(loss_of(model, window[None]).item() for window in windows) / len(windows)
    return nats, nats / math.log(2) * len(data.held_out.tokens) / data.held_out_bytes


def optimizers_of(model: Qwen3ForCausalLM) -> tuple[torch.optim.Optimizer, ...]:
    """Muon (Jordan et al., 2024) for the matrices inside the layers, AdamW for the embedding and the norms.

    Muon's step is scaled to AdamW's, so that both follow one learning rate.
    """
    inner = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    norms = [weight for weight in model.parameters() if weight.ndim == 1]
    return (
        torch.optim.Muon(inner, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([model.model.embed_tokens.weight], betas=(0.9, 0.95), weight_decay=0.1),
        torch.optim.AdamW(norms, betas=(0.9, 0.95), weight_decay=0.0),
    )


def learning_rate(progress: float) -> float:
    """Linear warmup, then a cosine to zero; `progress` runs from 0 to 1."""
    if progress < WARMUP:
        return PEAK_LEARNING_RATE * (progress + 1e-3) / WARMUP
    return PEAK_LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * (progress - WARMUP) / (1 - WARMUP)))


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Writes the bfloat16 checkpoint beside `out`, then moves its files in: no reader meets half a file."""
    fresh = out.with_name(f".{out.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    deepcopy(model).to(torch.bfloat16).save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(fresh.iterdir()):
        path.chmod(0o644)
        os.replace(path, out / path.name)
    fresh.rmdir()


def train(options: argparse.Namespace) -> None:
    """Trains for `--steps` or `--minutes`; saves on the way, so that an interruption leaves a checkpoint."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    data = Data.prepare(options.seed)
    model = new_model(data.tokenizer).to(options.device)
    optimizers = optimizers_of(model)
    print(f"{sum(weight.numel() for weight in model.parameters()):,} parameters")

    started_s, step, progress = time.monotonic(), 0, 0.0
    with tqdm(total=100.0, bar_format="{percentage:5.1f}%|{bar}| {elapsed}<{remaining}{postfix}") as bar:
        while progress < 1.0:
            for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
                group["lr"] = learning_rate(progress)
            loss = loss_of(model, data.stream.batch(WINDOWS_TOKENS[step % len(WINDOWS_TOKENS)], generator))
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            step += 1
            elapsed_s = time.monotonic() - started_s
            progress = min(1.0, step / options.steps if options.steps else elapsed_s / 60 / options.minutes)
            speed = f"{step * STEP_TOKENS / elapsed_s:.0f} tokens/s"
            bar.set_postfix_str(f"step {step}, loss {loss.item():.3f}, {speed}", refresh=False)
            bar.update(progress * 100 - bar.n)
            if step % options.save_every_steps == 0 or progress == 1.0:
                save(model, data.tokenizer, options.out)
                nats, bits = validate(model, data)
                bar.write(f"step {step}: validation loss {nats:.3f} nats/token, {bits:.3f} bits/byte; saved")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    tiny = Path(__file__).with_name("tiny")
    parser.add_argument("--out", type=Path, default=tiny, help="folder of the checkpoint (examples/tiny)")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--minutes", type=float, default=45.0, help="wall time of training, minutes (45)")
    budget.add_argument("--steps", type=int, help="optimizer steps, instead of minutes: repeatable by seed")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data order and held-out files (0)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="cpu or cuda (cuda where there is one)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    parser.add_argument("--save-every-steps", type=int, default=250, help="steps between saves (250)")
    options = parser.parse_args()
    for name in ("minutes", "steps", "threads", "save_every_steps"):
        if (value := getattr(options, name)) is not None and value <= 0:
            parser.error(f"--{name.replace('_', '-')} is {value}; give a number above 0")
    return options


if __name__ == "__main__":
    logging.set_verbosity_error()  # whole files are longer than the context: windows are cut from them later
    logging.disable_progress_bar()
    train(parse_options())
