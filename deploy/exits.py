"""How a command ends: its exit codes, and an error as the one line that the user reads. Imports typer.

Exit codes: 0 done, 1 the engine or a request failed, 2 bad input, 130 Ctrl-C, 143 SIGTERM.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

import typer

DONE, FAILED, BAD_INPUT, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143


@contextlib.contextmanager
def reported_errors(debug: bool) -> Iterator[None]:
    """Turns what went wrong into one line on stderr and the exit code; with debug the traceback comes too."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("manta: interrupted", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:  # `manta generate ... | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(FAILED) from None
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        if debug:
            raise
        typer.echo(f"manta: error: {_words(error)}", err=True)
        named_file = isinstance(error, OSError) and error.filename is not None
        raise typer.Exit(BAD_INPUT if named_file or isinstance(error, ValueError) else FAILED) from None


def _words(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, TimeoutError):
        said = f" ({error})" if str(error) else ""
        return f"something was not ready in time{said}: raise --start-timeout-s if it is only slow; --debug shows what it was"
    if isinstance(error, ValueError | OSError | RuntimeError) and str(error):
        return " ".join(str(error).split("\n"))
    return f"{type(error).__name__}: {error} (a fault of Manta's; --debug shows where)"


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """A second Ctrl-C does not cut the shutdown short, which would leave processes behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
