"""Which programs JAX compiles, by its own log."""

import contextlib
import logging
import re
from collections.abc import Iterator

import jax

_LINE = re.compile(r"Compiling (?:jit[_(])?(\w+)\)? with global shapes and types (.*)\. Argument mapping", re.DOTALL)


@contextlib.contextmanager
def compiled() -> Iterator[list[tuple[str, str]]]:
    """The programs that are compiled in the block: the name of each function, and the shapes of its arguments."""
    found: list[tuple[str, str]] = []

    class Listening(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if match := _LINE.match(record.getMessage()):
                found.append((match[1], match[2]))

    logger, listening = logging.getLogger("jax._src.interpreters.pxla"), Listening()
    propagates = logger.propagate
    logger.addHandler(listening)
    logger.propagate = False  # nobody wants to read it
    try:
        with jax.log_compiles():
            yield found
    finally:
        logger.removeHandler(listening)
        logger.propagate = propagates
