"""What the commands share at the terminal: errors and exit status, progress bars, number formats.

Results go to standard output; progress, notes and errors to standard error, so `--json` can be piped.
"""

import argparse
import contextlib
import dataclasses
import errno
import io
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any, NoReturn, cast

from rich.console import Console
from rich.text import Text

from gluprune_jax.cli.display import BYTES, Display
from gluprune_jax.cli.options import LISTS, OLD
from gluprune_jax.cli.processes import ProcessesRequest, connect
from gluprune_jax.errors import (
    MAX_MESSAGE,
    GlupruneError,
    first_line,
    is_out_of_memory,
    one_line,
    shortened,
    spelled,
)
from gluprune_jax.parallel import distributed
from gluprune_jax.progress import Report

_NO_MORE_OUTPUT = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EFBIG, errno.EBADF)


EXIT_CODES = "exit codes: 0 success, 1 runtime error, 2 usage error, 130 interrupted"


# How the command that runs spells parameters, for what the library says through `note`.
_flags: dict[str, str] = {}


class _Listening(io.TextIOBase):
    """Standard error, as long as somebody listens: a note that cannot be said must not end what is being done."""

    def write(self, text: str) -> int:
        stream = getattr(sys.stderr, "rich_proxied_file", sys.stderr)  # under a bar, the proxy writes to us
        if stream is not None:
            try:
                stream.write(text)
            except UnicodeEncodeError:
                return self.write(text.encode("ascii", "backslashreplace").decode())
            except OSError:
                _give_up(stream)
        return len(text)

    def flush(self) -> None:
        stream = getattr(sys.stderr, "rich_proxied_file", sys.stderr)
        if stream is not None:
            try:
                stream.flush()
            except OSError:
                _give_up(stream)

    def isatty(self) -> bool:
        return sys.stderr is not None and sys.stderr.isatty()

    def fileno(self) -> int:
        if sys.stderr is None:
            raise io.UnsupportedOperation("there is no standard error")
        return sys.stderr.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(sys.stderr, "encoding", None) or "utf-8"


def _give_up(stream: Any) -> None:
    """Lets a stream that takes nothing any more lead nowhere: Python would fail when it flushes at exit."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def stderr() -> Console:
    """The console for progress, notes and errors: above the bars, where there are any.

    Of several processes only the first one speaks.
    """
    if _screen.display is not None:
        return _screen.display.console
    listening = cast("IO[str]", _Listening())
    return Console(file=listening, highlight=False, soft_wrap=True, emoji=False, quiet=distributed.is_silent())


def finish_output(name: str, text: str = "") -> int:
    """Prints a text, hands on all that was printed, and returns the exit status that this alone would mean.

    A reader that is gone (`| head`) has what it wanted, and hears nothing; a disk that is full is told.
    """
    try:
        if sys.stdout is not None:
            sys.stdout.write(text)
            sys.stdout.flush()
    except OSError as error:
        return _output_failed(name, error)
    return 0


def _output_failed(name: str, error: OSError) -> int:
    _give_up(sys.stdout)
    if not isinstance(error, BrokenPipeError):
        _complain(f"{name}: error: cannot write the output: {error.strerror or error}")
    return 1


def _complain(text: str) -> None:
    stderr().print(one_line(text), markup=False)


def run(
    name: str,
    command: Callable[[], None],
    *,
    debug: bool,
    processes: ProcessesRequest | None = None,
    flags: Mapping[str, str] | None = None,
    kept: Callable[[], str] | None = None,
) -> int:
    """Runs a command and returns its exit status; errors become one line on standard error unless `debug`.

    Args:
      name: of the command, for errors.
      command: what to run.
      debug: whether an error shows its traceback.
      processes: what else runs together with this process, where the command has these options. Of several
        processes one that fails ends at once, without waiting for the others, and with it they end.
      flags: how the command spells the parameters that an error of the library names (`ArgumentParser.flags`).
      kept: what is there after an interruption (Ctrl-C), and how to resume; by default nothing is said.
    """
    flags = flags or {}
    _flags.clear()
    _flags.update(flags)
    # When it is imported without PyTorch, transformers says that models will not be available. Ours are.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    together = False
    try:
        if processes is not None:
            connect(processes)
            together = distributed.is_initialized()
        if together:
            _keep_standard_output()
    except GlupruneError as error:  # of connecting
        if debug:
            raise
        _complain(f"{name}: error: {_reason(error, flags)}")
        return error.exit_status
    status = _run(name, command, debug, flags, kept)
    if together and status:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        # The interpreter would first wait for the other processes, which wait for this one.
        os._exit(status)
    return status


def _keep_standard_output() -> None:
    """Keeps the standard output to ourselves, and in all processes but the first one to nobody, until they end."""
    if sys.stdout is None:
        return
    sys.stdout.flush()
    ours = os.devnull if distributed.is_silent() else os.dup(1)
    sys.stdout = open(ours, "w", encoding="utf-8")  # noqa: SIM115
    os.dup2(2, 1)  # the library that connects CPUs prints there


def _run(
    name: str,
    command: Callable[[], None],
    debug: bool,
    flags: Mapping[str, str],
    kept: Callable[[], str] | None,
) -> int:
    try:
        command()
    except KeyboardInterrupt:
        if kept is not None:
            stderr().print(kept(), markup=False)
        _complain(f"{name}: interrupted")
        return 130
    except Exception as error:
        if isinstance(error, OSError) and _is_of_output(error):
            return _output_failed(name, error)
        if debug and not distributed.is_initialized():
            raise
        if debug:
            traceback.print_exc()
        elif not distributed.is_silent():
            _complain(f"{name}: error: {_reason(error, flags)}")
        elif not getattr(error, "all_know", False):
            who = f"{name} (process {distributed.process_index()})"
            sys.stderr.write(one_line(f"{who}: error: {_reason(error, flags)}") + "\n")
        finish_output(name)
        return error.exit_status if isinstance(error, GlupruneError) else 1
    return finish_output(name)


def _is_of_output(error: OSError) -> bool:
    """Whether an exception says that standard output takes nothing any more.

    Writing to a stream fails without the name of a file; what fails about files of ours has one, or is ours already.
    """
    return isinstance(error, BrokenPipeError) or (error.filename is None and error.errno in _NO_MORE_OUTPUT)


def _reason(error: Exception, flags: Mapping[str, str]) -> str:
    if isinstance(error, GlupruneError):
        reason = spelled(str(error), flags)
    elif is_out_of_memory(error):
        reason = "out of memory"
    elif isinstance(error, OSError) and error.filename is not None:  # permissions, disks: nothing of ours
        reason = f"cannot use {shortened(os.fsdecode(error.filename))[1:-1]}: {error.strerror or error}"
    else:
        reason = f"unexpected {type(error).__name__}: {first_line(error)} (--debug shows where; please report it)"
    return one_line(reason)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the layout of descriptions; shows defaults."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        # "(default: None)", "(default: False)" and "(default: ())" tell nobody anything.
        if action.default is None or action.default is False or action.default == ():
            return action.help
        if isinstance(action.default, tuple):  # as it would be written
            return f"{action.help} (default: {','.join(map(str, action.default))})"
        return super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """A command line whose help states the exit codes, and whose errors are one line, without the usage."""

    def __init__(self, prog: str, description: str):
        super().__init__(
            prog=prog,
            description=description,
            epilog=EXIT_CODES,
            formatter_class=HelpFormatter,
            allow_abbrev=False,
        )

    @property
    def flags(self) -> dict[str, str]:
        """The flag of each option, or the name of each argument, by the parameter that it stands for."""
        return {
            action.dest: max(action.option_strings, key=len, default=str(action.metavar)) for action in self._actions
        }

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuses spellings of before with the one that is accepted now, then parses."""
        argv = list(sys.argv[1:] if args is None else args)
        if remedy := self._old_spelling(argv):
            self.error(remedy)
        return super().parse_known_args(argv, namespace)

    def _old_spelling(self, argv: Sequence[str]) -> str | None:
        """What is written now instead of the first word that was an option of before, if there is one."""
        known = self._option_string_actions
        flag = None
        values = 0
        for word in argv:
            if word == "--":
                return None
            if not word.startswith("--"):
                values += 1
                if flag in LISTS and flag in known and values == 2:
                    return f"the values of {flag} are separated by commas now: {flag} A,B"
                if flag == "--evaluate" and flag in known and values == 1:
                    return f"--evaluate is a switch now; name texts with --eval-data {word}"
                continue
            flag, equals, _ = word.partition("=")
            values = int(bool(equals))
            if flag not in known and OLD.get(flag) in known:
                return f"{flag} is called {OLD[flag]} now"
        return None

    def error(self, message: str) -> NoReturn:
        """Ends the process with one line; `message` says what is wrong."""
        # argparse puts before what a type has said (see `options.list_of`): "argument --width: has 'x'; ...".
        message = re.sub(r"^argument (--[a-z-]+): (?=has |is )", r"\1 ", message)
        self.exit(2, f"gluprune: error: {one_line(message, MAX_MESSAGE - 30)} (--help shows the options)\n")

    def print_help(self, file: Any = None) -> None:
        """Prints the help; without a file, to standard output, and ends the process where that takes nothing."""
        if file is not None:
            super().print_help(file)
        elif status := finish_output("gluprune", self.format_help()):
            sys.exit(status)

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """Ends the process, after `--help` too, whether somebody reads what was printed or not."""
        unread = finish_output("gluprune")
        if message:
            stderr().file.write(message)
            stderr().file.flush()
        sys.exit(status or unread)


@dataclasses.dataclass
class _Screen:
    """What stands on standard error.

    Attributes:
      display: of the work under way, if there is any.
      next_line: see `Display`.
    """

    display: Display | None = None
    next_line: float | None = None


_screen = _Screen()


@contextlib.contextmanager
def _shown() -> Iterator[Display]:
    """The display of the work under way; blocks within each other share one."""
    if _screen.display is not None:
        yield _screen.display
        return
    display = _screen.display = Display(stderr(), next_line=_screen.next_line)
    try:
        yield display
    finally:
        _screen.display, _screen.next_line = None, display.next_line


@contextlib.contextmanager
def byte_progress() -> Iterator[Callable[[str, int, int], None]]:
    """Shows reading and writing; yields `report(what, bytes done, bytes in all)`."""
    with _shown() as display, contextlib.ExitStack() as works:
        reports: dict[str, Report] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in reports:
                reports[what] = works.enter_context(display.work(what, total, BYTES))
            reports[what](done)

        yield report


@contextlib.contextmanager
def count_progress(what: str, total: int, unit: str) -> Iterator[Report]:
    """Shows countable work; yields `report(done so far)`. `unit` is in the plural."""
    with _shown() as display, display.work(what, total, unit) as report:
        yield report


@contextlib.contextmanager
def training_progress(steps: int) -> Iterator[Callable[[int, float, float], None]]:
    """Shows training; yields `report(steps done, loss, tokens per second)`."""
    with count_progress("training", steps, "steps") as report:
        yield lambda done, loss, rate: report(done, state=f"loss {loss:.4f}, {rate:,.0f} tokens/s")


def note(text: str) -> None:
    """Says something beside the results; parameters in backticks as the command spells them."""
    said = Text(f"note: {spelled(text, _flags)}", style="dim")
    stderr().print(said)  # a style of the print would be that of bars below, too


def console() -> Console:
    """The console for results."""
    return Console(highlight=False, soft_wrap=True, emoji=False)
