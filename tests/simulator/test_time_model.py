"""Steps take what the model says, and a benchmark's figures give a model that predicts them."""

import json
from pathlib import Path

import pytest

from simulator.time_model import TimeModel, calibrated

FIGURES = {"output_tokens_per_s": 784.0, "ms_per_token": 7.4, "prefill_tokens_per_s": 3709.0, "vllm": {"ms_per_token": 9.0}}


def test_context_grows_with_every_step() -> None:
    model = TimeModel(1000.0, 0.01, 0.001, 1e-6)
    assert model.durations_s(3, 2, 500, 100) == pytest.approx([0.1125, 0.112502, 0.112504])


def test_a_machine_of_many_groups() -> None:
    one, eight = TimeModel(), TimeModel().times(8)
    assert eight.durations_s(1, 64, 8000, 4096) == pytest.approx(one.durations_s(1, 8, 1000, 512))


def test_calibration_predicts_the_benchmark(tmp_path: Path) -> None:
    path = tmp_path / "engine.txt"
    path.write_text("a table\n" + json.dumps({"0.1B": FIGURES}) + "\n")
    model = calibrated(path)
    assert model.prefill_tokens_per_s == 3709.0
    assert model.durations_s(1, 1, 0, 0)[0] == pytest.approx(7.4e-3, rel=0.05)
    whole_s = 32 * 160 / 3709 + model.durations_s(64, 32, 0, 0).sum()
    assert 32 * 64 / whole_s == pytest.approx(784, rel=0.01)


def test_a_model_must_be_named_where_there_are_several(tmp_path: Path) -> None:
    path = tmp_path / "engine.json"
    path.write_text(json.dumps({"0.1B": FIGURES, "0.6B": FIGURES | {"ms_per_token": 24.0}}))
    assert calibrated(path, "0.6B").decode_step_s == 0.024
    with pytest.raises(ValueError, match=r"0\.1B, 0\.6B"):
        calibrated(path)


@pytest.mark.parametrize("text", ["", "no JSON", '{"0.1B": {"ms_per_token": 1}}'])
def test_what_is_no_benchmark_is_said(tmp_path: Path, text: str) -> None:
    (tmp_path / "engine.json").write_text(text)
    with pytest.raises(ValueError, match=r"python -m benchmarks\.engine --json"):
        calibrated(tmp_path / "engine.json")


def test_times_must_be_possible() -> None:
    with pytest.raises(ValueError, match="above 0"):
        TimeModel(prefill_tokens_per_s=0.0)
