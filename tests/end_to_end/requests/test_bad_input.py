"""Bad input is refused with words that say what to change; nothing is lost for it and nothing is left running."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from deploy import LLM, SamplingParams
from deploy.config.load import EMBEDDED_MODEL, ConfigError
from deploy.frontend.outputs import GenerationError
from deploy.terminal.exits import BAD_INPUT, DONE, FAILED, INTERRUPTED
from deploy.text.content import PromptError
from manta.commands import app
from tests.end_to_end.engines import MISTRAL, QWEN2, QWEN3, greedy, kv_memory, open_llm, run, tokens
from tests.end_to_end.prompts import VOCAB, draw
from tests.end_to_end.waiting import PATIENCE_S, nothing_left_behind, wait_idle
from tests.shared.processes import descendants, wait_gone

BLOCK = 16
BLOCKS = 8


@pytest.fixture
def copy(checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    """A checkpoint to spoil."""
    folder = tmp_path / "spoilt"
    shutil.copytree(checkpoints[QWEN3], folder)
    return folder


def set_fields(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# ---- at the start


def missing_folder(folder: Path) -> None:
    shutil.rmtree(folder)


def no_settings(folder: Path) -> None:
    (folder / "config.json").unlink()


def half_the_settings(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text()[:100])


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def half_the_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size // 2)


def another_models_weights(folder: Path) -> None:
    set_fields(folder, intermediate_size=128)


def layers_that_are_not_there(folder: Path) -> None:
    set_fields(folder, num_hidden_layers=3)


def unsupported_architecture(folder: Path) -> None:
    set_fields(folder, architectures=["T5ForConditionalGeneration"], model_type="t5")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (missing_folder, "is not a folder: give the path of a checkpoint folder"),
        (no_settings, "config.json is missing: the checkpoint is incomplete, download it again"),
        (half_the_settings, "config.json cannot be read .*: repair or download the file again"),
        (no_weights, "neither model.safetensors nor .* is in .*: only safetensors are read, download them"),
        (half_the_weights, "model.safetensors is truncated or damaged .*: download it again"),
        (another_models_weights, "has shape .* but config.json asks for .*; download both again"),
        (layers_that_are_not_there, "tensor model.layers.2.* is missing from .*; download both again"),
        (unsupported_architecture, "t5 is an encoder-decoder, and only decoders are served"),
    ],
)
@pytest.mark.parametrize(("groups", "size"), [(1, 1), (2, 2)])
def test_a_checkpoint_that_cannot_be_served(
    spoil: Callable[[Path], None], words: str, groups: int, size: int, copy: Path
) -> None:
    memory = kv_memory(copy, BLOCKS, BLOCK)
    spoil(copy)
    options: dict[str, Any] = {"groups": groups, "tensor_parallel_size": size, "kv_memory": memory, "threads": 1}
    with nothing_left_behind(), pytest.raises(ValueError, match=words):
        LLM(copy, local=True, block_size=BLOCK, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tensor_parallel_size": 3}, r"3 does not divide the model's 4 attention heads: choose one of \[1, 2, 4\]"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size=0 is below 1: raise it"),
        ({"groups": 0}, "groups=0 is below 1: raise it"),
        ({"kv_memory": 100}, "100 bytes of KV memory hold no block: one block of 16 tokens takes .* raise kv_memory or lower"),
        ({"kv_memory": "1 parsec"}, "is not a size: .*4GiB"),
        ({"block_size": 24}, "block_size=24 is not a power of two from 16 up"),
        ({"block_size": 8}, "block_size=8 is not a power of two from 16 up"),
        ({"report_steps": 17}, "report_steps=17 is above block_size=16: lower it"),
        ({"max_model_len": 513}, "max_model_len=513 is above the 512 .*: lower it"),
        ({"max_num_batched_tokens": 0}, "max_num_batched_tokens=0 is below 1: raise it"),
        ({"dtype": "int3"}, "dtype='int3' is unknown: choose one of auto, bfloat16"),
        ({"attention": "magic"}, "attention='magic' is unknown: choose one of auto"),
        ({"kv_memroy": "1GiB"}, "unknown key 'kv_memroy': did you mean 'kv_memory'?"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_be(options: dict[str, Any], words: str, checkpoints: dict[str, Path]) -> None:
    usual: dict[str, Any] = {"local": True, "block_size": BLOCK, "kv_memory": "1MiB", "threads": 1}
    with nothing_left_behind(), pytest.raises(ConfigError, match=words):
        LLM(checkpoints[QWEN3], **usual | options)


# ---- at a request


@pytest.fixture(scope="module")
def small(checkpoints: dict[str, Path]) -> Iterator[LLM]:
    """A pool of 128 tokens for a model of 512; two groups."""
    with open_llm(checkpoints[QWEN2], block=BLOCK, blocks=BLOCKS, groups=2) as llm:
        yield llm


@pytest.fixture(scope="module")
def answer(small: LLM) -> list[list[list[int]]]:
    return tokens(run(small, [draw(20, seed=90)], greedy(8)))


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([], "the prompt is empty: give at least one token"),
        ([1, 2, VOCAB], "token id 199 is outside the vocabulary of 199 entries: use ids from 0 to 198"),
        ([1, -1], "token id -1 is outside the vocabulary"),
        ([1, 2.5], "prompt_token_ids must be a list of integers"),
        (draw(512, seed=1), "length is 512 tokens, output included, and the prompt has 512: shorten it to 511"),
        ("text", "this checkpoint has no tokenizer: give prompt_token_ids"),
        ({"promt": "x"}, "unknown key 'promt': did you mean 'prompt'"),
        ({"tenant": "x"}, "give exactly one of prompt, prompt_token_ids, messages"),
        ({"prompt_token_ids": [1], "prompt": "x"}, "give exactly one of .*; found prompt and prompt_token_ids"),
        ({"prompt_token_ids": "x"}, "prompt_token_ids must be a list of integers"),
    ],
)
def test_a_prompt_that_cannot_be(prompt: Any, words: str, small: LLM, answer: list[list[list[int]]]) -> None:
    requests = small.stats().requests
    good = draw(20, seed=90)
    with pytest.raises(ValueError, match=words):
        small.generate([good, prompt], greedy(8), progress=False)
    assert small.stats().requests == requests, "none of the call is submitted"
    assert tokens(run(small, [good], greedy(8))) == answer
    wait_idle(small)


@pytest.mark.parametrize(
    ("length", "max_tokens", "words"),
    [
        (100, 30, "length is 129 tokens, .* need 9 blocks of 16 tokens, but the largest pool has 8: .* raise kv_memory"),
        (129, 1, "need 9 blocks of 16 tokens, but the largest pool has 8: shorten the prompt, lower max_tokens"),
        (129, None, "need 9 blocks of 16 tokens, but the largest pool has 8: shorten the prompt"),
    ],
)
def test_a_request_that_never_fits(
    length: int, max_tokens: int | None, words: str, small: LLM, answer: list[list[list[int]]]
) -> None:
    """It fails by itself; the others of the same call are served."""
    params = [greedy(8), SamplingParams(temperature=0.0, max_tokens=max_tokens, n=2)]
    with pytest.raises(GenerationError, match=words) as failure:
        run(small, [draw(20, seed=90), draw(length, seed=91)], params)
    good, bad = failure.value.outputs
    assert tokens([good]) == answer
    assert bad.error is not None
    assert [choice.finish_reason for choice in bad.outputs] == ["error", "error"]
    wait_idle(small)


def test_a_length_that_the_model_does_not_have(small: LLM) -> None:
    requests = small.stats().requests
    with pytest.raises(PromptError, match=r"max_tokens=13 with the 500 tokens of the prompt .*: lower max_tokens to 12 or"):
        run(small, [draw(500, seed=91)], greedy(13))
    assert small.stats().requests == requests


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"temperature": -0.1}, r"temperature=-0.1 is outside \[0.0, inf\]"),
        ({"temperature": float("nan")}, "temperature=nan is outside"),
        ({"top_p": 0.0}, r"top_p=0.0 is outside \(0.0, 1.0\]"),
        ({"top_k": -1}, "top_k=-1 is outside"),
        ({"min_p": 1.5}, "min_p=1.5 is outside"),
        ({"n": 0}, r"n=0 is outside \[1, 128\]"),
        ({"max_tokens": 0}, "max_tokens=0 is outside"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens=9 is above max_tokens=8: lower it"),
        ({"presence_penalty": 3.0}, r"presence_penalty=3.0 is outside \[-2.0, 2.0\]"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 is outside"),
        ({"logprobs": 21}, r"logprobs=21 is outside \[0, 20\]"),
        ({"seed": -1}, "seed=-1 is outside"),
        ({"logit_bias": {3: 101.0}}, r"logit_bias\[3\]=101.0 is outside"),
        ({"stop": ("",)}, "stop: an empty string would stop at once"),
        ({"logit_bias": {VOCAB: 1.0}}, "logit_bias: token id 199 is outside the vocabulary"),
        ({"stop_token_ids": (-5,)}, "stop_token_ids: token id -5 is outside the vocabulary"),
        ({"stop": ("x",)}, "stop strings need text, and this checkpoint has no tokenizer: use stop_token_ids"),
        ({"top_k": 2.5}, "top_k: expected `int`, got `float`"),
        ({"top_k": "many"}, "top_k='many' is not a number: give one from 0 to 2147483647"),
        ({"temperature": None}, "temperature=None is not a number"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_sampling_that_cannot_be(fields: dict[str, Any], words: str, small: LLM) -> None:
    requests = small.stats().requests
    with pytest.raises(ValueError, match=words):
        run(small, [[1, 2, 3]], SamplingParams(**fields))
    assert small.stats().requests == requests


# ---- the command line


def manta(path: Path, *arguments: str) -> Result:
    engine = ["--model", str(path), "--local", "--block-size", "16", "--kv-memory", "1MiB", "--dtype", "float32"]
    return CliRunner().invoke(app, ["generate", *engine, "--threads", "1", "--quiet", *arguments])


def test_results_as_json_lines(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    prompts = [draw(20, seed=92), draw(33, seed=93)]
    lines = [{"prompt_token_ids": prompts[0]}, {"prompt_token_ids": prompts[1], "max_tokens": 5, "logprobs": 1}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n\n" for line in lines))
    files = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    with nothing_left_behind():
        result = manta(checkpoints[MISTRAL], *files, "--temperature", "0", "--max-tokens", "9", "--groups", "2")
    assert result.exit_code == DONE, result.output
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [record["prompt_token_ids"] for record in records] == prompts
    with open_llm(checkpoints[MISTRAL], block=BLOCK) as llm:
        expected = tokens(run(llm, prompts, [greedy(9), greedy(5)]))
    assert [[choice["token_ids"] for choice in record["outputs"]] for record in records] == expected
    assert len(records[1]["outputs"][0]["logprobs"]) == 5


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt_token_ids": [1, 2}', "line 3: not valid JSON"),
        ("[1, 2, 3]", "line 3: expected an object"),
    ],
)
def test_a_bad_line(line: str, words: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    file, results = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    file.write_text('{"prompt_token_ids": [1, 2, 3]}\n\n' + line + "\n")
    with nothing_left_behind():
        result = manta(checkpoints[MISTRAL], "--input", str(file), "--output", str(results))
    assert result.exit_code == BAD_INPUT
    assert words in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt_token_ids": [1, 500]}', "token id 500 is outside the vocabulary"),
        ('{"prompt_token_ids": []}', "the prompt is empty"),
        ('{"prompt_token_ids": [1], "temprature": 1}', "unknown key 'temprature': did you mean 'temperature'?"),
        ('{"prompt_token_ids": [1], "top_p": 2}', "top_p=2.0 is outside (0.0, 1.0]"),
        ('{"prompt_token_ids": [1], "max_tokens": 513}', "lower max_tokens to 511 or less"),
    ],
)
def test_a_prompt_of_a_file_that_cannot_be(line: str, words: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """The others are answered; alone in its file it is bad input."""
    file, results = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    files = ["--input", str(file), "--output", str(results), "--max-tokens", "4"]
    for others, code in (('{"prompt_token_ids": [1, 2, 3]}\n\n', FAILED), ("", BAD_INPUT)):
        file.write_text(others + line + "\n")
        with nothing_left_behind():
            result = manta(checkpoints[MISTRAL], *files)
        assert result.exit_code == code
        assert words in result.stderr
        assert "Traceback" not in result.stderr
        assert [words in json.loads(each).get("error", "") for each in results.read_text().splitlines()] == (
            [False, True] if others else []
        )


def test_one_request_of_a_file_that_never_fits(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """The others are written; the exit code and the record say that one failed."""
    lines = [{"prompt_token_ids": [1, 2, 3]}, {"prompt_token_ids": draw(400, seed=94)}]
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    files = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    pool = str(kv_memory(checkpoints[MISTRAL], BLOCKS, BLOCK))
    with nothing_left_behind():
        result = manta(checkpoints[MISTRAL], *files, "--max-tokens", "4", "--kv-memory", pool)
    assert result.exit_code == FAILED
    assert "raise kv_memory" in result.stderr
    good, bad = (json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines())
    assert len(good["outputs"][0]["token_ids"]) == 4
    assert "raise kv_memory" in bad["error"]


@pytest.mark.slow
def test_interrupted_in_mid_generation() -> None:
    """Ctrl-C: a word, the exit code, and no process left."""
    command = [sys.executable, "-m", "manta", "generate", "--local", "--groups", "2", "--kv-memory", "64MiB"]
    process = subprocess.Popen(
        [*command, "def f(x):", "--max-tokens", "2000", "--ignore-eos", "--max-model-len", "2048", "--stream"],
        cwd=EMBEDDED_MODEL.parent.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.read(1), "text begins to stream"
        below = descendants(process.pid)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
    assert process.returncode == INTERRUPTED, errors.decode()
    assert errors.decode().rstrip().endswith("manta: interrupted")
    assert "Traceback" not in errors.decode()
    assert not wait_gone(below)
