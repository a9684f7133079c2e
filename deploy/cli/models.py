"""`manta models`: the models of a running endpoint, and one more or one less of them. Imports httpx when asked."""

import contextlib
import time
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer

from deploy.cli.operating import LOOK_S, KeyFileOption, UrlArgument, WaitOption, admin_client, ask
from deploy.config.client import EXAMPLE
from deploy.config.load import ConfigError
from deploy.terminal.exits import reported_errors
from deploy.terminal.options import DebugOption, with_options
from workers.model.sources.naming import wherever

NameArgument = Annotated[str, typer.Argument(help="What clients ask for.", show_default=False)]

models = typer.Typer(no_args_is_help=True, help="List, add and remove the models of a running endpoint.")


@models.command("list")
def list_(url: UrlArgument = EXAMPLE, api_key_file: KeyFileOption = None, debug: DebugOption = False) -> None:
    """Say which models an endpoint serves, the first one first, and which of them take requests.

    With an operator's key also those that come up, or have failed, and why.
    """
    with reported_errors(debug), admin_client(url, api_key_file) as client:
        served = [card["id"] for card in ask(client, "GET", "/v1/models").json()["data"]]
        states: dict[str, dict[str, Any]] = {}
        with contextlib.suppress(ValueError):  # not an operator's key, or an endpoint that cannot be changed
            states = {state["id"]: state for state in ask(client, "GET", "/admin/models").json()["data"]}
        for name in served:
            failure = _failure(states[name]) if name in states else None
            typer.echo(f"{name}: {failure or _obstacle(client, name) or 'ready'}")
        for name in [name for name in states if name not in served]:
            typer.echo(f"{name}: {_failure(states[name]) or states[name]['reason'] or 'ready'}")


@models.command()
@with_options
def add(
    name: NameArgument,
    url: UrlArgument = EXAMPLE,
    wait: WaitOption = True,
    api_key_file: KeyFileOption = None,
    debug: DebugOption = False,
    *,
    engine: dict[str, Any],
    model_serve: dict[str, Any],
) -> None:
    """Let a running endpoint serve one more model, beside the requests of the others.

    manta models add qwen http://127.0.0.1:8000 --model /models/Qwen3-8B --tensor-parallel-size 2

    Its groups wait for room. A file that Serve was given does not name it: `serve deploy` leaves it as it is. If its engine
    fails, the command says why and ends with 1.
    """
    with reported_errors(debug), admin_client(url, api_key_file) as client:
        settings = {key: value for key, value in {**engine, **model_serve}.items() if value is not None}
        if "model" not in settings:
            raise ConfigError("--model is missing: name the checkpoint's folder, where the endpoint runs, its id or its URL")
        settings["model"] = wherever(settings["model"])
        for key in ("chat_template", "download_dir"):
            if key in settings:
                settings[key] = str(Path(settings[key]).absolute())
        if settings.get("lora"):
            settings["lora"] = [_with_absolute_folder(pair) for pair in settings["lora"]]
        ask(client, "PUT", f"/admin/models/{quote(name)}", json=settings)
        typer.echo(f"{name} is on its way")
        said = ""
        while wait and (obstacle := _obstacle(client, name)) is not None:
            if (failure := _failure(ask(client, "GET", f"/admin/models/{quote(name)}").json())) is not None:
                raise RuntimeError(f"{name}: {failure} (it keeps its name: `manta models remove` takes it away)")
            if obstacle != said:
                said = obstacle
                typer.echo(f"{name}: {said}")
            time.sleep(LOOK_S)
        if wait:
            typer.echo(f"{name} is ready")


def _with_absolute_folder(pair: str) -> str:
    """NAME=FOLDER as the endpoint finds it; what is no such pair is left to the endpoint to refuse."""
    name, mark, folder = pair.partition("=")
    return f"{name}{mark}{Path(folder).absolute() if folder else folder}"


@models.command()
def remove(
    name: NameArgument,
    url: UrlArgument = EXAMPLE,
    wait: WaitOption = True,
    api_key_file: KeyFileOption = None,
    debug: DebugOption = False,
) -> None:
    """Let a model of a running endpoint go: it takes no more requests, and ends when those under way have. Also one that comes
    up, or has failed.

    A file that Serve was given and that names it brings it back when it is deployed once more: change it too.
    """
    with reported_errors(debug), admin_client(url, api_key_file) as client:
        ask(client, "DELETE", f"/admin/models/{quote(name)}")
        typer.echo(f"{name} takes no more requests")
        while wait and name in [card["id"] for card in ask(client, "GET", "/v1/models").json()["data"]]:
            time.sleep(LOOK_S)


def _failure(state: dict[str, Any]) -> str | None:
    """Why a model does not come up, by what `/admin/models` says of it; None: nothing has failed."""
    return f"failed: {state['reason']}" if state["phase"] == "failed" else None


def _obstacle(client: Any, model: str) -> str | None:
    """Why a model takes no requests now; None: it takes them. Errors: OSError."""
    import httpx

    try:
        answer = client.get("/ready", params={"model": model})
    except httpx.HTTPError as error:
        raise OSError(f"no answer from {client.base_url}: {error}") from error
    if answer.status_code == 404:
        return "its engine is starting"
    return None if answer.is_success else str(answer.json()["error"]["message"])
