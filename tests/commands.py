"""Runs a command in this process, as a shell would."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest

Main = Callable[[Sequence[str]], int]


def run(main: Main, capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    """Exit status, standard output and standard error."""
    capsys.readouterr()
    try:
        status = main([str(arg) for arg in argv])
    except SystemExit as stop:  # argparse leaves this way
        status = int(stop.code or 0)
    out, err = capsys.readouterr()
    return status, out, err


def report(main: Main, capsys: pytest.CaptureFixture[str], *argv: object) -> Any:
    """What a command that succeeds says with `--json`."""
    status, out, err = run(main, capsys, *argv, "--json")
    assert status == 0, err
    return json.loads(out)
