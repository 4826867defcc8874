"""The notebooks: each is a pair of files that say the same, and holds no outputs. `make notebooks` executes them."""

import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def test_each_notebook_has_its_pair():
    assert NOTEBOOKS
    assert [path.stem for path in NOTEBOOKS] == sorted(path.stem for path in FOLDER.glob("*.py"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_holds_no_outputs(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    ran = [cell["id"] for cell in cells if cell.get("outputs") or cell.get("execution_count")]
    assert not ran, f"clear them: jupyter nbconvert --clear-output --inplace {path.name}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_pair_says_the_same(path):
    jupytext = pytest.importorskip("jupytext", reason="needs gluprune-jax[notebooks]; make notebooks runs it")
    one, other = (jupytext.read(path.with_suffix(suffix)) for suffix in (".ipynb", ".py"))
    assert [(c.cell_type, c.source) for c in one.cells] == [(c.cell_type, c.source) for c in other.cells], (
        f"in notebooks/: jupytext --sync {path.stem}.py after changing either file"
    )
