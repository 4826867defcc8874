"""The two ways a command can fail, and the exit status of each.

Every message is one sentence that names the file, tensor, field or flag, what was found and what is accepted.
"""


class GlupruneError(Exception):
    """Base of all errors that are reported to the user without a traceback."""

    exit_status = 1
    # Of several processes: all have failed, and the first one says why.
    all_know = False


class RequestError(GlupruneError):
    """What was asked for cannot be done as asked: another flag, model or plan is the remedy. Exit status 2."""

    exit_status = 2


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


def shortened(value: object) -> str:
    """A value as an error message shows it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:40]}...{text[-37:]}"
