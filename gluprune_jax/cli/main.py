"""The one executable: `gluprune VERB ...`. Its own help loads nothing of what the commands need."""

import importlib
import importlib.metadata
import os
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Verb(NamedTuple):
    """A command: the module whose `main` it is, and what it does."""

    module: str
    about: str


VERBS: Mapping[str, Verb] = {
    "prune": Verb("gluprune_jax.prune", "remove MLP neurons or layers, and write a smaller checkpoint"),
    "convert": Verb("convert.__main__", "convert a model between Hugging Face, GGUF and Orbax"),
    "recover": Verb("gluprune_jax.recover", "train a pruned model, by distillation or on plain text"),
    "evaluate": Verb("evals.__main__", "run benchmarks, and store the outcome of every item"),
    "compare": Verb("evals.compare", "compare pruning methods by perplexity and benchmarks"),
    "sweep": Verb("evals.sweep", "a study: several sizes, benchmarks, significance tests, report"),
    "efficiency": Verb("evals.efficiency.__main__", "measure latency, throughput, memory and energy"),
    "report": Verb("evals.report.__main__", "write the report of a study"),
}

HELP = f"""\
usage: gluprune COMMAND ...

Structured width pruning of GLU-MLP language models in JAX (arXiv 2512.22671).

commands:
{chr(10).join(f"  {name:<11} {verb.about}" for name, verb in VERBS.items())}

gluprune COMMAND --help shows its options, and gluprune --version the version.

examples:
  gluprune prune --model demo --expansion-ratio 2.4 --output smollm2-2.4x
  gluprune evaluate --model smollm2-2.4x --suite quick --benchmark-data demo

exit codes: 0 success, 1 runtime error, 2 usage error, 130 interrupted"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command, or shows which there are, and returns the exit status."""
    first, *rest = [*(sys.argv[1:] if argv is None else argv)] or ["--help"]
    if first in ("-h", "--help"):
        print(HELP)
        return 0
    if first == "--version":
        print(f"gluprune {importlib.metadata.version('gluprune-jax')}")
        return 0
    if first not in VERBS:
        if first.startswith("-"):
            reason = f"{first} comes after a command, such as gluprune prune {first}"
        else:
            reason = f"there is no command {first[:40]!r}"
        print(f"gluprune: error: {reason}; the commands are {', '.join(VERBS)}", file=sys.stderr)
        return 2
    # Criteria of the user's own (--criterion module:function) are found in this folder, as they are by `python -m`.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    status: int = importlib.import_module(VERBS[first].module).main(rest, start=f"gluprune {first}")
    return status
