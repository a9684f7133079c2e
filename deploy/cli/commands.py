"""`manta generate` and `manta serve`. Read flags and prompts, run an LLM, show and write what comes back.

Exit codes: 0 done, 1 the engine or a request failed, 2 bad input, 130 Ctrl-C. Imports neither torch nor ray nor
transformers before a command needs them, so that --help is instant.
"""

import sys
import time
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from deploy.cli.records import Record, open_records
from deploy.config.load import Config, load_config
from deploy.config.version import VERSION
from deploy.doors.python.sources import Source, as_chat, as_token_ids, label, read_jsonl
from deploy.frontend.outputs import GenerationError, RequestOutput
from deploy.terminal.exits import interrupts_held, reported_errors
from deploy.terminal.options import ConfigOption, DebugOption, flag, sampling_values, with_options
from deploy.text.content import PromptError
from deploy.text.files import decode, split_lines


class InputFormat(StrEnum):
    """How a file or stdin holds prompts."""

    jsonl = "jsonl"
    lines = "lines"
    text = "text"


PromptArguments = Annotated[
    list[str] | None, typer.Argument(help="Prompts. Without any, --input or stdin is read.", show_default=False)
]
InputOption = Annotated[Path | None, flag("--input", short="-i", help="File of prompts; - is stdin. Default: none.")]
FormatOption = Annotated[
    InputFormat | None,
    flag(
        "--format",
        help='What --input or stdin holds. jsonl: on each line an object with "prompt", "prompt_token_ids" or '
        '"messages", and what holds for it: sampling fields, "tenant", "deadline_s", "priority", "cache_salt". '
        "lines: a prompt a line. text: one prompt. "
        "Default: jsonl for files, text for stdin.",
    ),
]
ChatOption = Annotated[bool, flag("--chat", help="Prompts are users' messages for the chat template. Default: no.")]
TokenIdsOption = Annotated[bool, flag("--token-ids", help="Prompts are token ids, apart by spaces or commas. Default: no.")]
OutputOption = Annotated[
    Path | None, flag("--output", short="-o", help="Write results here as JSON lines; - is stdout. Default: none.")
]
StreamOption = Annotated[
    bool | None,
    flag("--stream/--no-stream", help="Show text while it grows. Default: yes, unless --output is given."),
]
QuietOption = Annotated[bool, flag("--quiet", short="-q", help="No progress, no closing table on stderr. Default: no.")]


def version() -> None:
    """Print the version."""
    typer.echo(f"manta {VERSION}" if VERSION else "manta, from a source folder")


@with_options
def generate(
    prompts: PromptArguments = None,
    input: InputOption = None,
    format: FormatOption = None,
    chat: ChatOption = False,
    token_ids: TokenIdsOption = False,
    output: OutputOption = None,
    stream: StreamOption = None,
    quiet: QuietOption = False,
    config: ConfigOption = None,
    debug: DebugOption = False,
    *,
    engine: dict[str, Any],
    sampling: dict[str, Any],
) -> None:
    """Generate text from prompts: arguments, stdin, or a file.

    manta generate "def fibonacci(n):" --max-tokens 64

    manta generate --input prompts.jsonl --output results.jsonl --groups 2 --tensor-parallel-size 2
    """
    with reported_errors(debug):
        settings = load_config(config, engine, sampling_values(sampling))
        sources = read_sources(prompts or [], input, format, chat, token_ids)
        if settings.engine.lora and not any(isinstance(each, Mapping) and each.get("lora") for each in sources):
            said = 'no prompt names an adapter, so none is used: lines of --input do, as {"prompt": ..., "lora": NAME}'
            typer.echo(f"manta: {said}", err=True)
        with open_records(output) as record:
            shown = stream if stream is not None else output is None
            outputs = run(settings, sources, record, shown, quiet)
        if any(each.error for each in outputs):
            raise GenerationError.of(outputs)


@with_options
def serve(
    config: ConfigOption = None,
    debug: DebugOption = False,
    *,
    serve: dict[str, Any],
    engine: dict[str, Any],
) -> None:
    """Serve a model over HTTP with OpenAI's API, and over gRPC, until Ctrl-C.

    manta serve --model /models/Qwen3-8B --tensor-parallel-size 2 --groups 4
    """
    with reported_errors(debug):
        settings = load_config(config, engine, serve=serve)
        from deploy.serving import command as serving
        from deploy.terminal import display

        serving.serve(settings, display.StartView())


def run(settings: Config, sources: list[Source], record: Record, stream: bool, quiet: bool) -> list[RequestOutput]:
    """Starts the cluster, runs every prompt, and ends the cluster whatever happened."""
    from deploy.doors.python.llm import LLM
    from deploy.terminal import display

    with display.start_progress(not quiet) as progress:
        llm = LLM.from_config(settings.engine, progress)
    try:
        labels = [label(source) for source in sources]
        started_s = time.monotonic()
        outputs: dict[int, RequestOutput] = {}
        with display.shown_outputs(labels, stream, quiet) as show:
            for position, output in llm.iterate(sources, settings.sampling, each_alone=True):
                show(position, output)
                if output.finished:
                    outputs[position] = output
                    record(position, output)
        if not quiet:
            display.print_summary(llm.stats(), time.monotonic() - started_s)
    finally:
        with interrupts_held():
            llm.shutdown()
    return [outputs[position] for position in range(len(sources))]


def read_sources(
    prompts: list[str], file: Path | None, format: InputFormat | None, chat: bool, token_ids: bool
) -> list[Source]:
    """Prompts from wherever they are. Errors: PromptError, OSError."""
    if chat and token_ids:
        raise PromptError("--chat and --token-ids exclude each other: leave one of them out")
    if prompts and file is not None:
        raise PromptError("prompts were given both as arguments and by --input: leave one of them out")
    sources: list[Source] = [*prompts]
    if not prompts:
        content, name, kind = _read_input(file, format)
        if kind is InputFormat.jsonl:
            sources = list(read_jsonl(split_lines(content), name))
        else:
            texts = split_lines(content) if kind is InputFormat.lines else [content]
            sources = [text for text in texts if text.strip()]
        if not sources:
            raise PromptError(f"{name} holds no prompt")
    if chat:
        return [as_chat(source) for source in sources]
    return [as_token_ids(source) for source in sources] if token_ids else sources


def _read_input(file: Path | None, format: InputFormat | None) -> tuple[str, str, InputFormat]:
    """Content, its name for messages, and its format."""
    try:
        if file is not None and str(file) != "-":
            return decode(file.read_bytes()), str(file), format or InputFormat.jsonl
        if file is None and sys.stdin.isatty():
            raise PromptError("no prompt: give one as an argument, name a file with --input, or pipe text in")
        return decode(sys.stdin.buffer.read()), "stdin", format or InputFormat.text
    except UnicodeDecodeError as error:
        raise PromptError(f"{file or 'stdin'} is not UTF-8 text: {error}") from error
