"""`manta`, the command line: the commands of the house, and those of the outbuildings, which nothing else imports.

--help is instant: neither torch nor ray nor transformers is imported before a command needs it.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from deploy.batch.command import batch
from deploy.cli import commands
from deploy.cli.models import models
from deploy.cli.operating import drain, roll
from deploy.cli.planning import plan
from deploy.config.load import ConfigError
from deploy.status.command import top
from deploy.terminal.exits import Termination, reported_errors, run
from deploy.terminal.writing import name_stdout
from simulator.command import OldSpellings
from simulator.command import command as replay

CHECKOUT = Path(__file__).resolve().parents[1]

app = typer.Typer(name="manta", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
for command in (batch, drain, commands.generate, plan, roll, commands.serve, top, commands.version):
    app.command()(command)
app.add_typer(models, name="models")
app.command("replay", cls=OldSpellings)(replay)


def _version(asked: bool) -> None:
    if asked:
        commands.version()
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.", show_default=False)
]


@app.callback()
def manta(version: Version = False) -> None:
    """Manta serves large language models on a Ray cluster, with one owner of every KV block."""


if (CHECKOUT / "benchmarks" / "study").is_dir():
    if str(CHECKOUT) not in sys.path:  # an editable install names Manta's own packages alone
        sys.path.append(str(CHECKOUT))
    from benchmarks.study.command import command as study

    app.command("study")(study)
else:

    @app.command("study", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
    def no_study() -> None:
        """Measure the KV cache: from a checkout of the repository alone."""
        with reported_errors(False):
            raise ConfigError(
                "the study's experiments are in benchmarks/, which is not part of an installed wheel: "
                "run manta study from a checkout of the repository"
            )


def main() -> None:
    """The entry point; SIGTERM ends as tidily as Ctrl-C does."""
    Termination.install()
    name_stdout()
    run(app)
