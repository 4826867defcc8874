"""The report of a study that was measured before, or of the published values: `python -m evals.report`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from evals.__main__ import check_installed, data_folder
from evals.paper import paper_study, published
from evals.study import Measured, Study
from evals.suites import SUITES, task_manager
from gluprune_jax import terminal
from gluprune_jax.atomic import refuse_address
from gluprune_jax.errors import RequestError

DESCRIPTION = """\
Writes the report of a study: a page that opens offline, figures (PNG, SVG), tables (CSV, LaTeX) and study.json.

examples:
  python -m evals.report study                     what python -m evals.sweep has measured so far
  python -m evals.report --published Llama-3.2-3B --data-dir data --output published-3b
                                                   the paper's own values, beside floors computed on its benchmarks
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = terminal.ArgumentParser("python -m evals.report", DESCRIPTION)
    parser.add_argument("study", nargs="?", type=Path, metavar="STUDY", help="folder of a study")
    parser.add_argument("--published", choices=published()["models"], help="the published values of this model instead")
    parser.add_argument(
        "--data-dir", metavar="DIR", help="with --published: data of the benchmarks, as for python -m evals"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder of the report (default: the study's)")
    parser.add_argument("--json", action="store_true", help="print what it says as one JSON document")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    args = parser().parse_args(sys.argv[1:] if argv is None else argv)
    return terminal.run("evals.report", lambda: _report(args), debug=args.debug)


def _report(args: argparse.Namespace) -> None:
    if (args.study is None) == (args.published is None):
        raise RequestError("give the folder of a study, or --published MODEL")
    if args.data_dir is not None and args.published is None:
        raise RequestError("--data-dir is for --published; a study has its own results")
    output = args.output or args.study
    if output is None:
        raise RequestError("--published needs a folder for the report; give --output DIR")
    refuse_address(output)
    check_installed(is_study=True)
    from evals.report.files import PAGE, print_study, write_report
    from evals.study_files import load_study

    study = load_study(args.study) if args.study else _published(args.published, args.data_dir)
    write_report(study, output)
    print_study(study, as_json=args.json)
    if not args.json:
        print(f"report: {output / PAGE}")


def _published(model: str, data_dir: str | None) -> Study:
    """The published values, beside floors on all items of their benchmarks."""
    from evals.floors import floors
    from evals.run import load_benchmarks

    names = {benchmark.name for benchmark in paper_study(model).benchmarks}
    # Floors of perplexities depend on a tokenizer, which is not here.
    benchmarks = [one for one in SUITES["paper"].benchmarks if one.name in names and one.higher_is_better]
    loaded = load_benchmarks(benchmarks, task_manager(one.name for one in benchmarks), data_dir=data_folder(data_dir))
    found = {}
    with terminal.count_progress("floors", len(loaded), "benchmarks") as progress:
        for number, one in enumerate(loaded, start=1):
            metric = one.benchmark.metric or ""
            found[one.benchmark.name] = {f.responder: Measured.of(f.outcomes) for f in floors(one, metric)}
            progress(number)
    return paper_study(model, found)


if __name__ == "__main__":
    sys.exit(main())
