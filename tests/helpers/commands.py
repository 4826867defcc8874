"""Runs a command in this process, as a shell would."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest

Main = Callable[[Sequence[str]], int]


def status(main: Main, *argv: object) -> int:
    """The exit status."""
    try:
        return main([str(arg) for arg in argv])
    except SystemExit as stop:  # argparse leaves this way
        return int(stop.code or 0)


def run(main: Main, capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    """Exit status, standard output and standard error."""
    capsys.readouterr()
    stopped = status(main, *argv)
    out, err = capsys.readouterr()
    return stopped, out, err


def report(main: Main, capsys: pytest.CaptureFixture[str], *argv: object) -> Any:
    """What a command that succeeds says with `--json`."""
    stopped, out, err = run(main, capsys, *argv, "--json")
    assert stopped == 0, err
    return json.loads(out)
