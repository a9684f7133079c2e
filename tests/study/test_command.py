"""`manta study` as a user types it: a quick run writes the whole page, and the page again from what it has saved."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from manta.commands import app
from manta.names import ROOMS, ROOT
from tests.simulator.excerpts import conversations

pytest.importorskip("matplotlib")

TITLES = ("Memory layout", "Pooling and reuse", "Fragmentation", "Against PagedAttention", "Impact and trade-offs")
PLOTS = ("layout", "reuse", "fragmentation", "paging", "tradeoffs")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one quick run over a small trace."""
    return study(tmp_path_factory.mktemp("study"))


def study(folder: Path, *arguments: str) -> Path:
    trace = conversations(folder / "trace.jsonl", count=12, turns=3)
    command = ["study", "--quick", "--output", str(folder / "docs"), "--trace", str(trace), "--threads", "1", *arguments]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    return folder / "docs"


@pytest.mark.slow
def test_every_question_is_answered_with_numbers_and_its_command(made: Path) -> None:
    page = (made / "kv-study.md").read_text()
    sections = re.split(r"^## ", page, flags=re.MULTILINE)[1:]
    assert len(sections) == len(TITLES)
    for at, (section, title) in enumerate(zip(sections, TITLES, strict=True), start=1):
        head, answer = section.split("\n\n", 2)[:2]
        assert head.startswith(f"{at}. {title}")
        assert re.search(r"\d", answer), answer
        assert f"manta study --questions {at} --quick --trace trace.jsonl" in section
        assert "**What it does not show.**" in section
        assert not re.search(r"\b(nan|inf|None)\b", section)
    assert "Made with `--quick`" in page


@pytest.mark.slow
def test_every_plot_is_a_drawing_that_the_page_shows(made: Path) -> None:
    page = (made / "kv-study.md").read_text()
    for name in PLOTS:
        drawing = (made / "kv-study" / f"{name}.svg").read_text()
        assert drawing.count("<path") > 10
        assert f"(kv-study/{name}.svg)" in page


@pytest.mark.slow
def test_the_page_is_drawn_again_from_saved_results(made: Path, tmp_path: Path) -> None:
    require_drawn_again(made, tmp_path, "reuse")


def test_so_is_that_of_one_question(tmp_path: Path) -> None:
    require_drawn_again(study(tmp_path, "--questions", "4"), tmp_path / "again", "paging")


def require_drawn_again(made: Path, folder: Path, plot: str) -> None:
    saved = made / "kv-study" / "results-cpu.json"
    result = CliRunner().invoke(app, ["study", "--output", str(folder), "--from", str(saved)])
    assert result.exit_code == 0, result.output
    for name in ("kv-study.md", f"kv-study/{plot}.svg"):
        assert (folder / name).read_text() == (made / name).read_text()


@pytest.mark.slow
def test_results_of_a_gpu_stand_beside_those_of_the_cpu(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "docs")
    content = json.loads((made / "kv-study" / "results-cpu.json").read_text())
    layout = content["questions"]["1"]
    layout["machine"]["device"] = "NVIDIA Imaginary"
    printed = json.dumps({"device": "cuda", "questions": {"1": layout}})
    (tmp_path / "gpu.json").write_text(f"flash left out: no such package\n{printed}\n")
    result = CliRunner().invoke(app, ["study", "--output", str(tmp_path / "docs"), "--from", str(tmp_path / "gpu.json")])
    assert result.exit_code == 0, result.output
    page = (tmp_path / "docs" / "kv-study.md").read_text()
    assert "On the NVIDIA Imaginary" in page
    assert "On the CPU" in page
    assert "The GPU's figures are missing" not in page


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--questions", "1,7"), "7 is not one of 1, 2, 3, 4, 5"),
        (("--device", "tpu"), "neither cpu nor cuda"),
        (("--device", "cuda", "--questions", "2"), "nothing to measure on a GPU"),
        (("--from", "nowhere.json"), "nowhere.json"),
        (("--questions", "3", "--trace", "nowhere.jsonl"), "nowhere.jsonl"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, arguments: tuple[str, str], words: str) -> None:
    result = CliRunner().invoke(app, ["study", "--quick", "--output", str(tmp_path), *arguments])
    assert result.exit_code == 2
    assert words in result.stderr.splitlines()[-1]


def test_what_is_no_result_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("[]")
    result = CliRunner().invoke(app, ["study", "--output", str(tmp_path), "--from", str(tmp_path / "other.json")])
    assert result.exit_code == 2
    assert "holds no results of the study" in result.stderr


def test_a_wheel_says_that_it_has_no_experiments(tmp_path: Path) -> None:
    """A copy of what a wheel has, asked by a process of its own."""
    for package in (*ROOMS, "manta"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    asked = subprocess.run(
        [sys.executable, "-m", "manta", "study", "--quick"], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert asked.returncode == 2
    assert "not part of an installed wheel" in asked.stderr
