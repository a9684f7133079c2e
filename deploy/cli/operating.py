"""`manta drain` and `manta roll`: what an operator asks of a running endpoint. Imports httpx when asked."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from deploy.cli.exits import reported_errors
from deploy.cli.options import DebugOption, flag
from deploy.config.client import EXAMPLE, open_client
from deploy.config.load import read_api_keys
from deploy.config.serve import ServeConfig

TIMEOUT_S = 30.0
LOOK_S = 0.5

UrlArgument = Annotated[str, typer.Argument(help="Address of an endpoint on Ray.", show_default=False)]
KeyFileOption = Annotated[
    str | None, flag("--api-key-file", help="File whose first key is sent. Default: MANTA_API_KEYS, if set.")
]


def drain(
    group: Annotated[int, typer.Argument(help="Number of the group.", show_default=False)],
    url: UrlArgument = EXAMPLE,
    replace: Annotated[bool, flag("--replace", help="Start it anew afterwards; otherwise there is one group fewer.")] = False,
    wait: Annotated[bool, flag("--wait/--no-wait", help="Wait until that is done. Default: yes.")] = True,
    api_key_file: KeyFileOption = None,
    debug: DebugOption = False,
) -> None:
    """Let a group of a running endpoint run empty, while the others serve; then end it, or start it anew.

    What runs there ends, or moves to other groups after drain_timeout_s. The API key must be an operator's.
    """
    with reported_errors(debug), _client(url, api_key_file) as client:
        before = _epoch(client, group)
        _post(client, f"/admin/groups/{group}/drain", replace=replace)
        typer.echo(f"group {group} runs empty")
        while wait:
            now = _epoch(client, group)
            if now is None if not replace else now is not None and now > (before or 0):
                typer.echo(f"group {group} {'serves again' if replace else 'is gone'}")
                return
            time.sleep(LOOK_S)


def roll(
    model: Annotated[str, typer.Argument(help="Folder of the checkpoint, where the endpoint runs.", show_default=False)],
    url: UrlArgument = EXAMPLE,
    api_key_file: KeyFileOption = None,
    debug: DebugOption = False,
) -> None:
    """Let a running endpoint serve another checkpoint, under the same name and without a failed request.

    Groups of the new version come up beside those of the old one, which run empty one after the other. manta top shows how far
    it is. A file that Serve was given says the old model still: change it too.
    """
    with reported_errors(debug), _client(url, api_key_file) as client:
        _post(client, "/admin/roll", model=str(Path(model).absolute()))
        typer.echo(f"{model} is on its way")


@contextlib.contextmanager
def _client(url: str, api_key_file: str | None) -> Iterator[Any]:
    import httpx

    keys = read_api_keys(ServeConfig(api_key_file=api_key_file))
    with open_client(httpx.Client, url, keys[0] if keys else None, timeout=TIMEOUT_S) as client:
        yield client


def _epoch(client: Any, group: int) -> int | None:
    """Of a group that is there, -1 while it comes up, or while nobody tells; None if it is not there."""
    import httpx

    groups: list[dict[str, Any]] = []
    with contextlib.suppress(httpx.HTTPError):
        groups = client.get("/status.json", params={"history": False}).raise_for_status().json()["groups"]
    return next((each["epoch"] for each in groups if each["group"] == group), None if groups else -1)


def _post(client: Any, path: str, **params: Any) -> None:
    """Errors: ValueError with what the endpoint says, if it refuses; OSError if it cannot be asked now."""
    import httpx

    try:
        answer = client.post(path, params=params)
    except httpx.HTTPError as error:
        raise OSError(f"no answer from {client.base_url}: {error}") from error
    if answer.status_code == 404:
        raise ValueError(f"{client.base_url} has no {path}: only endpoints on Ray can be changed while they run")
    if answer.is_error:
        said = answer.json()["error"]["message"]
        raise ValueError(said) if answer.is_client_error else OSError(said)
