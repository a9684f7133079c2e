"""`ray job submit` for real: the working directory travels, the groups are the job's own or those of a running application."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import serve
from ray.job_submission import JobStatus, JobSubmissionClient

from deploy.batch.limits import Limits
from deploy.batch.run import Task, run
from deploy.batch.storage import Location
from deploy.config.load import ConfigError, load_config
from deploy.doors.access import ApiKeys
from deploy.serving.applications import start_proxies
from deploy.serving.replicas.ingress import application
from tests.deploy.batch.jobs import CHAT, as_lines, custom_ids, entry, read
from tests.shared.ports import free_ports
from tests.shared.processes import SCHEDULER, all_named
from tests.shared.ray_heads import ray_head

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[3]
PATIENCE_S = 120.0
ASKED_EVERY_S = 0.5
"""The dashboard, which computes for each answer."""
ENTRIES = [entry(f"def f{number}(", max_tokens=60, ignore_eos=True) for number in range(40)]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JobSubmissionClient]:
    """Jobs need the dashboard and its agent."""
    (port,) = free_ports(1)
    options = ("--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={port}")
    with ray_head(tmp_path_factory.mktemp("ray"), 8, *options) as address:
        ray.init(address=address, log_to_driver=False)
        yield reached(f"http://127.0.0.1:{port}")
        ray.shutdown()


def reached(address: str) -> JobSubmissionClient:
    """The dashboard comes up after the head."""
    deadline_s = time.monotonic() + PATIENCE_S
    while True:
        try:
            return JobSubmissionClient(address)
        except ConnectionError:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(ASKED_EVERY_S)


def submit(client: JobSubmissionClient, folder: Path, *arguments: str) -> str:
    command = " ".join([sys.executable, "-m", "manta", "batch", *arguments])
    deadline_s = time.monotonic() + PATIENCE_S
    while True:
        try:
            job: str = client.submit_job(entrypoint=command, runtime_env={"working_dir": str(folder)})
        except RuntimeError as error:  # the agent that takes jobs comes up after the dashboard
            if "No available agent" not in str(error) or time.monotonic() > deadline_s:
                raise
            time.sleep(0.5)
        else:
            return job


def said(client: JobSubmissionClient, job: str) -> str:
    return f"{client.get_job_info(job).message}\n{client.get_job_logs(job)}"


def wait_until_ended(client: JobSubmissionClient, job: str) -> JobStatus:
    deadline_s = time.monotonic() + PATIENCE_S
    while not (status := client.get_job_status(job)).is_terminal():
        assert time.monotonic() < deadline_s, said(client, job)
        time.sleep(ASKED_EVERY_S)
    return status


def wait_while_it_runs(client: JobSubmissionClient, job: str, true: Callable[[], bool]) -> None:
    """Until that is true, which is looked at often: whether the job still runs is asked less often."""
    deadline_s, asked_s = time.monotonic() + PATIENCE_S, 0.0
    while not true():
        if time.monotonic() > asked_s + ASKED_EVERY_S:
            assert not client.get_job_status(job).is_terminal(), said(client, job)
            asked_s = time.monotonic()
        assert asked_s < deadline_s, said(client, job)
        time.sleep(0.02)


def test_a_job_outlives_its_scheduler_and_its_output_outlives_the_job(client: JobSubmissionClient, tmp_path: Path) -> None:
    """Submitted from this repository, and from a folder of somebody's with packages of the same names."""
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    theirs = tmp_path / "project"
    for package in ("deploy", "scheduler"):
        (theirs / package).mkdir(parents=True)
        (theirs / package / "__init__.py").write_text("raise RuntimeError('this is not the package that was meant')\n")
    source.write_bytes(as_lines(ENTRIES))
    arguments = ["--input", str(source), "--output", str(output), "--kv-memory", "64MiB", "--max-num-seqs", "4"]

    first = submit(client, ROOT, *arguments)
    wait_while_it_runs(client, first, lambda: output.exists() and bool(output.read_bytes()))
    client.stop_job(first)
    assert wait_until_ended(client, first) is JobStatus.STOPPED
    before = len(read(output))
    assert 0 < before < len(ENTRIES)

    second = submit(client, theirs, *arguments)
    wait_while_it_runs(client, second, lambda: len(read(output)) > before)  # a line is written at once: no part is ever seen
    (scheduler,) = all_named(SCHEDULER, 1)
    os.kill(scheduler, signal.SIGKILL)
    assert wait_until_ended(client, second) is JobStatus.SUCCEEDED, said(client, second)
    assert custom_ids(read(output)) == custom_ids(ENTRIES)
    assert {each["response"]["status_code"] for each in read(output)} == {200}
    assert f", 0 failed, {before} done before" in client.get_job_logs(second)


@pytest.mark.slow
def test_the_groups_of_an_application_answer_too(client: JobSubmissionClient, tmp_path: Path) -> None:  # noqa: ARG001
    """Through Serve's handle, and through its endpoint."""
    source = tmp_path / "in.jsonl"
    source.write_bytes(as_lines([*ENTRIES[:10], entry("chat", CHAT, model="tiny")]))
    (port,) = free_ports(1)
    config = load_config(engine={"kv_memory": "64MiB"}, serve={"port": port}, environ={})

    def answered(name: str, **ways: str) -> list[dict[str, Any]]:
        output = tmp_path / name
        task = Task(Location.parse(str(source)), Location.parse(str(output)), Limits(), ways.get("url"), ways.get("app"))
        assert run(task, config, shown=False) == 0
        return read(output)

    start_proxies(config.serve)
    serve.run(application(config.engine, config.serve, ApiKeys(), 1), name="shared")
    try:
        for answers in (answered("app.jsonl", app="shared"), answered("url.jsonl", url=f"http://127.0.0.1:{port}")):
            assert len(answers) == 11
            assert {each["response"]["status_code"] for each in answers} == {200}
        with pytest.raises(ConfigError, match="no Manta application 'nosuch'"):
            answered("none.jsonl", app="nosuch")
    finally:
        serve.shutdown()
