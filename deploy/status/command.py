"""`manta top` as a user types it."""

from typing import Annotated

import typer

from deploy.config.load import read_api_keys
from deploy.config.serve import ServeConfig
from deploy.terminal.exits import reported_errors
from deploy.terminal.options import DebugOption, flag

DEFAULT_URL = "http://127.0.0.1:8000"



def top(
    url: Annotated[str, typer.Argument(help="Address of an endpoint.", show_default=False)] = DEFAULT_URL,
    api_key_file: Annotated[
        str | None, flag("--api-key-file", help="File whose first key is sent. Default: MANTA_API_KEYS, if set.")
    ] = None,
    interval: Annotated[float, flag("--interval", help="Seconds between two looks. Default: 1.")] = 1.0,
    model: Annotated[str | None, flag("--model", help="Name of a model, of several. Default: the first.")] = None,
    once: Annotated[bool, flag("--once", help="Look once and end. Default: only into a pipe.")] = False,
    debug: DebugOption = False,
) -> None:
    """Watch an endpoint: its pools block by block, what runs and waits, rates and latencies. q ends it."""
    with reported_errors(debug):
        keys = read_api_keys(ServeConfig(api_key_file=api_key_file))
        from deploy.status.top import top as watch

        watch(url, keys[0] if keys else None, interval, once, model=model)
