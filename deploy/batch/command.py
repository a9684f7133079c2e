"""`manta batch`: reads its options.

Exit codes: 0 every line has its result, failed ones included; 1 the engine failed; 2 bad input; 130, 143 ended by a signal.
After 1, 130 and 143 the same command goes on where this one ended. Imports nothing heavy before the job begins.
"""

from typing import Annotated, Any

import typer

from deploy.batch.limits import Limits
from deploy.config.load import ConfigError, load_config
from deploy.terminal.exits import reported_errors
from deploy.terminal.options import ENGINE_FLAGS, ConfigOption, DebugOption, flag, with_options

OF_RUNNING = ("ray_address", "start_timeout_s", "max_model_len")
"""Fields of the engine that mean something where groups run already, on the same Ray cluster."""

DEFAULTS = Limits()



InputOption = Annotated[
    str, typer.Option("--input", "-i", help="Requests in OpenAI's batch format: a path, or s3:// or gs://.", show_default=False)
]
OutputOption = Annotated[
    str,
    typer.Option(
        "--output", "-o", help="Results, one a line, in any order. What is there is not done again.", show_default=False
    ),
]
UrlOption = Annotated[
    str | None, flag("--url", "Address of a running deployment, http://host:port. Default: groups of the job's own.")
]
AppOption = Annotated[
    str | None, flag("--app", "Manta's application on this Ray cluster's Serve. Default: groups of the job's own.")
]
KeyOption = Annotated[str | None, flag("--api-key-file", "File with the API key for --url. Default: $MANTA_API_KEYS.")]
NameOption = Annotated[
    str | None, flag("--served-model-name", "Name that requests ask for. Default: the checkpoint folder's name.")
]
RequestsOption = Annotated[int, flag("--concurrency", f"Requests under way at once. Default: {DEFAULTS.requests}.")]
TokensOption = Annotated[
    int,
    flag(
        "--concurrency-tokens",
        f"Tokens under way at once, outputs at their longest, about. Default: {DEFAULTS.tokens}.",
    ),
]
RetriesOption = Annotated[
    int,
    flag("--retries", f"Times that a request nobody answers is sent again; then the job ends. Default: {DEFAULTS.retries}."),
]
QuietOption = Annotated[bool, flag("--quiet", "No progress on stderr. Default: no.")]


@with_options
def batch(
    input: InputOption,
    output: OutputOption,
    url: UrlOption = None,
    app: AppOption = None,
    api_key_file: KeyOption = None,
    served_model_name: NameOption = None,
    concurrency: RequestsOption = DEFAULTS.requests,
    concurrency_tokens: TokensOption = DEFAULTS.tokens,
    retries: RetriesOption = DEFAULTS.retries,
    quiet: QuietOption = False,
    config: ConfigOption = None,
    debug: DebugOption = False,
    *,
    engine: dict[str, Any],
) -> None:
    """Answer a file of requests. Killed and started again, it goes on where it was.

    ray job submit --working-dir . -- python -m manta batch --input in.jsonl --output /shared/out.jsonl
    """
    with reported_errors(debug):
        _refuse_unused(engine, url, app)
        settings = load_config(config, engine, serve={"api_key_file": api_key_file, "served_model_name": served_model_name})
        from deploy.batch.run import Task, run
        from deploy.batch.storage import Location

        limits = Limits(concurrency, concurrency_tokens, retries, settings.serve.max_request_bytes)
        task = Task(Location.parse(input), Location.parse(output), limits, url, app)
        raise typer.Exit(run(task, settings, shown=not quiet))


def _refuse_unused(engine: dict[str, Any], url: str | None, app: str | None) -> None:
    """Errors: ConfigError for settings of groups that the job will not start."""
    if url is None and app is None:
        return
    used = () if app is None else OF_RUNNING
    unused = [name for name, value in engine.items() if value is not None and name not in used]
    if unused:
        flags = ", ".join("--" + ENGINE_FLAGS.get(name, name).replace("_", "-") for name in unused)
        raise ConfigError(f"{flags}: for groups that the job starts itself; leave out, or leave out --url and --app")
