"""What long work says of itself: numbers by a clock of the test's own, and what arrives at a terminal and in a pipe."""

import io
import os
import pty
import subprocess
import sys
import threading
from collections.abc import Callable

import jax
import pytest
from rich.console import Console

from gluprune_jax.cli import display
from gluprune_jax.cli.display import Compilations, Display, Work, format_speed


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def advance(clock: Clock, work: Work, *steps: tuple[float, int]) -> None:
    for seconds, done in steps:
        clock.now += seconds
        work.report(done)


# ------------------------------------------------------------------------------------------------------ the numbers


def test_a_piece_of_work_says_how_much_how_fast_and_how_long(clock: Clock) -> None:
    work = Work("perplexity", 8192, "tokens", clock)
    assert work.describe(False) == "0/8,192 tokens"
    advance(clock, work, (4, 2048))
    assert work.describe(False) == "2,048/8,192 tokens, 512 tokens/s, 0:00:12 left"
    advance(clock, work, (12, 8192))
    assert work.describe(False) == "8,192/8,192 tokens, 512 tokens/s"


def test_compiling_stands_in_place_of_speed_and_time(clock: Clock) -> None:
    work = Work("scoring", 16, "layers", clock)
    assert work.describe(True) == "0/16 layers, compiling"
    advance(clock, work, (4, 8))
    assert work.describe(True) == "8/16 layers, compiling"


def test_below_one_a_second_the_time_of_each_is_said(clock: Clock) -> None:
    work = Work("answers", 10, "requests", clock)
    advance(clock, work, (246, 2))
    assert work.describe(False) == "2/10 requests, 123.0 s/request, 0:16:24 left"
    assert [format_speed(speed, "layers") for speed in (0.5, 1, 9.94, 12345)] == [
        "2.0 s/layer",
        "1.0 layers/s",
        "9.9 layers/s",
        "12,345 layers/s",
    ]


def test_work_that_stands_still_gets_slower(clock: Clock) -> None:
    work = Work("answers", 10, "requests", clock)
    advance(clock, work, (10, 5))
    clock.now += 40
    assert work.describe(False) == "5/10 requests, 10.0 s/request, 0:00:50 left"


def test_the_speed_is_that_of_the_last_minute_however_slow_the_beginning_was(clock: Clock) -> None:
    work = Work("perplexity", 100_000, "tokens", clock)
    advance(clock, work, (300, 10))  # compiled meanwhile
    advance(clock, work, *((10.0, 10 + 1000 * i) for i in range(1, 9)))
    assert work.speed() == pytest.approx(100)


def test_a_bound_of_the_total_bounds_the_time_too(clock: Clock) -> None:
    work = Work("answers", 2560, "tokens", clock)
    clock.now += 20
    work.report(1280, at_most=1990, state="7/10 answers")
    assert work.describe(False) == "1,280/1,990 tokens, 7/10 answers, 64 tokens/s, at most 0:00:11 left"


def test_bytes_have_units(clock: Clock) -> None:
    work = Work("reading GGUF", 2_000_000_000, "bytes", clock)
    advance(clock, work, (2, 500_000_000))
    assert work.describe(False) == "500.00 MB of 2.00 GB, 250.00 MB/s, 0:00:06 left"


# ------------------------------------------------------------------------------------------------------ the lines


@pytest.fixture
def lines(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], str | None]:
    """Waits so many seconds, and says what would be printed then; nothing is printed by itself."""
    shown = Display(Console(file=io.StringIO()), clock)
    monkeypatch.setattr(display, "LINE_SECONDS", 10.0)
    monkeypatch.setattr(display, "compilations", lambda: False)
    monkeypatch.setattr(display.threading.Thread, "start", lambda thread: None)
    monkeypatch.setattr(display.threading.Thread, "join", lambda thread: None)

    def wait(seconds: float) -> str | None:
        clock.now += seconds
        return shown.line()

    wait.display = shown  # type: ignore[attr-defined]
    return wait


def test_a_line_comes_every_ten_seconds(lines: Callable[[float], str | None]) -> None:
    with lines.display.work("perplexity", 100, "tokens") as report:  # type: ignore[attr-defined]
        assert lines(9) is None
        report(50)
        assert lines(1) == "perplexity: 50/100 tokens, 5.0 tokens/s, 0:00:10 left"
        assert lines(9) is None
        assert lines(1) == "perplexity: 50/100 tokens, 2.5 tokens/s, 0:00:20 left"
    assert lines(20) is None, "no work, no line"


def test_short_works_one_after_the_other_are_not_silent(lines: Callable[[float], str | None]) -> None:
    said = []
    for number in range(5):
        with lines.display.work(f"part {number}", 10, "items"):  # type: ignore[attr-defined]
            said.append(lines(4))
    assert said == [None, None, "part 2: 0/10 items", None, None]


def test_of_several_works_the_one_that_reported_last_speaks(lines: Callable[[float], str | None]) -> None:
    shown = lines.display  # type: ignore[attr-defined]
    with shown.work("models", 3, "models") as outer:
        with shown.work("tokens of a model", 9, "tokens"):
            assert lines(10) == "tokens of a model: 0/9 tokens"
            outer(1)
            assert lines(10) == "models: 1/3 models, 20.0 s/model, 0:00:40 left"
        assert lines(10) == "models: 1/3 models, 30.0 s/model, 0:01:00 left"


# ------------------------------------------------------------------------------------------------------ compiling


def test_it_is_known_when_jax_compiles() -> None:
    """Of a program that is compiled, and of one that is not: jax announces the beginning and the end."""
    compilations = Compilations()
    seen: list[bool] = []

    @jax.jit
    def traced(x: jax.Array) -> jax.Array:
        seen.append(bool(compilations))
        return x + 1

    assert not compilations
    traced(jax.numpy.ones(7)).block_until_ready()
    assert seen == [True]
    assert not compilations
    with pytest.raises(ZeroDivisionError):
        jax.jit(lambda x: x / (1 // 0))(1.0)
    assert not compilations, "an error ends it too"


# ---------------------------------------------------------------------------------------- as commands show it

PIPE = """
import threading
from gluprune_jax.cli import display, terminal

display.LINE_SECONDS = 0.01
said = threading.Event()
printed = terminal._Listening.write

def write(self, text):
    result = printed(self, text)
    if "working" in text:
        said.set()
    return result

terminal._Listening.write = write
with terminal.count_progress("working", 4, "layers") as report:
    report(1)
    assert said.wait(60), "no line"
    terminal.note("beside it")
print("a result")
"""


def test_in_a_pipe_lines_are_printed_while_nothing_reports() -> None:
    done = subprocess.run([sys.executable, "-c", PIPE], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "a result\n"
    first, *_ = lines = done.stderr.splitlines()
    assert first.startswith("working: 1/4 layers, ")
    assert "note: beside it" in lines
    assert all(line.startswith("working: 1/4 layers") or line == "note: beside it" for line in lines)


TERMINAL = """
import sys
from gluprune_jax.cli import terminal

with terminal.count_progress("working", 4, "layers") as report:
    report(1)
    with terminal.byte_progress() as report_bytes:
        report_bytes("reading", 5, 10)
        terminal.note("beside it")
        print("a warning of others", file=sys.stderr)
    terminal.stderr().print("and more")
print("a result")
"""


def test_on_a_terminal_notes_stand_above_the_bar() -> None:
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", TERMINAL],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "100"},
    ) as process:
        os.close(theirs)
        parts: list[bytes] = []
        reader = threading.Thread(target=_read_all, args=(ours, parts))
        reader.start()
        assert process.stdout is not None
        assert process.stdout.read() == b"a result\n"
        reader.join(60)
    assert process.returncode == 0
    screen = Screen(b"".join(parts).decode())
    assert screen.lines() == ["note: beside it", "a warning of others", "and more"], "the bars are gone"
    assert any("working" in line and "1/4 layers" in line for line in screen.drawn)
    for line in screen.drawn:
        assert not ("beside it" in line and "working" in line), line


def _read_all(file: int, parts: list[bytes]) -> None:
    while True:
        try:
            data = os.read(file, 4096)
        except OSError:  # the other end is closed
            break
        if not data:
            break
        parts.append(data)
    os.close(file)


class Screen:
    """As much of a terminal as a bar uses: lines, the cursor up, and lines erased."""

    def __init__(self, text: str) -> None:
        self.drawn: list[str] = []  # every line when it was left or erased
        self._lines, self._row = [""], 0
        column, at = 0, 0
        while at < len(text):
            if text.startswith("\x1b[", at):
                end = next(i for i in range(at + 2, len(text)) if text[i].isalpha())
                count, kind = text[at + 2 : end], text[end]
                if kind == "A":
                    self._row = max(0, self._row - int(count or 1))
                elif kind == "K":
                    self.drawn.append(self._lines[self._row])
                    self._lines[self._row] = ""
                at = end + 1
                continue
            if text[at] == "\n":
                self.drawn.append(self._lines[self._row])
                self._row += 1
                if self._row == len(self._lines):
                    self._lines.append("")
            elif text[at] == "\r":
                column = 0
            else:
                line = self._lines[self._row]
                self._lines[self._row] = line[:column].ljust(column) + text[at] + line[column + 1 :]
                column += 1
            at += 1
        self.drawn += self._lines

    def lines(self) -> list[str]:
        """What stands there at the end."""
        return [line.rstrip() for line in self._lines if line.strip()]


def test_how_often_a_line_is_written_comes_from_the_environment(capsys: pytest.CaptureFixture[str]) -> None:
    assert [display.seconds_between_lines(text) for text in ("60", "0.5", "inf")] == [60, 0.5, float("inf")]
    assert capsys.readouterr().err == ""
    for wrong in ("", "0", "-1", "often", "nan"):
        assert display.seconds_between_lines(wrong) == 10
        assert f"GLUPRUNE_PROGRESS_SECONDS is {wrong!r}; give seconds above 0" in capsys.readouterr().err
