"""`manta drain`: what an operator asks of a running endpoint. Imports httpx when asked."""

import time
from typing import Annotated, Any

import typer

from deploy.cli.exits import reported_errors
from deploy.cli.options import DebugOption, flag
from deploy.config.client import EXAMPLE, open_client
from deploy.config.load import read_api_keys
from deploy.config.serve import ServeConfig

TIMEOUT_S = 30.0
LOOK_S = 0.5


def drain(
    group: Annotated[int, typer.Argument(help="Number of the group.", show_default=False)],
    url: Annotated[str, typer.Argument(help="Address of an endpoint on Ray.", show_default=False)] = EXAMPLE,
    replace: Annotated[bool, flag("--replace", help="Start it anew afterwards; otherwise there is one group fewer.")] = False,
    wait: Annotated[bool, flag("--wait/--no-wait", help="Wait until that is done. Default: yes.")] = True,
    api_key_file: Annotated[
        str | None, flag("--api-key-file", help="File whose first key is sent. Default: MANTA_API_KEYS, if set.")
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Let a group of a running endpoint run empty, while the others serve; then end it, or start it anew.

    What runs there ends, or moves to other groups after drain_timeout_s. The API key must be an operator's.
    """
    with reported_errors(debug):
        import httpx

        keys = read_api_keys(ServeConfig(api_key_file=api_key_file))
        with open_client(httpx.Client, url, keys[0] if keys else None, timeout=TIMEOUT_S) as client:
            before = _epoch(client, group)
            _told(client.post(f"/admin/groups/{group}/drain", params={"replace": replace}))
            typer.echo(f"group {group} runs empty")
            while wait:
                now = _epoch(client, group)
                if now is None if not replace else now is not None and now > (before or 0):
                    typer.echo(f"group {group} {'serves again' if replace else 'is gone'}")
                    return
                time.sleep(LOOK_S)


def _epoch(client: Any, group: int) -> int | None:
    """Of a group that is there, -1 while it comes up, or while no scheduler tells; None if it is not."""
    groups = _told(client.get("/status.json", params={"history": False})).json()["groups"]
    return next((each["epoch"] for each in groups if each["group"] == group), None if groups else -1)


def _told(answer: Any) -> Any:
    """Errors: ValueError with what the endpoint says, if it refuses."""
    if answer.status_code == 404:
        raise ValueError(f"{answer.url} is nothing that this endpoint has: groups of endpoints on Ray alone can be drained")
    if answer.is_client_error:
        raise ValueError(answer.json()["error"]["message"])
    answer.raise_for_status()
    return answer
