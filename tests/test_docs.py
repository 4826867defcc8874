"""What README and docs say is what the code does: their commands run, and their lists are those of the code.

A command is `gluprune VERB` or `python -m MODULE`, which are the same.

Blocks of sh and python run page by page, in order, in a folder of their own, with a tiny random model in place of
`demo` and short texts in place of those that pages name. What the comment `<!-- not run: WHY -->` stands before needs
hardware or data that a test does not have; its commands are parsed all the same, as are all others.
"""

import importlib
import json
import re
import shlex
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from byte_tokenizer import VOCABULARY, write_tokenizer
from tiny_models import hf_config, hf_tensors, write_folder

import convert.__main__
import evals.__main__
import evals.compare
import evals.efficiency.__main__
import evals.report.__main__
import evals.sweep
import gluprune_jax
import gluprune_jax.prune
import gluprune_jax.recover
from convert.huggingface.config import INERT_KEYS, ONLY_THESE_VALUES
from gluprune_jax.cli import main as executable
from gluprune_jax.pruning.criteria import CRITERIA

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

MODULES: dict[str, Any] = {
    "gluprune_jax.prune": gluprune_jax.prune,
    "gluprune_jax.recover": gluprune_jax.recover,
    "evals.compare": evals.compare,
    "convert": convert.__main__,
    "evals": evals.__main__,
    "evals.sweep": evals.sweep,
    "evals.efficiency": evals.efficiency.__main__,
    "evals.report": evals.report.__main__,
}
VERBS = {verb: about.module.removesuffix(".__main__") for verb, about in executable.VERBS.items()}
OTHERS = {"--case", "--compare", "--baseline"}  # options of scripts under benchmarks/
# In place of the numbers that pages give for real models.
SMALL = {"--steps": "2", "--sequence-length": "64", "--eval-tokens": "512"}
SMALL_CALIBRATION = {"--calibration-tokens": "512", "--sequence-length": "64"}
# What somebody who knows the field would search for.
USUAL_WORDS = """
atomic; baseline; block influence; chat template; checkpoint; context length; continuous batching; crash;
data parallel; depth pruning; dtype; exit codes; few-shot; gradient accumulation; gradient clipping; greedy;
KV cache; least squares; LoRA; no-knowledge baseline; non-finite; out of memory; perplexity; prefill; prefix sharing;
recovery training; resume; sequence length; tensor parallel; traceback; zero-shot
"""


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
        if quoted := [word for word in words if word.startswith(("gluprune ", "python -m "))]:
            words = shlex.split(quoted[0])
        if "srun" in words:
            words = words[1:]
        if words:
            yield words


def module_of(words: Sequence[str]) -> tuple[str, list[str]] | None:
    """The module that a command of ours runs, and its arguments; None of any other command."""
    if words[0] == "gluprune":
        return VERBS[words[1]], list(words[2:])
    if words[:2] == ["python", "-m"]:
        return words[2], list(words[3:])
    return None


def check(words: Sequence[str]) -> None:
    """Makes sure that a command is one that there is."""
    if found := module_of(words):
        name, argv = found
        if argv[0] == "lm-eval":
            return
        is_show = name == "evals" and argv[0] == "show"
        module = MODULES[name]
        parser, argv = (module.show_parser(), argv[1:]) if is_show else (module.parser(), argv)
        parser.parse_args(argv)
    elif words[:2] == ["python", "-c"]:
        compile(words[2], "python -c", "exec")
        assert words[3] == ">"
    elif words[0] in {"git", "cd", "source"}:
        pass
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
    examples = re.findall(r"^  ((?:gluprune|python -m) .*)$", text, re.MULTILINE)
    assert examples
    for example in examples:
        check(shlex.split(re.split(r"(?<=\S) {5,}(?=[a-zA-Z])", example)[0]))


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


def run(name: str, argv: list[str], tiny: Path) -> None:
    """Runs a command in this process as the page says, on the tiny model and on little text."""
    module, said = MODULES[name], shlex.join([name, *argv])
    for flag in ("--model", "--teacher"):
        if flag in argv and argv[argv.index(flag) + 1] == "demo":
            argv[argv.index(flag) + 1] = str(tiny)
    if name == "convert" and argv[0] == "demo":
        argv[0] = str(tiny)
    small = {flag: value for flag, value in SMALL.items() if flag in argv}
    small |= SMALL_CALIBRATION if "--calibration-data" in argv else {}
    small |= {"--mesh": "data=1"} if "--mesh" in module.parser().format_help() and argv[0] != "show" else {}
    for option in small.items():
        argv += option  # the last one counts
    assert module.main(argv) == 0, said


def write_texts() -> None:
    """The texts that pages name, in the working directory."""
    for name, power in (("corpus.txt", 2), ("held-out.txt", 3)):
        Path(name).write_text("".join(f"Power {power} of {i} is {i**power}. " for i in range(60)))


RUN = [page for page in PAGES if any(block.is_run for block in blocks(page))]


@pytest.mark.real_model
@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_a_page_runs(page: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    write_texts()
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
                if found := module_of(words):
                    run(*found, tiny)


@pytest.mark.real_model
def test_the_five_lines_of_the_readme_run(
    shallow_demo: convert.Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the first layers of the demo model."""
    monkeypatch.setattr(convert, "load", {"demo": shallow_demo}.__getitem__)
    (code,) = (block.text for block in blocks(ROOT / "README.md") if block.language == "python")
    assert sum(bool(line) for line in code.splitlines()) == 5
    monkeypatch.chdir(tmp_path)
    write_texts()
    exec(compile(code, "README.md", "exec"), {})
    config = json.loads((tmp_path / "smollm2-p20" / "config.json").read_text())
    assert config["intermediate_size"] == 1536 - 1536 * 20 // 100


# ------------------------------------------------------------------------------------------------------------- lists


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_nothing_is_left_to_fill_in(page: Path) -> None:
    assert "@@" not in page.read_text(encoding="utf-8")


def test_the_options_that_pages_name_exist() -> None:
    known = set(re.findall(r"--[a-z-]+", "".join(module.parser().format_help() for module in MODULES.values())))
    for page in PAGES:
        assert set(re.findall(r"(?<=`)--[a-z-]+", page.read_text(encoding="utf-8"))) <= known | OTHERS, page


def test_the_readme_is_a_front_door() -> None:
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("word", [" ".join(word.split()) for word in USUAL_WORDS.split(";")])
def test_a_reader_finds_the_usual_word(word: str) -> None:
    text = " ".join(" ".join(page.read_text(encoding="utf-8") for page in PAGES).split())
    assert re.search(word, text, re.IGNORECASE)


@pytest.mark.parametrize("package", ["gluprune_jax", "convert", "evals"])
def test_the_reference_of_a_package_is_made_from_its_files(package: str) -> None:
    """`docs/conf.py` puts all modules there; `make docs` takes a module that cannot be described for an error."""
    page = (ROOT / "docs" / f"api-{package.replace('_', '-')}.md").read_text(encoding="utf-8")
    assert f"<!-- modules {package} -->" in page
    assert "automodule" not in page
    if hasattr(importlib.import_module(package), "__all__"):
        assert f"<!-- exports {package} -->" in page


def test_every_page_is_in_the_table_of_contents() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    trees = re.findall(r"^```{toctree}\n(.*?)^```$", index, re.DOTALL | re.MULTILINE)
    assert {page.stem for page in PAGES} - {"README", "index"} <= set(" ".join(trees).split())


def test_every_verb_is_in_the_list_of_commands() -> None:
    commands = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert dict(re.findall(r"^\| `gluprune ([a-z]+)` \| `python -m ([\w.]+)`", commands, re.MULTILINE)) == VERBS


def test_every_criterion_is_explained_and_measured() -> None:
    method, results = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("method.md", "results.md"))
    assert set(re.findall(r"^\| `(\w+)` \|", method, re.MULTILINE)) == set(CRITERIA)
    assert set(re.findall(r"^\| `(\w+)`[ ,]", results, re.MULTILINE)) == set(CRITERIA)


def test_the_inert_keys_are_documented() -> None:
    formats = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    listed = formats.split("<!-- inert keys")[1].split("-->")[1].split("<!-- end")[0]
    assert set(re.findall(r"`([^`]+)`", listed)) == INERT_KEYS
    assert not INERT_KEYS & ONLY_THESE_VALUES.keys()
