"""`manta replay` as a user types it."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from manta.commands import app
from tests.simulator.excerpts import conversations

POOLS = ("--groups", "2", "--blocks", "400", "--quiet")


@pytest.fixture
def trace(tmp_path: Path) -> str:
    return str(conversations(tmp_path / "trace.jsonl", count=8, turns=3))


def test_a_table_and_one_object(trace: str) -> None:
    result = CliRunner().invoke(app, ["replay", trace, *POOLS, "--policy", "manta", "--policy", "round-robin", "--json"])
    assert result.exit_code == 0, result.output
    assert [line.split()[0][:8] for line in result.stdout.splitlines()[2:4]] == ["manta", "round-ro"]  # narrow: it is cut
    outcomes = json.loads(result.stdout.splitlines()[-1])
    assert list(outcomes) == ["manta", "round-robin"]
    wanted = {"token_hit_rate", "busiest_over_mean", "ttft_s", "tpot_s", "goodput", "preemptions", "core_cpu_s"}
    for outcome in outcomes.values():
        assert outcome["requests"] == 24
        assert wanted <= outcome.keys()
        assert {"p50", "p99"} <= outcome["ttft_s"].keys()


def test_old_spellings_are_taken_and_named(trace: str) -> None:
    policy = ("--policy", "manta", "--quiet", "--groups", "2", "--json")
    old = CliRunner().invoke(app, ["replay", trace, "--pages=400", "--page-size", "128", *policy])
    new = CliRunner().invoke(app, ["replay", trace, "--blocks", "400", "--block-size", "128", *policy])
    assert "--pages is called --blocks now" in old.stderr
    assert "--page-size is called --block-size now" in old.stderr
    assert not new.stderr
    hit_rates = [json.loads(result.stdout.splitlines()[-1])["manta"]["token_hit_rate"] for result in (old, new)]
    assert hit_rates[0] == hit_rates[1] > 0


def test_an_option_that_is_gone_is_taken_and_does_nothing(trace: str) -> None:
    arguments = ["replay", trace, *POOLS, "--policy", "manta-fetch", "--json"]
    for gone in ("--relieve", "--no-relieve"):
        result = CliRunner().invoke(app, [*arguments, gone])
        assert result.exit_code == 0, result.output
        assert f"{gone} does nothing any more" in result.stderr
    assert "relieve" not in CliRunner().invoke(app, ["replay", "--help"]).stdout


def test_a_model_that_sees_a_window_needs_less_room(trace: str) -> None:
    """In pools that are smaller than its prompts."""
    arguments = ["replay", trace, "--groups", "2", "--blocks", "18", "--max-num-batched-tokens", "1024", "--quiet", "--json"]
    outcomes = []
    for window in ((), ("--window", "2048")):
        result = CliRunner().invoke(app, [*arguments, "--policy", "manta", *window])
        assert result.exit_code == 0, result.output
        outcomes.append(json.loads(result.stdout.splitlines()[-1])["manta"])
    assert outcomes[0]["refused"] > outcomes[1]["refused"] == 0
    assert CliRunner().invoke(app, [*arguments, "--window", "0"]).exit_code == 2


def test_a_model_some_of_whose_layers_see_a_window_needs_less_room(trace: str) -> None:
    """In the memory of as many blocks of all layers."""
    arguments = ["replay", trace, "--groups", "2", "--blocks", "60", "--max-num-batched-tokens", "512", "--quiet", "--json"]
    outcomes = []
    for narrow in ((), ("--narrow", "512", "--narrow-share", "0.8", "--max-num-seqs", "8")):
        result = CliRunner().invoke(app, [*arguments, "--policy", "manta-fetch", *narrow])
        assert result.exit_code == 0, result.output
        outcomes.append(json.loads(result.stdout.splitlines()[-1])["manta-fetch"])
    assert outcomes[0]["token_hit_rate"] < outcomes[1]["token_hit_rate"]
    assert CliRunner().invoke(app, [*arguments, "--narrow", "9", "--window", "9"]).exit_code == 2


def test_failures_and_limits(trace: str) -> None:
    arguments = [*POOLS, "--policy", "manta", "--limit", "9", "--fail", "1@2:3", "--speed-up", "2", "--json"]
    result = CliRunner().invoke(app, ["replay", trace, *arguments])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout.splitlines()[-1])["manta"]["requests"] == 9


def test_every_decision_is_explained_and_the_cheapest_way_is_chosen(trace: str, tmp_path: Path) -> None:
    def explained(name: str) -> list[str]:
        arguments = [*POOLS, "--policy", "manta-fetch", "--policy", "precise", "--fail", "1@8:3", "--why", str(tmp_path / name)]
        result = CliRunner().invoke(app, ["replay", trace, *arguments])
        assert result.exit_code == 0, result.output
        return (tmp_path / name).read_text().splitlines()

    lines = explained("first")
    assert lines == explained("second")
    decisions = [json.loads(line)["decision"] for line in lines]
    assert {json.loads(line)["policy"] for line in lines} == {"manta-fetch"}
    assert {decision["stream"] for decision in decisions} == set(range(24))
    for decision in decisions:
        chosen, other = decision["chosen"], decision["runner_up"]
        parts = ("uncached", "queued", "fetch", "decoding", "evicted")
        assert chosen["cost"] == sum(chosen[part] for part in parts)
        assert other is None or other["cost"] >= chosen["cost"]
        assert (chosen["source"] is not None) == (chosen["fetched_tokens"] > 0)
    assert any(decision["chosen"]["source"] is not None for decision in decisions)


def test_a_synthetic_trace() -> None:
    trace = "synthetic:requests=40,rate=20,prompt=2000,output=20,users=5"
    result = CliRunner().invoke(app, ["replay", trace, *POOLS, "--policy", "manta", "--json"])
    assert result.exit_code == 0, result.output
    outcome = json.loads(result.stdout.splitlines()[-1])["manta"]
    assert outcome["requests"] == 40
    assert 0 < outcome["token_hit_rate"] < 0.6


def test_a_synthetic_trace_that_cannot_be_is_one_line() -> None:
    result = CliRunner().invoke(app, ["replay", "synthetic:user=5", *POOLS])
    assert result.exit_code == 2
    assert "did you mean users?" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--policy", "clairvoyant"), "--policy clairvoyant is not one of manta"),
        (("--fail", "soon"), "is not GROUP@SECONDS"),
        (("--fail", "7@1"), "groups 0 to 1"),
        (("--drain", "7@1"), "groups 0 to 1"),
        (("--block-size", "100"), "power of two"),
        (("--calibrate", "nowhere.json"), "nowhere.json"),
        (("--speed-up", "0"), "above 0"),
    ],
)
def test_mistakes_are_one_line(trace: str, arguments: tuple[str, str], words: str) -> None:
    result = CliRunner().invoke(app, ["replay", trace, *POOLS, *arguments])
    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
