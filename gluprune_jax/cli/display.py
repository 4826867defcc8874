"""How far long work is: a bar on a terminal, and elsewhere (a pipe, a file, a CI log) a line every ten seconds
(or as many as the environment variable GLUPRUNE_PROGRESS_SECONDS says).

answers: 1,234/2,560 tokens, 7/10 answers, 35 tokens/s, at most 0:00:38 left
scoring neurons: 3/16 layers, 12.3 s/layer, 0:02:40 left
perplexity: 0/8,192 tokens, compiling
"""

import collections
import contextlib
import functools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

from gluprune_jax.errors import format_bytes
from gluprune_jax.progress import Report


def seconds_between_lines(text: str) -> float:
    """What the environment variable says; ten where it says no such number."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if seconds > 0:
        return seconds
    print(f"note: GLUPRUNE_PROGRESS_SECONDS is {text!r}; give seconds above 0, such as 60, or inf", file=sys.stderr)
    return 10.0


# Between two lines, where there is no terminal: what a log of hours would be full of, or should not hold at all.
LINE_SECONDS = seconds_between_lines(os.environ.get("GLUPRUNE_PROGRESS_SECONDS", "10"))
_SPEED_SECONDS = 60.0  # a speed is that of the last minute, or since the last but one report if that was earlier
BYTES = "bytes"

Clock = Callable[[], float]


class Compilations:
    """Whether JAX is tracing, lowering or compiling a program at the moment, in whatever thread.

    JAX announces both ends of each phase: the beginning as a scalar, the end as a duration, by the same name.
    """

    _PHASES = "/jax/core/compile/"

    def __init__(self) -> None:
        import jax  # here: as `is_compiling` says

        self._running = 0
        self._lock = threading.Lock()
        jax.monitoring.register_scalar_listener(self._begin)
        jax.monitoring.register_event_duration_secs_listener(self._end)

    def __bool__(self) -> bool:
        return self._running > 0

    def _begin(self, event: str, value: float | int, **details: str | int) -> None:
        if event.startswith(self._PHASES):
            with self._lock:
                self._running += 1

    def _end(self, event: str, duration_secs: float, **details: str | int) -> None:
        if event.startswith(self._PHASES):
            with self._lock:
                self._running = max(0, self._running - 1)


@functools.cache
def compilations() -> Compilations:
    """Those of this process, from the first call on."""
    return Compilations()


def is_compiling() -> bool:
    """Whether JAX is compiling; it is not where nobody has imported it, as what goes from file to file does not."""
    return hasattr(sys.modules.get("jax"), "monitoring") and bool(compilations())


class Work:
    """A piece of work of known size.

    Args:
      what: names it.
      total: how much there is, in units.
      unit: in the plural; "bytes" are shown as MB or GB.
      clock: seconds.

    Attributes:
      done: how much is done, in units.
    """

    def __init__(self, what: str, total: int, unit: str, clock: Clock) -> None:
        self.what, self.total, self.unit, self.done = what, total, unit, 0
        self._is_bounded, self._state, self._clock = False, "", clock
        self._reports = collections.deque([(clock(), 0)])

    def report(self, done: int, /, *, at_most: int | None = None, state: str = "") -> None:
        """See `gluprune_jax.progress.Report`."""
        if at_most is not None:
            self.total, self._is_bounded = at_most, True
        self._state = state
        if done != self.done:
            now = self._clock()
            self._reports.append((now, done))
            while len(self._reports) > 2 and self._reports[1][0] <= now - _SPEED_SECONDS:
                self._reports.popleft()
        self.done = done

    def speed(self) -> float | None:
        """Units a second, lately; None where nothing has been done yet."""
        begun, before = self._reports[0]
        elapsed = self._clock() - begun
        return (self.done - before) / elapsed if self.done > before and elapsed > 0 else None

    def describe(self, compiles: bool) -> str:
        """How much is done, how fast, and how long it will take."""
        parts = [self._amount(), self._state]
        speed = self.speed()
        if compiles:
            parts.append("compiling")
        elif speed is not None:
            parts.append(format_speed(speed, self.unit))
            if self.done < self.total:
                left = format_duration((self.total - self.done) / speed)
                parts.append(f"{'at most ' * self._is_bounded}{left} left")
        return ", ".join(part for part in parts if part)

    def _amount(self) -> str:
        if self.unit == BYTES:
            return f"{format_bytes(self.done)} of {format_bytes(self.total)}"
        return f"{self.done:,}/{self.total:,} {self.unit}"


def format_speed(speed: float, unit: str) -> str:
    """Units a second; below one, the time that each takes."""
    if unit == BYTES:
        return f"{format_bytes(int(speed))}/s"
    if speed < 1:
        return f"{1 / speed:,.1f} s/{unit.removesuffix('s')}"
    return f"{speed:,.0f} {unit}/s" if speed >= 10 else f"{speed:.1f} {unit}/s"


def format_duration(seconds: float) -> str:
    """Hours, minutes and seconds: 1:02:03."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


class Display:
    """Shows the works that are under way, of which the one that reported last speaks.

    Args:
      console: where.
      clock: seconds.
      next_line: when the next line is due, by the clock, where there were displays before this one.

    Attributes:
      console: as given; what is printed there stands above the bars.
      next_line: as above.
    """

    def __init__(self, console: Console, clock: Clock = time.monotonic, next_line: float | None = None) -> None:
        self.console, self.next_line, self._clock = console, next_line, clock
        self._works: dict[Work, TaskID] = {}
        self._current: Work | None = None
        # What others print on standard output keeps its way: it may be a file.
        columns = (TextColumn("{task.description}"), BarColumn(), _Description())
        self._bars = Progress(*columns, console=console, transient=True, redirect_stdout=False)
        self._idle = threading.Event()
        is_compiling()  # JAX tells only who listens before a compilation begins
        self._printer: threading.Thread | None = None

    @contextlib.contextmanager
    def work(self, what: str, total: int, unit: str) -> Iterator[Report]:
        """Shows a piece of work (see `Work`) for as long as the block runs."""
        one = Work(what, total, unit, self._clock)
        self._begin(one)
        try:
            yield functools.partial(self._report, one)
        finally:
            self._end(one)

    def _begin(self, one: Work) -> None:
        if not self._works:
            self._start()
        self._works[one] = self._bars.add_task(one.what, total=one.total, work=one)
        self._current = one

    def _end(self, one: Work) -> None:
        self._bars.remove_task(self._works.pop(one))
        self._current = next(reversed(self._works), None)
        if not self._works:
            self._stop()

    def _report(self, one: Work, done: int, /, *, at_most: int | None = None, state: str = "") -> None:
        one.report(done, at_most=at_most, state=state)
        self._current = one
        self._bars.update(self._works[one], completed=done, total=one.total)

    def line(self) -> str | None:
        """What to print now, where there is no terminal: None until ten seconds have passed since the last line."""
        now, one = self._clock(), self._current
        if one is None or self.next_line is None or now < self.next_line:
            return None
        self.next_line = now + LINE_SECONDS
        return f"{one.what}: {one.describe(is_compiling())}"

    def _start(self) -> None:
        if self.console.is_interactive or self.console.is_jupyter:
            self._bars.start()
            return
        if self.next_line is None:
            self.next_line = self._clock() + LINE_SECONDS
        self._idle.clear()
        self._printer = threading.Thread(target=self._print_lines, daemon=True)
        self._printer.start()

    def _stop(self) -> None:
        if self._printer is None:
            self._bars.stop()
            return
        self._idle.set()
        self._printer.join()
        self._printer = None

    def _print_lines(self) -> None:
        # In a thread of its own: while a program is compiled or a large batch runs, nobody reports.
        while not self._idle.wait(min(1.0, LINE_SECONDS / 10)):
            if line := self.line():
                self.console.print(line, style="dim", markup=False)


class _Description(ProgressColumn):
    def render(self, task: Task) -> Text:
        work: Work = task.fields["work"]
        return Text(work.describe(is_compiling()))
