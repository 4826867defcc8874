"""What README and docs print is what the code does."""

import json
import re
import shlex
from pathlib import Path

import pytest

from convert.__main__ import parser as convert_parser
from convert.hf_config import INERT_KEYS, ONLY_THESE_VALUES
from evals.__main__ import parser as evals_parser
from gluprune_jax.compare import parser as compare_parser
from gluprune_jax.criteria import CRITERIA
from gluprune_jax.prune import parser as prune_parser
from gluprune_jax.recover import parser as recover_parser

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.real_model
def test_the_five_lines_of_the_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = blocks("python")
    assert sum(bool(line) for line in code.splitlines()) == 5
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    config = json.loads((tmp_path / "smollm2-2.4x" / "config.json").read_text())
    assert config["intermediate_size"] == 1383  # ceil(2.4 x 576)


def test_every_command_of_the_readme_is_understood() -> None:
    shell = "\n".join(blocks("sh")).replace("\\\n", "")
    commands = re.findall(r"^python -m gluprune_jax\.prune (.*)$", shell, re.MULTILINE)
    assert commands
    for command in commands:
        prune_parser().parse_args(shlex.split(command))
    commands = re.findall(r"^python -m evals (--.*?)(?:  +#.*)?$", shell, re.MULTILINE)
    assert commands
    for command in commands:
        evals_parser().parse_args(shlex.split(command))
    commands = re.findall(r"^python -m gluprune_jax\.recover (.*)$", shell, re.MULTILINE)
    assert commands
    for command in commands:
        recover_parser().parse_args(shlex.split(command))
    commands = re.findall(r"^python -m gluprune_jax\.compare (.*)$", shell, re.MULTILINE)
    assert commands
    for command in commands:
        compare_parser().parse_args(shlex.split(command))
    examples = re.findall(r"^  python -m convert (\S+ \S+(?: --format \S+)?)", convert_parser().format_help(), re.M)
    assert len(examples) == 3
    for example in examples:
        convert_parser().parse_args(shlex.split(example))


def test_nothing_is_left_to_fill_in() -> None:
    assert "@@" not in README


def test_the_options_of_the_readme_exist() -> None:
    known = set(
        re.findall(
            r"--[a-z-]+",
            "".join(parser().format_help() for parser in (prune_parser, recover_parser, evals_parser, compare_parser)),
        )
    )
    assert set(re.findall(r"(?<=`)--[a-z-]+", README)) <= known


def test_every_criterion_is_in_the_readme() -> None:
    assert set(re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE)) == set(CRITERIA)


def test_the_inert_keys_are_documented() -> None:
    formats = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    listed = formats.split("<!-- inert keys")[1].split("-->")[1].split("<!-- end")[0]
    assert set(re.findall(r"`([^`]+)`", listed)) == INERT_KEYS
    assert not INERT_KEYS & ONLY_THESE_VALUES.keys()
