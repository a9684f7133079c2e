"""`python -m deploy.batch` is `manta batch`: what `ray job submit` runs."""

import typer

from deploy.batch.command import batch
from deploy.terminal.exits import Termination

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(batch)

Termination.install()
app(prog_name="manta batch")
