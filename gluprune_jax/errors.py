"""The two ways a command can fail, and the exit status of each.

Every message is one sentence that names the file, tensor, field or parameter (in backticks, see `spelled`), what was
found and what is accepted. It is one line, whatever the names in a foreign file hold, and with the name of the command
before it at most 500 characters.
"""

import re
from collections.abc import Collection, Mapping


def format_bytes(count: int) -> str:
    """Decimal units, as disks and downloads are sold: 2.47 GB."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count} B"


MAX_LINE = 500  # characters of what an error puts on the terminal
MAX_MESSAGE = 470  # of these, what is not the name of the command


class GlupruneError(Exception):
    """Base of all errors that are reported to the user without a traceback."""

    exit_status = 1
    # Of several processes: all have failed, and the first one says why.
    all_know = False

    def __init__(self, message: str):
        """Keeps the message as one line of at most `MAX_MESSAGE` characters: a last resort, where a part is foreign."""
        super().__init__(one_line(message, MAX_MESSAGE))


_PARAMETER = re.compile(r"`([a-z][a-z0-9_]*)`")


def spelled(message: str, flags: Mapping[str, str]) -> str:
    """A message of the library with the parameters that it names, in backticks, as a command spells them.

    Args:
      message: such as "`prune_percent` is 120; it must lie between 0 and 100".
      flags: by parameter, such as {"prune_percent": "--prune-percent"}. Others stay as they are.
    """
    return _PARAMETER.sub(lambda match: flags.get(match[1], match[0]), message)


class RequestError(GlupruneError):
    """What was asked for cannot be done as asked: another flag, model or plan is the remedy. Exit status 2."""

    exit_status = 2


def check_at_least(least: float, **values: float | None) -> None:
    """Refuses parameters below the least value that they can have; None stands for what is not given.

    Raises:
      RequestError: one is less.
    """
    for name, value in values.items():
        if value is not None and value < least:
            raise RequestError(f"`{name}` is {value}; it must be at least {least}")


class OperationError(GlupruneError):
    """Something underneath failed: a damaged file, the network, the disk. Exit status 1."""


def unreadable(what: str, error: OSError | UnicodeDecodeError) -> GlupruneError:
    """The error for a file that the user named: a wrong name or kind of file is the request's fault."""
    if isinstance(error, UnicodeDecodeError):
        return RequestError(f"{what} is not UTF-8 text; choose another file")
    kind = (
        RequestError
        if isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError)
        else OperationError
    )
    return kind(f"cannot read {what}: {error.strerror}")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the host or the device has no memory left."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)  # the second is XLA's


def one_line(text: str, limit: int = MAX_LINE) -> str:
    """A text with line ends and control characters escaped, and its middle left out beyond `limit` characters."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    if len(text) <= limit:
        return text
    tail = limit // 3  # what is accepted stands at the end
    return f"{text[: limit - tail - 5]} ... {text[-tail:]}"


def first_line(error: BaseException, limit: int = 200) -> str:
    """What a library says in its exception, as a part of our sentence: the first line that says something."""
    lines = (line.strip() for line in str(error).splitlines())
    return one_line(next((line for line in lines if line), type(error).__name__), limit)


def shortened(value: object) -> str:
    """A value as an error message shows it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:40]}...{text[-37:]}"


def listed(names: Collection[str], limit: int = 200, separator: str = ", ", longest: int = 100) -> str:
    """Names as an error message lists them: at most about `limit` characters, the first at least, and how many more.

    A name is shown whole unless it has more than `longest` characters, and without line breaks or other control
    characters.
    """
    shown: list[str] = []
    for name in names:
        name = name if name.isprintable() else repr(name)
        name = name if len(name) <= longest else f"{name[: longest // 2]}...{name[3 - longest // 2 :]}"
        if shown and sum(map(len, shown)) + len(separator) * len(shown) + len(name) > limit:
            break
        shown.append(name)
    more = len(names) - len(shown)
    return separator.join(shown) + (f" and {more} more" if more else "")
