"""What README and docs say is what the code does: their commands run, and their lists are those of the code.

Blocks of sh and python run page by page, in order, in a folder of their own, with a tiny random model in place of
`demo` and short texts in place of those that pages name. What the comment `<!-- not run: WHY -->` stands before needs
hardware or data that a test does not have; its commands are parsed all the same, as are all others.
"""

import json
import re
import shlex
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from test_evals_command import VOCABULARY, write_tokenizer
from tiny_models import hf_config, hf_tensors, write_folder

import convert.__main__
import evals.__main__
import evals.efficiency
import evals.report.__main__
import evals.sweep
import gluprune_jax
import gluprune_jax.compare
import gluprune_jax.prune
import gluprune_jax.recover
from convert.hf_config import INERT_KEYS, ONLY_THESE_VALUES
from gluprune_jax.criteria import CRITERIA

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

MODULES: dict[str, Any] = {
    "gluprune_jax.prune": gluprune_jax.prune,
    "gluprune_jax.recover": gluprune_jax.recover,
    "gluprune_jax.compare": gluprune_jax.compare,
    "convert": convert.__main__,
    "evals": evals.__main__,
    "evals.sweep": evals.sweep,
    "evals.efficiency": evals.efficiency,
    "evals.report": evals.report.__main__,
}
OTHERS = {"--case", "--compare"}  # options of benchmarks/tpu_check.py
# In place of the numbers that pages give for real models.
SMALL = {"--steps": "2", "--window": "64", "--evaluate-tokens": "512"}
SMALL_CALIBRATION = {"--calibration-tokens": "512", "--calibration-window": "64"}


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    text: str
    is_run: bool


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"(<!-- not run: [^>]+ -->\n)?^```(sh|python)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert len(found) == len(re.findall(r"^```(?:sh|python)$", text, re.MULTILINE))
    return [Block(language, code, not mark) for mark, language, code in found]


def command_lines(shell: str) -> Iterator[list[str]]:
    """The words of each command: of what another one starts (`srun`, `ssh --command`), and not that one's own."""
    for line in shell.replace("\\\n", "").splitlines():
        words = shlex.split(line, comments=True)
        if quoted := [word for word in words if word.startswith("python -m ")]:
            words = shlex.split(quoted[0])
        if "srun" in words:
            words = words[1:]
        if words:
            yield words


def check(words: Sequence[str]) -> None:
    """Makes sure that a command is one that there is."""
    if words[:2] == ["python", "-m"]:
        module, argv = MODULES[words[2]], list(words[3:])
        is_show = words[2] == "evals" and argv[0] == "show"
        parser, argv = (module.show_parser(), argv[1:]) if is_show else (module.parser(), argv)
        parser.parse_args(argv)
    elif words[:2] == ["pip", "install"]:
        extras = re.findall(r"\[([a-z,]+)\]", words[2])
        known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert set(",".join(extras).split(",")) - {""} <= known.keys()
    else:
        program, target = words
        assert program == "make"
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_is_understood(page: Path) -> None:
    for block in blocks(page):
        if block.language == "python":
            compile(block.text, str(page), "exec")
        else:
            for words in command_lines(block.text):
                check(words)


@pytest.mark.parametrize("module", MODULES)
def test_the_examples_of_a_help_text_are_understood(module: str) -> None:
    text = MODULES[module].parser().format_help().replace("\\\n", " ")
    examples = re.findall(r"^  (python -m .*)$", text, re.MULTILINE)
    assert examples
    for example in examples:
        words = shlex.split(re.split(r"(?<=\S) {5,}(?=[a-zA-Z])", example)[0])
        if "lm-eval" not in words:
            check(words)


# ------------------------------------------------------------------------------------------------------- what is run


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the demo model's expansion ratio."""
    config = hf_config(
        vocab_size=VOCABULARY,
        eos_token_id=VOCABULARY - 1,
        intermediate_size=128,
        num_hidden_layers=1,
        max_position_embeddings=1024,
    )
    folder = write_folder(tmp_path_factory.mktemp("docs") / "tiny", config, hf_tensors(config))
    write_tokenizer(folder)
    return folder


def run(words: list[str], tiny: Path) -> None:
    """Runs a command in this process as the page says, on the tiny model and on little text."""
    module, argv = MODULES[words[2]], words[3:]
    for flag in ("--model", "--teacher"):
        if flag in argv and argv[argv.index(flag) + 1] == "demo":
            argv[argv.index(flag) + 1] = str(tiny)
    if words[2] == "convert" and argv[0] == "demo":
        argv[0] = str(tiny)
    small = {flag: value for flag, value in SMALL.items() if flag in argv}
    small |= SMALL_CALIBRATION if "--calibration" in argv else {}
    small |= {"--mesh": "data=1"} if "--mesh" in module.parser().format_help() and argv[0] != "show" else {}
    for option in small.items():
        argv += option  # the last one counts
    assert module.main(argv) == 0, shlex.join(words)


RUN = [page for page in PAGES if any(block.is_run for block in blocks(page))]


@pytest.mark.real_model
@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_a_page_runs(page: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name, power in (("corpus.txt", 2), ("held-out.txt", 3)):
        Path(name).write_text("".join(f"Power {power} of {i} is {i**power}. " for i in range(60)))
    names: dict[str, object] = {}
    for block in blocks(page):
        if not block.is_run:
            continue
        if block.language == "python":
            if file := re.match(r"# (\w+\.py)\n", block.text):
                Path(file[1]).write_text(block.text)
            exec(compile(block.text.replace('"demo"', repr(str(tiny))), str(page), "exec"), names)
        else:
            for words in command_lines(block.text):
                if words[0] == "python":
                    run(words, tiny)


@pytest.mark.real_model
def test_the_five_lines_of_the_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = (block.text for block in blocks(ROOT / "README.md") if block.language == "python")
    assert sum(bool(line) for line in code.splitlines()) == 5
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    config = json.loads((tmp_path / "smollm2-2.4x" / "config.json").read_text())
    assert config["intermediate_size"] == 1383  # ceil(2.4 x 576)


# ------------------------------------------------------------------------------------------------------------- lists


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_nothing_is_left_to_fill_in(page: Path) -> None:
    assert "@@" not in page.read_text(encoding="utf-8")


def test_the_options_that_pages_name_exist() -> None:
    known = set(re.findall(r"--[a-z-]+", "".join(module.parser().format_help() for module in MODULES.values())))
    for page in PAGES:
        assert set(re.findall(r"(?<=`)--[a-z-]+", page.read_text(encoding="utf-8"))) <= known | OTHERS, page


def test_the_reference_has_what_packages_export() -> None:
    for package, page in ((gluprune_jax, "api-gluprune-jax"), (convert, "api-convert")):
        text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
        rows = "".join(re.findall(r"^\| (.*) \| \{py:mod\}", text, re.MULTILINE))
        assert set(re.findall(r"`(\w+)`", rows)) == set(package.__all__)


def test_every_criterion_is_in_the_readme() -> None:
    assert set(re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE)) == set(CRITERIA)


def test_the_inert_keys_are_documented() -> None:
    formats = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    listed = formats.split("<!-- inert keys")[1].split("-->")[1].split("<!-- end")[0]
    assert set(re.findall(r"`([^`]+)`", listed)) == INERT_KEYS
    assert not INERT_KEYS & ONLY_THESE_VALUES.keys()
