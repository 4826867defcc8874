"""What a command says at the end, and that nobody has to listen."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gluprune_jax.cli import terminal
from gluprune_jax.errors import MAX_LINE, OperationError, RequestError

COMMAND = """
import sys
from rich.console import Console
from gluprune_jax.cli import terminal

parser = terminal.ArgumentParser("command", "Does things.")
parser.add_argument("--rich", action="store_true")
parser.add_argument("--lines", type=int, default=1)
args = parser.parse_args()

def command():
    with terminal.count_progress("working", 3, "things") as report:
        report(2)
    terminal.stderr().print("note: nearly done")
    for _ in range(args.lines):
        Console().print("a result") if args.rich else print("a result")
    terminal.stderr().print("note: done")

sys.exit(terminal.run("gluprune", command, debug=False))
"""


def run(redirection: str, *argv: str) -> tuple[int, str]:
    """The exit status of a command whose streams a shell redirects, and all that was said."""
    script = f'"$0" -c "$1" {" ".join(argv)} {redirection}'
    # Not bash: its own messages about pipes would be among the output.
    done = subprocess.run(
        ["sh", "-c", script, sys.executable, COMMAND],
        env=os.environ | {"TERM": "xterm", "FORCE_COLOR": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


FULL = "gluprune: error: cannot write the output: No space left on device"


@pytest.mark.parametrize("argv", [(), ("--rich",), ("--help",)], ids=" ".join)
def test_an_output_that_is_full_is_one_sentence(argv: tuple[str, ...]) -> None:
    status, said = run("> /dev/full", *argv)
    lines = [line for line in said.splitlines() if not line.startswith("note: ")]
    assert (status, lines) == (1, [FULL])


@pytest.mark.parametrize("argv", [("--lines", "9999"), ("--help",)], ids=" ".join)
def test_a_reader_that_is_gone_is_not_complained_of(argv: tuple[str, ...]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *argv], stdout=writing, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writing)
    assert done.returncode == 1
    assert [line for line in done.stderr.splitlines() if not line.startswith("note: ")] == []


@pytest.mark.parametrize("redirection", ["2> /dev/full", ">&- 2>&-"])
def test_without_standard_error_the_work_is_done(redirection: str) -> None:
    status, said = run(redirection)
    assert status == 0
    results = [line for line in said.splitlines() if not line.startswith("note: ")]
    assert results == ([] if redirection.startswith(">") else ["a result"])
    assert run(redirection, "--nonsense")[0] == 2


def test_an_error_is_one_line_whatever_it_quotes(capsys: pytest.CaptureFixture[str]) -> None:
    for error in (RequestError, OperationError, ValueError, KeyError):

        def fail(error: type[Exception] = error) -> None:
            raise error("first\n\x1b[2J" + "x" * 5000 + "\nand what is accepted")

        assert terminal.run("gluprune-efficiency", fail, debug=False) in (1, 2)
        line = capsys.readouterr().err
        assert line.startswith("gluprune-efficiency: error: ")
        assert len(line) <= MAX_LINE + 1
        assert line[:-1].isprintable()
        assert line.endswith("and what is accepted\n") or not issubclass(error, RequestError | OperationError)
    parser = terminal.ArgumentParser("command", "Does things.")
    with pytest.raises(SystemExit):
        parser.parse_args(["x\n" * 5000])
    line = capsys.readouterr().err
    assert len(line) <= MAX_LINE
    assert line.endswith(" (--help shows the options)\n")
    assert line[:-1].isprintable()


def test_a_file_that_the_system_refuses_is_no_bug_of_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert terminal.run("command", lambda: (tmp_path / "none").read_bytes() and None, debug=False) == 1
    said = capsys.readouterr().err
    assert said == f"command: error: cannot use {tmp_path}/none: No such file or directory\n"
