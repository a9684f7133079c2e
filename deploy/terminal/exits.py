"""How a command ends: its exit codes, and an error as the one line that the user reads. Imports typer.

Exit codes: 0 done, 1 the engine or a request failed, 2 bad input, 130 Ctrl-C, 143 SIGTERM.
"""

import contextlib
import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

import typer

from deploy.terminal.writing import STDOUT

AGAIN_S = 0.1
OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""Nothing is wrong with the name of the file."""

DONE, FAILED, BAD_INPUT, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143


class Termination:
    """SIGTERM ends a command as tidily as Ctrl-C does: by a KeyboardInterrupt in the main thread.

    The handler only sets a flag, since Python throws away what is raised while it happens to run a `__del__` or a callback of
    compiled code. A thread delivers the interrupt, and delivers it again for as long as it is thrown away.
    """

    def __init__(self) -> None:
        self.asked = False
        self._delivering = False
        self._due = threading.Event()

    @classmethod
    def install(cls) -> "Termination":
        """Call it from the main thread."""
        made = cls()
        signal.signal(signal.SIGTERM, made)
        sys.unraisablehook = made._unraisable
        threading.Thread(target=made._deliver, name="manta-termination", daemon=True).start()
        return made

    @classmethod
    def installed(cls) -> "Termination | None":
        handler = signal.getsignal(signal.SIGTERM)
        return handler if isinstance(handler, cls) else None

    def __call__(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self._delivering:
            self._delivering = False
            raise KeyboardInterrupt
        self.asked = True
        self._due.set()

    def _deliver(self) -> None:
        main = threading.main_thread().ident
        assert main is not None
        while self._due.wait():
            self._due.clear()
            self._delivering = True
            while self._delivering:  # it may have been about to enter the system call that this ends
                signal.pthread_kill(main, signal.SIGTERM)
                time.sleep(AGAIN_S)

    def _unraisable(self, lost: "sys.UnraisableHookArgs") -> None:
        if lost.exc_type is KeyboardInterrupt and threading.current_thread() is threading.main_thread():
            self._due.set()
        else:
            sys.__unraisablehook__(lost)


@contextlib.contextmanager
def reported_errors(debug: bool) -> Iterator[None]:
    """Turns what went wrong into one line on stderr and the exit code; with debug the traceback comes too."""
    try:
        yield
        if _terminated():  # by somebody who caught it and ended well
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        typer.echo(f"manta: {'terminated' if _terminated() else 'interrupted'}", err=True)
        raise typer.Exit(TERMINATED if _terminated() else INTERRUPTED) from None
    except BrokenPipeError:  # `manta generate ... | head`: nobody reads on
        _drop_stdout()
        raise typer.Exit(FAILED) from None
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        if debug:
            raise
        typer.echo(f"manta: error: {_words(error)}", err=True)
        named_file = isinstance(error, OSError) and error.filename is not None and error.errno not in OF_THE_DISK
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
    """A second Ctrl-C or SIGTERM does not cut the shutdown short, which would leave processes behind; `cluster.ending` alone
    hears it, and waits for nobody any more."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with contextlib.ExitStack() as stack:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous = signal.signal(number, signal.SIG_IGN)
            stack.callback(signal.signal, number, previous)
        yield


def end_by(number: int) -> NoReturn:
    """Ends the command as this signal does, for what has caught it and is tidied up: also where the process ignores it."""
    termination = Termination.installed()
    if termination is not None and number == signal.SIGTERM:
        termination.asked = True
    raise KeyboardInterrupt


def run(app: Callable[[], object]) -> NoReturn:
    """A command line, whose commands report their errors: what is left is what of --help, or at the end, cannot be written."""
    code = DONE
    try:
        app()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except OSError as error:
        if error.filename != STDOUT:
            raise
        code = _unwritten(error)
    try:
        sys.stdout.flush()
    except OSError as error:
        code = code or _unwritten(error)
        _drop_stdout()  # the interpreter would try again
    leave(code)


def _unwritten(error: OSError) -> int:
    """The exit code of a command whose stdout takes nothing more."""
    if error.errno != errno.EPIPE:
        typer.echo(f"manta: error: {_words(error)}", err=True)
    return FAILED


def _drop_stdout() -> None:
    """Nobody reads what is left."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def leave(code: int) -> NoReturn:
    """The end of the process, once all is tidied up. Where a Ray is left that could not be shut down (`cluster.ending`), the
    interpreter does not take itself apart: Ray's threads, which still ask what has gone, would crash in the midst of that."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _terminated() -> bool:
    termination = Termination.installed()
    return termination is not None and termination.asked
