"""lm-eval's own command line, with our models in it: `python -m evals lm-eval`."""

import sys
from collections.abc import Sequence

from evals.harness.backend import GlupruneLM  # which registers the model "gluprune"
from evals.harness.bootstrap import standard_errors
from evals.harness.task_data import task_datasets
from gluprune_jax.cli import terminal


def run_lm_eval(argv: Sequence[str]) -> int:
    """lm-eval's own command line, which finds the model "gluprune" here, and returns its exit status.

    lm-eval 0.4.13 knows no plug-ins; later versions find it by its entry point.

    Args:
      argv: arguments of `lm-eval`, and `--debug`, which shows the traceback of an error.
    """
    arguments = [argument for argument in argv if argument != "--debug"]
    flags = {"benchmark_data": "--benchmark-data of gluprune evaluate"}
    return terminal.run("lm-eval", lambda: _lm_eval(arguments), debug=len(arguments) < len(argv), flags=flags)


def _lm_eval(arguments: list[str]) -> None:
    from lm_eval.__main__ import cli_evaluate

    GlupruneLM.progress = staticmethod(terminal.count_progress)
    true_arguments = sys.argv
    sys.argv = ["lm-eval", *arguments, *_batch_size_flag(arguments)]  # it reads no other
    try:
        # lm-eval's own standard errors would fork this process, which JAX's threads may not survive; and what it says
        # of data that cannot be had is a traceback.
        with standard_errors(), task_datasets():
            cli_evaluate()
    finally:
        sys.argv = true_arguments


def _batch_size_flag(arguments: Sequence[str]) -> list[str]:
    """What to add so that our models do not run with lm-eval's batch size of 1 only because none is given."""
    is_ours = "gluprune" in {argument.removeprefix("--model=") for argument in arguments}
    is_given = any(argument.startswith(("--batch", "-b", "--config", "-C")) for argument in arguments)
    return ["--batch_size", "auto"] if is_ours and not is_given else []
