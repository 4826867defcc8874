"""Which programs were compiled, for which shapes, and how long each took."""

import contextlib
import threading
from collections.abc import Iterator
from typing import NamedTuple

import jax

_EVENTS = "/jax/core/compile/"
_TRACE, _LOWER, _COMPILE = (
    _EVENTS + name for name in ("jaxpr_trace_duration", "jaxpr_to_mlir_module_duration", "backend_compile_duration")
)


class Program(NamedTuple):
    """A compiled program.

    Attributes:
      name: of the function.
      shapes: what it was compiled for, in words.
      compile_seconds: tracing, lowering and compiling; or fetching it from the persistent cache.
    """

    name: str
    shapes: str
    compile_seconds: float


class CompileLog:
    """What JAX compiles within the `naming` blocks of this log.

    Attributes:
      programs: in the order of their compilation.
    """

    def __init__(self) -> None:
        self.programs: list[Program] = []

    @contextlib.contextmanager
    def naming(self, shapes: str) -> Iterator[None]:
        """Logs what this thread compiles in the block, as compiled for `shapes`."""
        outer = getattr(_current, "log", None)
        _current.log = (self, shapes, {})
        try:
            yield
        finally:
            _current.log = outer


_current = threading.local()


def _listen(event: str, duration_secs: float, **details: str | int) -> None:
    if not event.startswith(_EVENTS) or (current := getattr(_current, "log", None)) is None:
        return
    log, shapes, spent = current
    name = str(details.get("fun_name", "")).removeprefix("jit(").removesuffix(")")
    if event in (_TRACE, _LOWER):
        spent[name] = spent.get(name, 0.0) + duration_secs
    elif event == _COMPILE:
        log.programs.append(Program(name, shapes, spent.pop(name, 0.0) + duration_secs))


jax.monitoring.register_event_duration_secs_listener(_listen)
