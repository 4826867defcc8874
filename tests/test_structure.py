"""The rule of the house, held by parsing imports and strings.

The root of a package holds its commands, and what all of it shares (`convert` is small: its own modules are its root).
Only commands look up to another package, in the order gluprune_jax < convert < evals; only commands and `cli/` know
argparse, rich or a `--flag`; `models/` and `pruning/` need no trainer; `files/` know no model.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("gluprune_jax", "convert", "evals")
COMMANDS = {path.relative_to(ROOT).as_posix() for path in (ROOT / "gluprune_jax/prune").glob("*.py")}
COMMANDS |= {"gluprune_jax/recover.py", "convert/__main__.py", "evals/__main__.py"}
COMMANDS |= {"evals/compare.py", "evals/sweep.py", "evals/lm_eval_command.py"}
COMMANDS |= {"evals/efficiency/__main__.py", "evals/report/__main__.py"}
COMMANDS |= {"gluprune_jax/cli/recover.py"}  # what the command does: its command line answers before JAX is imported
SHARED = {"gluprune_jax/__init__.py", "gluprune_jax/errors.py", "gluprune_jax/progress.py"}
SHARED |= {"evals/__init__.py", "evals/perplexity.py"}
MODULES = [path.relative_to(ROOT).as_posix() for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py"))]
# Flags of other programs: of pip, gguf-split and lm-eval.
OTHERS = {"--no-deps", "--only-binary", "--dest", "--merge", "--apply_chat_template"}


def imports(module: str) -> set[str]:
    """The modules that a module imports anywhere, with the names that it takes from them."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def strings(module: str) -> Iterator[str]:
    """The strings of a module that are no docstrings."""
    tree = ast.parse((ROOT / module).read_text(encoding="utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {id(node.body[0].value) for node in ast.walk(tree) if isinstance(node, documented) and is_text(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


def is_text(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return bool(node.body) and isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant)


def is_screen(module: str) -> bool:
    return module in COMMANDS or "/cli/" in module


def needs(module: str, *names: str) -> set[str]:
    return {name for name in imports(module) if name.startswith(tuple(f"{one}." for one in names)) or name in names}


def test_the_root_of_a_package_holds_its_commands() -> None:
    roots = {module for module in MODULES if module.count("/") == 1 and not module.startswith("convert/")}
    assert roots == {module for module in COMMANDS if module.count("/") == 1} - {"convert/__main__.py"} | SHARED


@pytest.mark.parametrize("module", MODULES)
def test_who_may_know_what(module: str) -> None:
    package, *_ = module.split("/")
    if module not in COMMANDS:
        assert not needs(module, *PACKAGES[PACKAGES.index(package) + 1 :])
    if not is_screen(module):
        assert not needs(module, "argparse", "rich")
        flags = {flag for text in strings(module) for flag in re.findall(r"(?<![\w-])--[a-z][a-z_-]+", text)}
        assert not flags - OTHERS
    if module.startswith(("gluprune_jax/models/", "gluprune_jax/pruning/")):
        assert not needs(module, "gluprune_jax.training")
    if module.startswith("gluprune_jax/files/"):
        assert not needs(module, "gluprune_jax.models", "convert")
