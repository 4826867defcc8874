"""The documentation: `make docs` builds it, and takes every warning for an error."""

import ast
import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.typing
import numpy.typing
from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective
from sphinx.util.typing import stringify_annotation

# Modules are imported to be described: not on an accelerator, and help texts in lines that fit the page.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["COLUMNS"] = "96"

project = "gluprune_jax"
author = "the authors of gluprune_jax"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "gluprune_jax"
html_math_renderer = "mathml"
html_copy_source = False

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# Docstrings write code as Markdown does, between single backticks.
default_role = "code"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True

UNIONS = {
    stringify_annotation(union, "smart"): short
    for union, short in (
        (numpy.typing.ArrayLike, "ArrayLike"),
        (jax.typing.ArrayLike, "ArrayLike"),
        (jax.typing.DTypeLike, "DTypeLike"),
    )
}


ROOT = Path(__file__).parent.parent


def modules_of(package: str) -> Iterator[str]:
    """The dotted names of a package's modules, found as files: commands and wings first, then what is in each wing."""
    for file in sorted((ROOT / package).rglob("*.py"), key=lambda file: (len(file.parts), file)):
        parts = file.relative_to(ROOT).with_suffix("").parts
        if parts[1:] != ("__init__",):  # the page itself
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def exports_of(package: str) -> Iterator[tuple[str, str]]:
    """Each module that a package's `__init__` imports from, and the names that it takes from it."""
    tree = ast.parse((ROOT / package / "__init__.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, ", ".join(f"`{name.asname or name.name}`" for name in node.names)


def reference(app: Sphinx, docname: str, content: list[str]) -> None:
    """Puts the modules of a package in place of `<!-- exports PACKAGE -->` and `<!-- modules PACKAGE -->` on a page."""
    if not docname.startswith("api-"):
        return
    for package in ("gluprune_jax", "convert", "evals"):
        exports = "\n".join(f"| {names} | {{py:mod}}`{module}` |" for module, names in exports_of(package))
        modules = "\n\n".join(
            f"## {name}\n\n```{{eval-rst}}\n.. automodule:: {name}\n```" for name in modules_of(package)
        )
        content[0] = content[0].replace(f"<!-- exports {package} -->", f"| name | from |\n|---|---|\n{exports}")
        content[0] = content[0].replace(f"<!-- modules {package} -->", modules)


class Help(SphinxDirective):
    """The help text of a command, from its own parser: `{help} MODULE` or `{help} MODULE:FUNCTION`."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        module, _, function = self.arguments[0].partition(":")
        text = getattr(importlib.import_module(module), function or "parser")().format_help()
        return [nodes.literal_block(text, text, language="text")]


def keep_columns(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Shows indented paragraphs and tables of a docstring as they stand there: they are set in columns."""
    shown: list[str] = []
    in_block = False
    for line in lines:
        if line.startswith("|"):
            line = f"    {line}"
        is_indented = line.startswith("    ")
        if is_indented and not in_block and (not shown or not shown[-1].strip()):
            shown += ["::", ""]
            in_block = True
        elif line.strip() and not is_indented:
            in_block = False
        shown.append(line)
    lines[:] = shown


def name_unions(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """Calls the long unions of types by the names that the code has for them."""
    for spelled, short in UNIONS.items():
        signature = signature and signature.replace(spelled, short)
    return signature, returns


def leave_out(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """The fields of named tuples are in the docstring of their class."""
    return True if (getattr(obj, "__doc__", None) or "").startswith("Alias for field number") else None


def write_math(translator: Any, node: nodes.Node) -> None:
    """Writes a formula as MathML, which browsers show without a script from elsewhere."""
    is_block = isinstance(node, nodes.math_block)
    try:
        formula = tex2mathml(node.astext(), as_block=is_block)
    except MathError as error:
        logging.getLogger(__name__).warning("%s: %s", error, node.astext(), location=node)
        raise nodes.SkipNode from error
    translator.body.append(f'<div style="padding: 0.5em 0">{formula}</div>' if is_block else formula)
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """What Sphinx calls."""
    app.add_directive("help", Help)
    app.connect("source-read", reference)
    app.add_html_math_renderer("mathml", (write_math, None), (write_math, None))
    app.connect("autodoc-process-docstring", keep_columns, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", name_unions)
    app.connect("autodoc-skip-member", leave_out)
    return {"parallel_read_safe": True}
