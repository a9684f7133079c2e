"""Every engine and sampling setting as a command-line option, made from the records that define them.

A command declares only what is its own; `with_options` adds the rest. Flags that are not given stay None, so that the
configuration file and the defaults below it can speak. Imports typer; nothing of the engine but its settings.
"""

import functools
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from cluster.config import EngineConfig
from deploy.config.load import DEFAULT_MAX_TOKENS, EMBEDDED_MODEL, ConfigError
from deploy.config.serve import ModelServeConfig, ServeConfig
from scheduler.config.options import options
from scheduler.protocol.sampling import MAX_CHOICES, MAX_LOGPROBS, SamplingParams

SAMPLING_HELP: dict[str, tuple[type[Any], str]] = {
    "n": (int, f"Choices for each prompt, 1 to {MAX_CHOICES}. Default: 1."),
    "temperature": (float, "Divides the logits; 0 always takes the likeliest token. Default: 1.0."),
    "top_k": (int, "Sample among this many likeliest tokens; 0 among all. Default: 0."),
    "top_p": (float, "Sample among the likeliest tokens of this total probability, 0 to 1. Default: 1.0."),
    "min_p": (float, "Leave out tokens below this share of the likeliest one's probability, 0 to 1. Default: 0.0."),
    "seed": (int, "Integer that makes sampling repeatable. Default: drawn for each request."),
    "repetition_penalty": (float, "Factor against tokens of prompt and output, 0.01 to 100. Default: 1.0 (none)."),
    "presence_penalty": (float, "Subtracted from logits of tokens in the output, -2 to 2. Default: 0.0."),
    "frequency_penalty": (float, "Subtracted once for each time in the output, -2 to 2. Default: 0.0."),
    "logit_bias": (list[str], "ID=BIAS: added to that token's logit, -100 to 100; repeatable. Default: none."),
    "stop": (list[str], "Text that ends the output and is cut from it; repeatable. Default: none."),
    "stop_token_ids": (list[int], "Token id that ends the output; repeatable. Default: the model's own."),
    "min_tokens": (int, "Tokens of output before anything may end it. Default: 0."),
    "max_tokens": (int, f"Tokens of output at most, for each choice. Default: {DEFAULT_MAX_TOKENS}."),
    "ignore_eos": (bool, "Do not stop at the model's end-of-sequence tokens. Default: no."),
    "logprobs": (int, f"Log-probabilities per token of output, in --output: 0 to {MAX_LOGPROBS}. Default: none."),
    "prompt_logprobs": (int, f"The same for the prompt, which is then computed whole: 0 to {MAX_LOGPROBS}. Default: none."),
}
FILE_ONLY = {"grammar"}
"""Sampling fields that are too large for a flag: input lines and the endpoint take them."""
ENGINE_FLAGS = {"seed": "engine_seed"}
"""Fields of the engine whose flag has another name, since a sampling option has theirs."""

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config", "-c", help="YAML file of settings; flags win over it. Default: $MANTA_CONFIG.", show_default=False
    ),
]
DebugOption = Annotated[
    bool, typer.Option("--debug", help="Show the traceback of an error. Default: no.", show_default=False)
]


def flag(name: str, help: str, short: str = "") -> Any:
    """An option of one command. help: says the default itself, in words."""
    return typer.Option(name, *filter(None, (short,)), help=help, show_default=False)


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options that a command takes as keyword arguments `engine`, `serve`, `model_serve` or `sampling`, each those
    given by field name; the last are for `sampling_values`. What it declares under the same name is its own."""
    groups: dict[str, dict[str, inspect.Parameter]] = {
        "sampling": dict(_sampling_options()),
        "serve": dict(_options(ServeConfig, "Endpoint")),
        "model_serve": dict(_options(ModelServeConfig, "Endpoint")),
        "engine": dict(_options(EngineConfig, "Engine")),
    }
    signature = inspect.signature(command)
    taken = {
        name: {field: option for field, option in group.items() if option.name not in signature.parameters}
        for name, group in groups.items()
        if name in signature.parameters
    }

    @functools.wraps(command)
    def run(**given: Any) -> None:
        values = {
            name: {field: given.pop(option.name) for field, option in group.items()} for name, group in taken.items()
        }
        command(**values, **given)

    own = [p for p in signature.parameters.values() if p.name not in taken]
    every = [*own, *(option for group in taken.values() for option in group.values())]
    run.__signature__ = inspect.Signature(every)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in every}
    return run


def sampling_values(given: Mapping[str, Any]) -> dict[str, Any]:
    """What the flags gave, as the fields want it. Errors: ConfigError."""
    values = {name: value for name, value in given.items() if value not in (None, [])}
    if "logit_bias" in values:
        values["logit_bias"] = dict(_bias(pair) for pair in values["logit_bias"])
    return values


def _sampling_options() -> Iterator[tuple[str, inspect.Parameter]]:
    assert SAMPLING_HELP.keys() | FILE_ONLY == set(SamplingParams.__struct_fields__), "every sampling field has its help"
    for name, (kind, help_text) in SAMPLING_HELP.items():
        yield name, _option(name, kind, help_text, "Sampling")


def _options(record: type[EngineConfig | ModelServeConfig], panel: str) -> Iterator[tuple[str, inspect.Parameter]]:
    """By the names of the fields."""
    hints = get_type_hints(record)
    for f in options(record):
        flag = ENGINE_FLAGS.get(f.name, f.name)
        if f.name == "model":
            embedded = "/".join(EMBEDDED_MODEL.parts[-2:])
            help_text = (
                "Checkpoint in Hugging Face format: a folder, an id (org/name) or a URL (s3://, gs://, ...). "
                f"Default: {embedded}, which comes with Manta."
            )
            yield f.name, _option(flag, str, help_text, panel)
            continue
        kind = str if f.metadata["size"] else hints[f.name]
        if get_origin(kind) is tuple:
            kind = list[str]
        if isinstance(kind, types.UnionType):
            kind = next(part for part in get_args(kind) if part is not types.NoneType)
        shown = {"True": "yes", "False": "no"}.get(f.metadata["shown"], f.metadata["shown"])
        yield f.name, _option(flag, kind, f"{f.metadata['help']} Default: {shown}.", panel)


def _option(name: str, kind: Any, help_text: str, panel: str) -> inspect.Parameter:
    flag = "--" + name.replace("_", "-")
    declared = f"{flag}/--no-{flag[2:]}" if kind is bool else flag
    default = typer.Option(None, declared, help=help_text, rich_help_panel=panel, show_default=False)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind | None)


def _bias(pair: str) -> tuple[int, float]:
    token, _, bias = pair.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise ConfigError(f"--logit-bias {pair!r} is not ID=BIAS: write for example 42=-1.5") from None
