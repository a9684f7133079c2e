"""`from manta import LLM` beside a user's own folders of the names that Manta's packages have."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import manta
from manta.names import ROOMS, ROOT

WRONG = "raise RuntimeError('this is not the package that was meant')\n"
SCRIPT = """
import sys
from manta import LLM, SamplingParams

with LLM(local="local" in sys.argv, kv_memory="64MiB", max_model_len=512, groups=2) as llm:
    [output] = llm.generate("def add(", SamplingParams(temperature=0, max_tokens=8), progress=False)
    print(output.outputs[0].token_ids)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A project with packages, a module and a folder without `__init__.py` of Manta's names, and a script."""
    for package in ("deploy", "cluster"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(WRONG)
    (tmp_path / "deploy" / "settings.py").write_text("X = 1\n")
    (tmp_path / "workers").mkdir()
    (tmp_path / "scheduler.py").write_text(WRONG)
    (tmp_path / "script.py").write_text(SCRIPT)
    return tmp_path


def python(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True)


def run_script(folder: Path, *arguments: str) -> str:
    result = python(folder, "script.py", *arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def said() -> str:
    """What the script says, by this process, which has nothing of such names beside it."""
    with manta.LLM(local=True, kv_memory="64MiB", max_model_len=512, groups=2) as llm:
        [output] = llm.generate("def add(", manta.SamplingParams(temperature=0, max_tokens=8), progress=False)
    return f"{output.outputs[0].token_ids}\n"


def test_a_script_beside_folders_of_the_same_names(folder: Path, said: str) -> None:
    assert run_script(folder, "local") == said


@pytest.mark.ray
@pytest.mark.slow
def test_a_script_on_ray_beside_folders_of_the_same_names(folder: Path, said: str) -> None:
    """Ray's processes look beside the script too."""
    assert run_script(folder) == said


@pytest.mark.parametrize("way", [["-m", "manta", "version"], [str(Path(sys.executable).parent / "manta"), "version"]])
def test_the_command_beside_folders_of_the_same_names(folder: Path, way: list[str]) -> None:
    result = python(folder, *way)
    assert (result.returncode, result.stdout.split()[0]) == (0, "manta"), result.stderr


def test_what_was_imported_before_by_such_a_name_is_told(folder: Path) -> None:
    (folder / "cluster" / "__init__.py").write_text("")
    result = python(folder, "-c", "import cluster\nimport manta")
    assert result.returncode == 1
    assert f"has a package 'cluster', and this process has imported {folder / 'cluster'} by that name" in result.stderr


def test_a_module_that_only_the_users_folder_has_is_told(folder: Path) -> None:
    (folder / "deploy" / "__init__.py").write_text("")
    code = "import manta\ntry: import deploy.{}\nexcept ModuleNotFoundError as error: print(error)"
    told = python(folder, "-c", code.format("settings")).stdout
    assert told == (
        "No module named 'deploy.settings': in a process that imports manta, 'deploy' is a package of Manta's; to import "
        f"that of {folder / 'deploy'} beside it, rename it\n"
    )
    assert python(folder, "-c", code.format("nowhere")).stdout == "No module named 'deploy.nowhere'\n"


def test_a_ray_that_somebody_else_has_joined_has_to_claim_the_names(folder: Path) -> None:
    code = """
import cluster.shadows, ray
from types import SimpleNamespace
for environment in ({}, {"worker_process_setup_hook": cluster.shadows.CLAIM}):
    ray.get_runtime_context = lambda: SimpleNamespace(runtime_env=environment)
    try: cluster.shadows.refuse_unclaimed()
    except RuntimeError as error: print(error)
    else: print(cluster.shadows.job_environment())
"""
    first, second = python(folder, "-c", "import manta\n" + code).stdout.splitlines()
    assert "take " + str(folder / "scheduler.py") in first
    assert "ray.init(runtime_env={'worker_process_setup_hook': 'manta.names.claim'})" in first
    assert second == "{'worker_process_setup_hook': 'manta.names.claim'}"


def test_the_names_are_those_of_the_packages_and_nothing_is_hidden_at_home() -> None:
    from cluster import shadows
    from scheduler import logs

    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert set(ROOMS) == set(logs.ROOMS) == packages - {"manta", "benchmarks", "tests"}
    assert shadows.ROOT == ROOT
    assert os.getcwd() != str(ROOT) or shadows.job_environment() is None


def test_what_manta_offers_is_there_and_light() -> None:
    assert all(hasattr(manta, name) for name in manta.__all__)
    heavy = {"torch", "ray", "transformers", "tokenizers"}
    for module, absent in (("manta", heavy), ("manta.commands", heavy | {"fastapi", "httpx", "fsspec"})):
        check = f"import sys, {module}; print({absent} & set(sys.modules) or '')"
        assert subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout == "\n"
