"""The command line over a scripted engine: what it reads, shows, writes, and how it ends."""

import json
import signal
import threading
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import deploy.doors.python.llm
from cluster.engine import EngineError
from deploy.text.tokenizer import Tokenizer
from manta.commands import app
from tests.deploy.conftest import EOS
from tests.deploy.frontend.fake_engine import FakeEngine

ANSWER = " return a + b"


class Manta:
    """Runs `manta generate` on one fake engine."""

    def __init__(self, checkpoint: Path, tokenizer: Tokenizer) -> None:
        self.checkpoint = checkpoint
        self.engine = FakeEngine([*tokenizer.encode(ANSWER), EOS])

    def __call__(self, *arguments: str, stdin: str = "") -> Result:
        return CliRunner().invoke(app, ["generate", "--model", str(self.checkpoint), *arguments], input=stdin)


@pytest.fixture
def manta(monkeypatch: pytest.MonkeyPatch, checkpoint: Path, tokenizer: Tokenizer) -> Manta:
    monkeypatch.delenv("MANTA_CONFIG", raising=False)
    runner = Manta(checkpoint, tokenizer)
    monkeypatch.setattr(deploy.doors.python.llm, "engine_starter", lambda _: runner.engine.start)
    return runner


def test_one_prompt_is_its_bare_text(manta: Manta) -> None:
    result = manta("def add(a, b):")
    assert (result.exit_code, result.stdout) == (0, ANSWER + "\n")
    for words in ("Starting the fake engine", "prompt tokens", "tokens/s", "preemptions", "blocks held"):
        assert words in result.stderr
    assert manta.engine.closed


def test_several_prompts_are_labelled_in_order(manta: Manta) -> None:
    result = manta("first", "second", "--quiet")
    assert result.stdout == f"── 1/2: first ──\n{ANSWER}\n── 2/2: second ──\n{ANSWER}\n"
    assert result.stderr == ""


def test_adapters_that_no_prompt_names_are_spoken_of(manta: Manta, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.cli.commands.run", lambda *_: [])
    assert "no prompt names an adapter" in manta("first", "--lora", "sql=/adapters/sql").stderr
    named = '{"prompt": "first", "lora": "sql"}'
    assert "adapter" not in manta("--format", "jsonl", "--lora", "sql=/adapters/sql", stdin=named).stderr
    assert "adapter" not in manta("first").stderr


def test_choices_are_labelled(manta: Manta) -> None:
    result = manta("first", "-q", "--n", "2")
    assert result.stdout == f"── 1/1, choice 1: first ──\n{ANSWER}\n── 1/1, choice 2: first ──\n{ANSWER}\n"


def test_options_reach_the_engine(manta: Manta) -> None:
    arguments = [
        "--max-tokens",
        "5",
        "--top-k",
        "3",
        "--stop",
        "X",
        "--stop",
        "Y",
        "--logit-bias",
        "7=-1.5",
        "--ignore-eos",
    ]
    engine = ["--groups", "2", "--kv-memory", "1GiB", "--no-enable-prefix-caching", "--engine-seed", "4", "--seed", "5"]
    assert manta("a", *arguments, *engine, "--no-prefix-fetch").exit_code == 0
    params, config = manta.engine.requests[0].params, manta.engine.config
    assert (params.max_tokens, params.top_k, params.stop) == (5, 3, ("X", "Y"))
    assert (params.logit_bias, params.ignore_eos, params.seed) == ({7: -1.5}, True, 5)
    assert config is not None
    assert (config.groups, config.kv_memory, config.enable_prefix_caching, config.seed) == (2, 2**30, False, 4)
    assert (config.prefix_fetch, config.host_kv_memory) == (False, 0)


def test_configuration_file(manta: Manta, tmp_path: Path) -> None:
    file = tmp_path / "manta.yaml"
    file.write_text("engine: {groups: 2, block_size: 32, host_kv_memory: 3MiB}\nsampling: {max_tokens: 9}\n")
    assert manta("a", "--config", str(file), "--groups", "3", "--host-kv-memory", "2GiB").exit_code == 0
    assert manta.engine.config is not None
    assert (manta.engine.config.groups, manta.engine.config.block_size) == (3, 32)
    assert (manta.engine.config.host_kv_memory, manta.engine.config.prefix_fetch) == (2**31, True)
    assert manta.engine.requests[0].params.max_tokens == 9


def test_jsonl_in_and_out(manta: Manta, tmp_path: Path) -> None:
    source, target = tmp_path / "prompts.jsonl", tmp_path / "results.jsonl"
    lines = [
        {"prompt": "a", "logprobs": 1},
        {"prompt_token_ids": [5, 6]},
        {"messages": [{"role": "user", "content": "c"}]},
    ]
    source.write_text("\n".join(json.dumps(line) for line in lines))
    result = manta("--input", str(source), "--output", str(target))
    assert (result.exit_code, result.stdout) == (0, "")
    records = [json.loads(line) for line in target.read_text().splitlines()]
    assert [record["index"] for record in records] == [0, 1, 2]
    assert [record["prompt"] for record in records] == ["a", None, None]
    assert records[1]["prompt_token_ids"] == [5, 6]
    assert {record["outputs"][0]["text"] for record in records} == {ANSWER}
    assert [("logprobs" in record["outputs"][0]) for record in records] == [True, False, False]


@pytest.mark.parametrize("way", [[], ["--chat"]])
def test_a_line_names_its_tenant_deadline_and_priority(manta: Manta, tmp_path: Path, way: list[str]) -> None:
    source, target = tmp_path / "prompts.jsonl", tmp_path / "results.jsonl"
    lines = [{"prompt": "a", "tenant": "ann", "deadline_s": 1000000, "priority": 2}, {"prompt": "b"}]
    source.write_text("\n".join(json.dumps(line) for line in lines))
    assert manta("--input", str(source), *way, "--output", str(target)).exit_code == 0
    asked = [(request.tenant, request.deadline_s, request.priority) for request in manta.engine.requests]
    assert asked == [("ann", 1e6, 2), ("", None, 0)]
    assert not any("error" in json.loads(line) for line in target.read_text().splitlines())


def test_a_passed_deadline_is_exit_1_and_in_the_results(manta: Manta, tmp_path: Path) -> None:
    source, target = tmp_path / "prompts.jsonl", tmp_path / "results.jsonl"
    source.write_text('{"prompt": "a", "deadline_s": 0}')
    manta.engine.hold_after = 0
    result = manta("--input", str(source), "--output", str(target))
    assert result.exit_code == 1
    assert "manta: error: the request did not end within 0 s" in result.stderr
    record = json.loads(target.read_text())
    assert (record["error"], record["error_type"]) == ("the request did not end within 0 s", "timeout_error")


def test_a_bad_deadline_is_exit_2(manta: Manta, tmp_path: Path) -> None:
    source = tmp_path / "prompts.jsonl"
    source.write_text('{"prompt": "b", "deadline_s": "soon"}')
    result = manta("--input", str(source))
    assert result.exit_code == 2
    assert "manta: error: deadline_s must be a number of seconds, not 'soon'" in result.stderr
    assert manta.engine.requests == []


ODD = "a\u2028b\x85c\x0cd\x0be\x1cf"
"""What `str.splitlines` takes for ends of lines, and JSON and prompts do not."""


@pytest.mark.parametrize(("start", "end"), [("", "\n"), ("\ufeff", "\r\n")])
@pytest.mark.parametrize("piped", [False, True])
@pytest.mark.parametrize("format", ["jsonl", "lines"])
def test_lines_end_at_line_feeds_alone_and_a_byte_order_mark_is_no_text(
    manta: Manta, tmp_path: Path, start: str, end: str, piped: bool, format: str
) -> None:
    file, target = tmp_path / "in", tmp_path / "results.jsonl"
    prompts = ["first", ODD]
    lines = prompts if format == "lines" else [json.dumps({"prompt": each}, ensure_ascii=False) for each in prompts]
    content = start + "".join(line + end for line in lines)
    file.write_bytes(content.encode())
    source = "-" if piped else str(file)
    result = manta("--input", source, "--format", format, "--output", str(target), stdin=content if piped else "")
    assert result.exit_code == 0, result.stderr
    assert [json.loads(line)["prompt"] for line in target.read_text().split("\n")[:-1]] == prompts


def test_one_prompt_keeps_its_line_ends(manta: Manta, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\x0c\n")
    target = tmp_path / "results.jsonl"
    assert manta("--input", str(tmp_path / "in.txt"), "--format", "text", "--output", str(target)).exit_code == 0
    assert json.loads(target.read_text())["prompt"] == "one\r\ntwo\x0c\n"


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (r'{"prompt": "a\ud83d"}', r"character 1, '\ud83d', is half of a surrogate pair"),
        (r'{"messages": [{"role": "user", "content": "\ude00"}]}', "is half of a surrogate pair"),
        (r'{"prompt": "a", "tenant": "\ud800"}', r"tenant: character 0, '\ud800', is half"),
        (r'{"prompt": "a", "cache_salt": "\ud800"}', r"cache_salt: character 0, '\ud800', is half"),
        (r'{"prompt": "a", "stop": ["\ud800"]}', r"stop: character 0, '\ud800', is half"),
        ('{"prompt_token_ids": [5, 400]}', "token id 400 is outside the vocabulary"),
        ('{"prompt": "b", "deadline_s": "soon"}', "deadline_s must be a number of seconds"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_cannot_be_served_fails_alone(
    manta: Manta, tmp_path: Path, line: str, error: str, stream: bool
) -> None:
    source, target = tmp_path / "prompts.jsonl", tmp_path / "results.jsonl"
    source.write_text('{"prompt": "x\\ud83d\\ude00"}\n' + line + '\n{"prompt": "z"}\n')
    result = manta("--input", str(source), "--output", str(target), *["--stream"] * stream)
    assert result.exit_code == 1
    assert "manta: error: 1 of 3 requests failed: " in result.stderr
    first, bad, last = (json.loads(line) for line in target.read_text().splitlines())
    assert [first["prompt"], last["prompt"]] == ["x\N{GRINNING FACE}", "z"]
    assert [each["outputs"][0]["text"] for each in (first, bad, last)] == [ANSWER, "", ANSWER]
    assert error in bad["error"]
    assert (bad["index"], bad["error_type"], bad["outputs"][0]["finish_reason"]) == (1, "invalid_request_error", "error")


def test_results_to_stdout(manta: Manta) -> None:
    result = manta("a", "--output", "-", "-q")
    assert json.loads(result.stdout)["outputs"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("arguments", "prompts"),
    [
        ([], ["one\ntwo\n"]),
        (["--format", "lines"], ["one", "two"]),
        (["--input", "-", "--format", "lines", "--chat"], ["<|user|>one\n", "<|user|>two\n"]),
    ],
)
def test_stdin(manta: Manta, tokenizer: Tokenizer, arguments: list[str], prompts: list[str]) -> None:
    assert manta(*arguments, stdin="one\ntwo\n").exit_code == 0
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    assert [list(memoryview(request.tokens).cast("i")) for request in manta.engine.requests] == ids


def test_token_ids(manta: Manta) -> None:
    assert manta("5, 6 7", "--token-ids").exit_code == 0
    assert list(memoryview(manta.engine.requests[0].tokens).cast("i")) == [5, 6, 7]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--token-ids", "5 x"], "not token ids: '5 x'"),
        (["--token-ids", "5 400"], "token id 400 is outside the vocabulary of 400 entries"),
        (["--chat", "--token-ids", "5"], "--chat and --token-ids exclude each other"),
        (["a", "--input", "x"], "both as arguments and by --input"),
        (["--input", "nowhere.jsonl"], "nowhere.jsonl: No such file or directory"),
        (["a", "--output", "nowhere/x.jsonl"], "nowhere/x.jsonl: No such file or directory"),
        (["a", "--temperature", "-1"], "temperature=-1.0 is outside [0.0, inf]"),
        (["a", "--logit-bias", "5"], "--logit-bias '5' is not ID=BIAS"),
        (["a", "--kv-memory", "lots"], "kv_memory='lots' is not a size"),
        (["a", "--block-size", "100"], "block_size=100 is not a power of two"),
        (
            ["a", "--model", "nowhere"],
            "nowhere is not a folder: give the path of a checkpoint folder",
        ),
        ([], "stdin holds no prompt"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(manta: Manta, arguments: list[str], message: str) -> None:
    result = manta(*arguments)
    assert result.exit_code == 2
    [line] = [line for line in result.stderr.splitlines() if "Starting" not in line]
    assert line.startswith("manta: error: ")
    assert message in line
    assert manta.engine.starts == 0 or manta.engine.closed


def test_bad_jsonl_names_its_line(manta: Manta, tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": 7,}\n')
    result = manta("--input", str(file))
    assert result.exit_code == 2
    assert "p.jsonl, line 2: not valid JSON" in result.stderr
    assert manta.engine.starts == 0


def test_unknown_option_is_exit_2(manta: Manta) -> None:
    result = manta("a", "--tensor-paralel-size", "2")
    assert result.exit_code == 2
    assert "--tensor-parallel-size" in result.stderr


def test_failed_request_is_exit_1_and_the_rest_is_shown(manta: Manta) -> None:
    manta.engine.refuse = {9: "needs 7 blocks and the pool has 4"}
    result = manta("5", "9 9", "--token-ids")
    assert result.exit_code == 1
    assert ANSWER in result.stdout
    assert "manta: error: 1 of 2 requests failed: needs 7 blocks and the pool has 4" in result.stderr


def test_engine_that_does_not_start_is_exit_1(manta: Manta) -> None:
    manta.engine.fail_start = EngineError("the cluster has 2 CPUs and 4 ranks were asked for: lower --groups")
    result = manta("a")
    assert result.exit_code == 1
    assert "manta: error: the cluster has 2 CPUs" in result.stderr


def test_a_fault_of_ours_says_so(manta: Manta) -> None:
    manta.engine.fail_start = KeyError("oops")
    result = manta("a")
    assert result.exit_code == 1
    assert "KeyError: 'oops' (a fault of Manta's; --debug shows where)" in result.stderr
    assert isinstance(manta("a", "--debug").exception, KeyError)


@pytest.mark.parametrize(("said", "told"), [("", ""), ("Timed out waiting for result.", " (Timed out waiting for result.)")])
def test_what_takes_too_long_is_no_fault_of_ours(manta: Manta, said: str, told: str) -> None:
    manta.engine.fail_start = TimeoutError(said)
    result = manta("a")
    assert result.exit_code == 1
    assert f"something was not ready in time{told}: raise --start-timeout-s" in result.stderr
    assert "fault" not in result.stderr


def test_interrupt_is_tidy_and_exit_130(manta: Manta) -> None:
    manta.engine.hold_after = 2

    def interrupt() -> None:
        manta.engine.holding.wait()
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    threading.Thread(target=interrupt).start()
    result = manta("a", "b")
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "manta: interrupted"
    assert "Traceback" not in result.stderr
    assert manta.engine.aborted == [0, 1]
    assert manta.engine.closed


def test_help_says_units_and_defaults() -> None:
    result = CliRunner().invoke(app, ["generate", "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    for words in (
        "Tokens in a KV block: a power of two from 16 up. Default: 256.",
        "Default: 128.",
        "seconds. Default: 300.0.",
    ):
        assert words in result.stdout
    assert CliRunner().invoke(app, ["version"]).exit_code == 0
    assert CliRunner().invoke(app, ["--version"]).stdout == CliRunner().invoke(app, ["version"]).stdout != ""
