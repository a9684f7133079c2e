"""Ray clusters on this machine: a test's own, and those that `ray start` starts, for what `ray.init` cannot say."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray

from cluster.join import start_ray
from tests.shared.ports import free_ports
from tests.shared.processes import descendants, wait_gone

HOST = "127.0.0.2"  # loopback, which Ray keeps only if it is not 127.0.0.1
PATIENCE_S = 180.0


@contextlib.contextmanager
def own_ray(cpus: int) -> Iterator[None]:
    """This process's own, with as few processes as those that Manta starts."""
    start_ray(cpus)
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def ray_head(folder: Path, cpus: int, *options: str, **environment: str) -> Iterator[str]:
    """A head as a process of its own, below this one; yields the address to join. Its agent has a port of its own, too, which
    `ray.init` cannot say: where it is fixed, another cluster on this machine may have it, and take the jobs."""
    port, agent_port = free_ports(2, HOST)
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", f"--port={port}"]
    command += ["--include-log-monitor=false"]  # it sends lines to drivers, of which none asks for them
    if not any(option.startswith("--autoscaling-config") for option in options):
        command += ["--no-monitor"]  # the autoscaler
    command += [f"--num-cpus={cpus}", f"--node-ip-address={HOST}", f"--dashboard-agent-listen-port={agent_port}"]
    command += ["--disable-usage-stats", *options]
    with contextlib.ExitStack() as stack:
        try:
            address = stack.enter_context(_started(command, folder / "ray.log", environment))
        except HeadEnded:  # Ray gives a node 30 s to start in, which an overloaded machine may not have
            address = stack.enter_context(_started(command, folder / "ray.log", environment))
        yield address


class HeadEnded(AssertionError):
    """Before it was up; and what it has said."""


@contextlib.contextmanager
def _started(command: list[str], file: Path, environment: dict[str, str]) -> Iterator[str]:
    """Errors: HeadEnded."""
    with file.open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | environment, start_new_session=True
        )
        try:
            yield _address(process, file)
        finally:
            below = descendants(process.pid)
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=PATIENCE_S)
            for pid in wait_gone(below, patience_s=5.0):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.kill()


@contextlib.contextmanager
def autoscaling_ray(folder: Path, head_cpus: int, worker_cpus: int, max_workers: int) -> Iterator[str]:
    """One whose autoscaler adds and removes nodes: real raylets, faked machines. A worker node that is idle for some seconds is
    taken away. Ray's own `AutoscalingCluster` ends every Ray on the machine when it starts; this one ends what it started."""
    config = folder / "autoscaling.json"
    (port,) = free_ports(1, HOST)
    config.write_text(json.dumps(_config(f"{HOST}:{port}", head_cpus, worker_cpus, max_workers)))
    options = [f"--port={port}", "--include-dashboard=false", f"--autoscaling-config={config}"]
    with ray_head(folder, head_cpus, *options, AUTOSCALER_UPDATE_INTERVAL_S="1", RAY_FAKE_CLUSTER="1") as address:
        yield address


def _address(process: "subprocess.Popen[bytes]", log: Path) -> str:
    """From what `ray start` says: "--address='HOST:PORT'". Errors: HeadEnded."""
    deadline = time.monotonic() + PATIENCE_S
    while "--address='" not in (said := log.read_text()):
        if process.poll() is not None:
            raise HeadEnded(log.read_text())
        assert time.monotonic() < deadline, said
        time.sleep(0.2)
    return said.partition("--address='")[2].partition("'")[0]


def _config(address: str, head_cpus: int, worker_cpus: int, max_workers: int) -> dict[str, Any]:
    return {
        "cluster_name": "manta-autoscaling-test",
        "max_workers": max_workers,
        "idle_timeout_minutes": 0.05,
        "provider": {
            "type": "fake_multinode", "gcs_address": address, "disable_node_updaters": True,
            "disable_launch_config_check": True, "use_node_id_as_ip": True,  # all nodes share the addresses of this machine
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": head_cpus}, "node_config": {}, "max_workers": 0},
            "worker": {
                "resources": {"CPU": worker_cpus}, "node_config": {}, "min_workers": 0, "max_workers": max_workers,
            },
        },
        "head_node_type": "ray.head.default",
        "upscaling_speed": 1.0,
        "auth": {}, "docker": {}, "initialization_commands": [], "setup_commands": [], "head_setup_commands": [],
        "worker_setup_commands": [], "head_start_ray_commands": [], "worker_start_ray_commands": [], "file_mounts": {},
        "cluster_synced_files": [], "file_mounts_sync_continuously": False, "rsync_exclude": [], "rsync_filter": [],
    }  # fmt: skip
