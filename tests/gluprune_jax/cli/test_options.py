"""The shared options: one meaning everywhere, and old spellings that name the new ones."""

import argparse
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

import convert.__main__
import evals.__main__
import evals.compare
import evals.efficiency.__main__
import evals.report.__main__
import evals.sweep
import gluprune_jax.prune
import gluprune_jax.recover
from convert.output import FORMATS
from convert.sources import DTYPE_NAMES
from gluprune_jax.cli import main as door
from gluprune_jax.cli.options import LISTS, OLD, TABLE
from gluprune_jax.pruning.choices import CRITERION_NAMES
from gluprune_jax.pruning.criteria import CRITERIA
from gluprune_jax.training.choices import TRAINABLE
from gluprune_jax.training.trainable import Trainable

Capture = pytest.CaptureFixture[str]
COMMANDS: dict[str, Any] = {
    "prune": gluprune_jax.prune,
    "convert": convert.__main__,
    "recover": gluprune_jax.recover,
    "evaluate": evals.__main__,
    "compare": evals.compare,
    "sweep": evals.sweep,
    "efficiency": evals.efficiency.__main__,
    "report": evals.report.__main__,
}
# Which commands had an option under its old name.
HAD = {
    "--levels": ("sweep", "efficiency"),
    "--items": ("sweep",),
    "--mask": ("evaluate",),
    "--calibration": ("prune", "compare", "sweep"),
    "--calibration-window": ("prune", "compare", "sweep"),
    "--evaluate-tokens": ("prune", "compare"),
    "--window": ("prune", "recover", "compare"),
    "--data": ("recover",),
    "--data-dir": ("evaluate", "compare", "sweep", "efficiency", "report"),
    "--max-length": ("evaluate", "sweep"),
    "--floor": ("prune", "compare", "sweep"),
    "--in-order": ("prune",),
}


def refused(command: str, capsys: Capture, *argv: str) -> str:
    """The one line with which a command refuses arguments."""
    with pytest.raises(SystemExit) as stop:
        COMMANDS[command].main([*argv])
    err = capsys.readouterr().err
    assert (stop.value.code, err.count("\n"), err[:17]) == (2, 1, "gluprune: error: ")
    return err


def actions(command: str) -> dict[str, argparse.Action]:
    return {flag: action for action in COMMANDS[command].parser()._actions for flag in action.option_strings}


# ------------------------------------------------------------------------------------------------------- old spellings


def test_every_old_spelling_ends_in_an_error_that_names_the_new_one(capsys: Capture) -> None:
    assert HAD.keys() == OLD.keys()
    for old, new in OLD.items():
        for command in HAD[old]:
            for argv in ((old, "x"), (f"{old}=x",), ("--model", "m", old)):
                assert f"{old} is called {new} now" in refused(command, capsys, *argv)


def test_lists_are_separated_by_commas(capsys: Capture) -> None:
    for flag in LISTS:
        said = refused("compare", capsys, "--model", "m", flag, "10", "20")
        assert f"the values of {flag} are separated by commas now: {flag} A,B" in said
    assert "--prune-percent has 'x'; give values separated by commas" in refused(
        "sweep", capsys, "--prune-percent", "10,x"
    )


def test_evaluate_is_a_switch(capsys: Capture) -> None:
    for command in ("prune", "compare"):
        said = refused(command, capsys, "--model", "m", "--evaluate", "corpus.txt")
        assert "--evaluate is a switch now; name texts with --eval-data corpus.txt" in said


def test_a_word_of_a_method_has_a_new_name(capsys: Capture) -> None:
    argv = ["--model", "m", "--methods", "ppm+ls+in-order", "--width", "9", "--evaluate", "--calibration-data", "x"]
    assert evals.compare.main(argv) == 2
    assert "'in-order', which is called sequential now" in capsys.readouterr().err


def test_prune_takes_one_size(capsys: Capture) -> None:
    assert gluprune_jax.prune.main(["--model", "m", "--prune-percent", "10,20", "--dry-run"]) == 2
    assert "--prune-percent has 2 values; prune takes one" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------------- table


def test_a_shared_option_means_the_same_in_every_command() -> None:
    found: dict[str, list[argparse.Action]] = {}
    for command in COMMANDS:
        for flag, action in actions(command).items():
            found.setdefault(flag, []).append(action)
    table = {option.flag: option for option in TABLE}
    evaluation = {"--suite", "--tasks", "--benchmark-data", "--apply-chat-template", "--include-path"}
    shared = {flag for flag, several in found.items() if len(several) > 1}
    assert shared - evaluation - {"-h", "--help"} <= table.keys()
    for flag in shared:
        several = found[flag]
        assert len({(action.dest, type(action)) for action in several}) == 1, flag
        help_text = table[flag].help if flag in table else several[0].help or ""
        beginning = help_text.partition("{about}")[0]
        assert all((action.help or "").startswith(beginning) for action in several), flag
        if flag in table and flag not in ("--output", "--batch-size", "--methods"):
            assert {repr(action.default) for action in several} <= {repr(table[flag].default), "False"}, flag


def test_no_two_spellings_of_before_are_options_now() -> None:
    for command in COMMANDS:
        assert not actions(command).keys() & OLD.keys(), command


def test_what_is_chosen_by_name_is_there() -> None:
    assert tuple(CRITERIA) == CRITERION_NAMES
    assert get_args(get_type_hints(Trainable)["what"]) == TRAINABLE


def test_choices_are_those_of_the_converter() -> None:
    options = {option.flag: option for option in TABLE}
    assert set(options["--dtype"].choices or ()) == set(DTYPE_NAMES)
    assert all(name in options["--format"].help for name in FORMATS)


# ----------------------------------------------------------------------------------------------------------- the door


def test_the_help_fits_a_screen_and_loads_no_jax() -> None:
    code = (
        "import sys; from gluprune_jax.cli.main import main; main(['--help']); main(['--version']);"
        "sys.exit('jax' in sys.modules or 'rich' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    *lines, version = done.stdout.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    assert all(re.search(rf"^  {verb} ", done.stdout, re.MULTILINE) for verb in COMMANDS)
    assert re.fullmatch(r"gluprune \d+\.\d+\.\d+.*", version)


AT_ONCE = """
import importlib, sys
main = importlib.import_module(sys.argv[1]).main
for line in sys.argv[2:]:
    try:
        status = main(line.split())
    except SystemExit as stop:
        status = stop.code
    loaded = sys.modules.keys() & {"jax", "flax", "optax", "orbax", "transformers", "tokenizers", "gguf", "lm_eval"}
    assert (status, loaded) == (0 if "--help" in line else 2, set()), (line, status, loaded)
"""


@pytest.mark.parametrize(
    ("verb", "lines"),
    [
        ("prune", ["--model a --width x"]),
        ("convert", ["a b --dtype int3"]),
        ("recover", ["--model a --train-data b --steps 1 --output c --train some"]),
        ("evaluate", ["--model a --suite quick --date today", "show --help", "show there/is/none"]),
        ("compare", ["--model a --methods ppm --width 1,x"]),
        ("sweep", ["--preset none"]),
        ("efficiency", ["--model a --workload none"]),
        ("report", ["--published none", "study --published Llama-3.2-1B"]),
    ],
)
def test_help_and_refused_arguments_need_no_jax(verb: str, lines: list[str]) -> None:
    command = [sys.executable, "-c", AT_ONCE, door.VERBS[verb].module, "--help", "--none", *lines]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_verb_is_a_command(capsys: Capture) -> None:
    assert door.VERBS.keys() == COMMANDS.keys()
    for verb in door.VERBS:
        with pytest.raises(SystemExit) as stop:
            door.main([verb, "--help"])
        assert stop.value.code == 0
        out = capsys.readouterr().out
        assert out.startswith(f"usage: gluprune {verb} ")
        assert "exit codes: 0 success, 1 runtime error, 2 usage error, 130 interrupted" in " ".join(out.split())


def test_what_is_no_command_is_one_sentence(capsys: Capture) -> None:
    for argv, reason in (
        (["trim"], "there is no command 'trim'"),
        (["--model", "demo"], "--model comes after a command, such as gluprune prune --model"),
    ):
        assert door.main(argv) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"gluprune: error: {reason}; the commands are prune, convert, recover, evaluate, ")
        assert err.count("\n") == 1


def test_a_criterion_in_this_folder_is_found_by_the_executable(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def first(gate):\n    raise SystemExit('found')\n")
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "gluprune"  # as an installer writes it: its own folder comes first, not this one
    script.write_text("import sys\nfrom gluprune_jax.cli.main import main\nsys.exit(main())\n")
    argv = ["compare", "--model", "none", "--methods", "mine:second", "--width", "9", "--evaluate"]
    done = subprocess.run([sys.executable, script, *argv], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert "mine" in done.stderr
    assert "second" in done.stderr
    assert "No module named" not in done.stderr


WITHOUT_EXTRAS = """
import importlib, importlib.abc, sys
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1].split(","):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
from gluprune_jax.cli.main import VERBS
for verb in VERBS.values():
    assert importlib.import_module(verb.module).parser().format_help()
"""


def test_every_command_says_what_it_does_without_the_extras() -> None:
    """Whoever installed the package alone asks for help first, and learns there what to install."""
    extras = "altair,datasets,gcsfs,lm_eval,nltk,pyarrow,safetensors,statsmodels,torch,vl_convert,zeus"
    done = subprocess.run([sys.executable, "-c", WITHOUT_EXTRAS, extras], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
