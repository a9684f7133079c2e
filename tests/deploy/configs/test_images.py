"""The Dockerfiles, as far as they can be held to anything without Docker: they are parsed, never built here."""

import io
import json
import re
import shlex
import tomllib
from typing import Any

import pytest
from dockerfile_parse import DockerfileParser
from setuptools import find_packages  # type: ignore[import-untyped]

from manta.commands import app
from tests.deploy.configs.files import CONFIGS, PINS, PROJECT, REPOSITORY, serve_tree, tree

FILES = ("Dockerfile.cpu", "Dockerfile.cuda")
IGNORE = (REPOSITORY / ".dockerignore").read_text().splitlines()


def instructions(name: str) -> list[tuple[str, str]]:
    """(INSTRUCTION, value), in order."""
    parser = DockerfileParser(fileobj=io.BytesIO((CONFIGS / name).read_bytes()))
    return [(each["instruction"], each["value"]) for each in parser.structure if each["instruction"] != "COMMENT"]


def values(name: str, instruction: str) -> list[str]:
    return [value for found, value in instructions(name) if found == instruction]


@pytest.mark.parametrize("name", FILES)
def test_bases_are_pinned(name: str) -> None:
    for value in values(name, "FROM"):
        assert re.fullmatch(r"[a-z/]+:\d+\.\d+\.\d+-\S+( AS \w+)?", value), value


@pytest.mark.parametrize("name", FILES)
def test_what_is_copied_exists_and_is_all_that_a_build_needs(name: str) -> None:
    copied = [shlex.split(value) for value in values(name, "COPY")]
    sources = [source for words in copied if not words[0].startswith("--from") for source in words[:-1]]
    assert all((REPOSITORY / source).exists() for source in sources)
    assert {f"!{source}" for source in sources} <= set(IGNORE), "the context leaves out what it does not name"
    assert setuptools_packages() | {"pyproject.toml", "setup.py", PROJECT["readme"], *PROJECT["license-files"]} <= set(sources)


def setuptools_packages() -> set[str]:
    """The folders of those at the top."""
    said: dict[str, Any] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    return {package.partition(".")[0] for package in find_packages(str(REPOSITORY), include=said["find"]["include"])}


@pytest.mark.parametrize("name", FILES)
def test_every_install_is_held_to_the_pins(name: str) -> None:
    installs = [part for value in values(name, "RUN") for part in value.split("&&") if "pip install" in part]
    assert installs
    assert all("--constraint constraints.txt" in part for part in installs)
    (local,) = [pin for pin in PINS.values() if "+" in pin]
    assert local == PINS["torch"], "the one pin that PyPI does not have is the one that is rewritten"
    assert local.endswith("+cpu")
    assert any("s/+cpu$//" in value for value in values(name, "RUN"))


@pytest.mark.parametrize("name", FILES)
def test_it_runs_as_the_user_that_kubernetes_names(name: str) -> None:
    last = instructions(name)[[found for found, _ in instructions(name)].index("FROM", 1) :]
    (user,) = [value for found, value in last if found == "USER"]
    kind = name.removeprefix("Dockerfile.")
    pod = tree(f"kubernetes/raycluster-{'gpu' if kind == 'cuda' else kind}.yaml")["spec"]["headGroupSpec"]["template"]["spec"]
    assert int(user) == pod["securityContext"]["runAsUser"] > 0
    assert any(f"--uid {user}" in value for found, value in last if found == "RUN")
    assert pod["containers"][0]["image"] == f"manta:{PROJECT['version']}-{kind}"


@pytest.mark.parametrize("name", FILES)
def test_its_command_exists(name: str) -> None:
    (command,) = values(name, "CMD")
    script, subcommand, *_ = json.loads(command)
    assert script in PROJECT["scripts"]
    assert subcommand in {each.name or each.callback.__name__ for each in app.registered_commands if each.callback}


@pytest.mark.parametrize("name", FILES)
def test_the_doors_are_shown_and_health_is_asked_there(name: str) -> None:
    serve = serve_tree("serve-cluster.yaml")
    doors = [serve["http_options"]["port"], serve["grpc_options"]["port"]]
    (exposed,) = values(name, "EXPOSE")
    assert [int(port) for port in exposed.split()] == doors
    (check,) = values(name, "HEALTHCHECK")
    assert f"http://127.0.0.1:{doors[0]}/health" in check


@pytest.mark.parametrize("name", FILES)
def test_login_shells_find_ray(name: str) -> None:
    """Debian's /etc/profile sets PATH anew, and KubeRay and `ray up` start Ray from a login shell."""
    assert any("> /etc/profile.d/" in value and "PATH=/opt/venv/bin" in value for value in values(name, "RUN"))
