"""`manta drain` and `manta roll`: what an operator asks of a running endpoint, and how. Imports httpx when asked."""

import contextlib
import time
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from deploy.config.client import EXAMPLE, open_client
from deploy.config.load import read_api_keys
from deploy.config.serve import ServeConfig
from deploy.terminal.exits import reported_errors
from deploy.terminal.options import DebugOption, flag
from workers.model.sources.naming import wherever

TIMEOUT_S = 30.0
LOOK_S = 0.5

UrlArgument = Annotated[str, typer.Argument(help="Address of an endpoint on Ray.", show_default=False)]
KeyFileOption = Annotated[
    str | None, flag("--api-key-file", help="File whose first key is sent. Default: MANTA_API_KEYS, if set.")
]


WaitOption = Annotated[bool, flag("--wait/--no-wait", help="Wait until that is done. Default: yes.")]
ModelOption = Annotated[str | None, flag("--model", help="Name of the model, of several. Default: the first.")]


def drain(
    group: Annotated[int, typer.Argument(help="Number of the group.", show_default=False)],
    url: UrlArgument = EXAMPLE,
    replace: Annotated[bool, flag("--replace", help="Start it anew afterwards; otherwise there is one group fewer.")] = False,
    model: ModelOption = None,
    wait: WaitOption = True,
    api_key_file: KeyFileOption = None,
    debug: DebugOption = False,
) -> None:
    """Let a group of a running endpoint run empty, while the others serve; then end it, or start it anew.

    What runs there ends, or moves to other groups after drain_timeout_s. The API key must be an operator's.
    """
    with reported_errors(debug), admin_client(url, api_key_file) as client:
        which = {} if model is None else {"model": model}
        before = _epoch(client, group, which)
        ask(client, "POST", f"/admin/groups/{group}/drain", params={"replace": replace, **which})
        typer.echo(f"group {group} runs empty")
        while wait:
            now = _epoch(client, group, which)
            if now is None if not replace else now is not None and now > (before or 0):
                typer.echo(f"group {group} {'serves again' if replace else 'is gone'}")
                return
            time.sleep(LOOK_S)


def roll(
    checkpoint: Annotated[str, typer.Argument(help="Its folder, where the endpoint runs, its id or URL.", show_default=False)],
    url: UrlArgument = EXAMPLE,
    model: ModelOption = None,
    revision: Annotated[str | None, flag("--revision", help="Branch, tag or commit of an id. Default: the newest.")] = None,
    api_key_file: KeyFileOption = None,
    debug: DebugOption = False,
) -> None:
    """Let a running endpoint serve another checkpoint, under the same name and without a failed request.

    Groups of the new version come up beside those of the old one, which run empty one after the other. manta top shows how far
    it is. A file that Serve was given says the old model still: change it too.
    """
    with reported_errors(debug), admin_client(url, api_key_file) as client:
        which = {name: value for name, value in {"model": model, "revision": revision}.items() if value is not None}
        ask(client, "POST", "/admin/roll", params={"checkpoint": wherever(checkpoint), **which})
        typer.echo(f"{checkpoint} is on its way")


@contextlib.contextmanager
def admin_client(url: str, api_key_file: str | None) -> Iterator[Any]:
    import httpx

    keys = read_api_keys(ServeConfig(api_key_file=api_key_file))
    with open_client(httpx.Client, url, keys[0] if keys else None, timeout=TIMEOUT_S) as client:
        yield client


def _epoch(client: Any, group: int, which: dict[str, str]) -> int | None:
    """Of a group that is there, -1 while it comes up, or while nobody tells; None if it is not there."""
    import httpx

    groups: list[dict[str, Any]] = []
    with contextlib.suppress(httpx.HTTPError):
        groups = client.get("/status.json", params={"history": False, **which}).raise_for_status().json()["groups"]
    return next((each["epoch"] for each in groups if each["group"] == group), None if groups else -1)


def ask(client: Any, method: str, path: str, **request: Any) -> Any:
    """What the endpoint answers. Errors: ValueError with what it says, if it refuses; OSError if it cannot be asked now."""
    import httpx

    try:
        answer = client.request(method, path, **request)
    except httpx.HTTPError as error:
        raise OSError(f"no answer from {client.base_url}: {error}") from error
    if not answer.is_error:
        return answer
    said = _refusal(answer)
    if answer.is_server_error:
        raise OSError(said or f"{client.base_url} answers with status {answer.status_code}")
    raise ValueError(said or f"{client.base_url} has no {path}: only endpoints on Ray can be changed while they run")


def _refusal(answer: Any) -> str | None:
    """What an endpoint says; None if it is none, or does not know the path."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        error = answer.json()["error"]
        return str(error["message"]) if answer.status_code != 404 or error["param"] else None
    return None
