"""What the commands share at the terminal: errors and exit status, progress bars, number formats.

Results go to standard output; progress, notes and errors to standard error, so `--json` can be piped.
"""

import argparse
import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn

import jax
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from gluprune_jax import distributed
from gluprune_jax.errors import GlupruneError, is_out_of_memory

EXIT_STATUS = (
    "exit status: 0 done; 2 the request cannot be carried out as asked; 1 something failed underneath; 130 interrupted"
)


def stderr() -> Console:
    """The console for progress, notes and errors. Of several processes only the first one speaks."""
    return Console(stderr=True, highlight=False, soft_wrap=True, emoji=False, quiet=distributed.is_silent())


def run(name: str, command: Callable[[], None], *, debug: bool, processes: argparse.Namespace | None = None) -> int:
    """Runs a command and returns its exit status; errors become one line on standard error unless `debug`.

    Args:
      name: of the command, for errors.
      command: what to run.
      debug: whether an error shows its traceback.
      processes: the arguments of `gluprune_jax.distributed`, where the command has them. Of several processes one that
        fails ends at once, without waiting for the others, and with it they end.
    """
    # When it is imported without PyTorch, transformers says that models will not be available. Ours are.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    together = False
    try:
        if processes is not None:
            distributed.connect(processes)
            together = jax.distributed.is_initialized()
        if together:
            _keep_standard_output()
    except GlupruneError as error:  # of connecting
        if debug:
            raise
        stderr().print(f"{name}: error: {_reason(error)}", markup=False)
        return error.exit_status
    status = _run(name, command, debug)
    if together and status:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        # The interpreter would first wait for the other processes, which wait for this one.
        os._exit(status)
    return status


def _keep_standard_output() -> None:
    """Keeps the standard output to ourselves, and in all processes but the first one to nobody, until they end."""
    sys.stdout.flush()
    ours = os.devnull if distributed.is_silent() else os.dup(1)
    sys.stdout = open(ours, "w", encoding="utf-8")  # noqa: SIM115
    os.dup2(2, 1)  # the library that connects CPUs prints there


def _run(name: str, command: Callable[[], None], debug: bool) -> int:
    try:
        command()
    except BrokenPipeError:
        # The reader of our output is gone (`| head`); Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        stderr().print(f"{name}: interrupted", markup=False)
        return 130
    except Exception as error:
        if debug and not jax.distributed.is_initialized():
            raise
        if debug:
            traceback.print_exc()
        elif not distributed.is_silent():
            stderr().print(f"{name}: error: {_reason(error)}", markup=False)
        elif not getattr(error, "all_know", False):
            sys.stderr.write(f"{name} (process {jax.process_index()}): error: {_reason(error)}\n")
        return error.exit_status if isinstance(error, GlupruneError) else 1
    return 0


def _reason(error: Exception) -> str:
    if isinstance(error, GlupruneError):
        reason = str(error)
    elif is_out_of_memory(error):
        reason = "out of memory"
    else:
        first_line = next(iter(str(error).splitlines()), "")
        reason = f"unexpected {type(error).__name__}: {first_line} (--debug shows where; please report it)"
    # Names from foreign files may hold line ends and escape sequences.
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in reason)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the layout of descriptions; shows defaults."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        # "(default: None)" and "(default: False)" tell nobody anything.
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """A command line whose help states the exit statuses, and whose errors are one line, without the usage."""

    def __init__(self, prog: str, description: str):
        super().__init__(
            prog=prog,
            description=description,
            epilog=EXIT_STATUS,
            formatter_class=HelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help shows the options)\n")


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:,.0f} {task.fields['unit']}/s")


def _progress(*columns: ProgressColumn) -> Progress:
    # Into a file or a pipe a bar would only print empty lines.
    console = stderr()
    return Progress(*columns, console=console, transient=True, disable=not (console.is_terminal or console.is_jupyter))


@contextlib.contextmanager
def byte_progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar for reading and writing; yields `report(what, bytes done, bytes in all)`."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with _progress(*columns) as progress:
        tasks = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
            progress.update(tasks[what], completed=done)

        yield report


@contextlib.contextmanager
def count_progress(what: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """A bar for countable work; yields `report(done so far)`."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    with _progress(*columns) as progress:
        task = progress.add_task(what, total=total, unit=unit)
        yield lambda done: progress.update(task, completed=done)


@contextlib.contextmanager
def training_progress(steps: int) -> Iterator[Callable[[int, float, float], None]]:
    """A bar for training; yields `report(steps done, loss, tokens per second)`."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(),
    )
    with _progress(*columns) as progress:
        task = progress.add_task("training", total=steps, state="compiling")

        def report(done: int, loss: float, rate: float) -> None:
            progress.update(task, completed=done, state=f"loss {loss:.4f}, {rate:,.0f} tokens/s")

        yield report


def format_bytes(count: int) -> str:
    """Decimal units, as disks and downloads are sold: 2.47 GB."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count} B"
