"""The report of a study that was measured before, or of the published values: `python -m evals.report`."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from evals.cli import options as eval_options
from evals.harness.suites import SUITES, task_manager
from evals.study.paper import paper_study, published
from evals.study.study import Score, Study
from gluprune_jax.cli import options, terminal
from gluprune_jax.errors import RequestError
from gluprune_jax.files.atomic import check_no_address

DESCRIPTION = """\
Writes the report of a study: a page that opens offline, figures (PNG, SVG), tables (CSV) and study.json.

examples:
  gluprune report study                            what gluprune sweep has measured so far
  gluprune report --published Llama-3.2-3B --benchmark-data data --output published-3b
                                                   the paper's own values, beside no-knowledge baselines
"""
START = "python -m evals.report"


@dataclasses.dataclass(frozen=True)
class ReportRequest:
    """What is to be reported; the fields are options and arguments of the same names."""

    study: Path | None
    published: str | None
    benchmark_data: str | None
    output: Path | None
    json: bool


def parser(start: str = START) -> terminal.ArgumentParser:
    """The command line; `start` is what it begins with."""
    parser = terminal.ArgumentParser(start, DESCRIPTION)
    parser.add_argument("study", nargs="?", type=Path, metavar="STUDY", help="folder of a study")
    parser.add_argument("--published", choices=published()["models"], help="the published values of this model instead")
    eval_options.add_benchmark_data(parser)
    options.add(parser, "--output", about="folder of the report (default: the study's)", type=Path)
    options.add(parser, "--json")
    options.add(parser, "--debug")
    return parser


def main(argv: Sequence[str] | None = None, *, start: str = START) -> int:
    """Runs the command line, which begins with `start`, and returns its exit status."""
    args = parser(start).parse_args(sys.argv[1:] if argv is None else argv)
    request = options.request(ReportRequest, args)
    return terminal.run(
        "gluprune",
        lambda: _report(request),
        debug=args.debug,
        flags=parser().flags,
        kept=lambda: "the study is as it was; give the same command to write the report again",
    )


def _report(request: ReportRequest) -> None:
    if (request.study is None) == (request.published is None):
        raise RequestError("give the folder of a study, or --published MODEL")
    if request.benchmark_data is not None and request.published is None:
        raise RequestError("--benchmark-data is for --published; a study has its own results")
    output = request.output or request.study
    if output is None:
        raise RequestError("--published needs a folder for the report; give --output DIR")
    check_no_address(output)
    eval_options.check_installed(is_study=True)
    from evals.cli.study import print_study
    from evals.report.files import PAGE, write_report
    from evals.study.folder import load_study

    study = load_study(request.study) if request.study else _published(request.published, request.benchmark_data)
    write_report(study, output)
    print_study(study, as_json=request.json)
    if not request.json:
        print(f"report: {output / PAGE}")


def _published(model: str | None, benchmark_data: str | None) -> Study:
    """The published values, beside the no-knowledge baselines on all items of their benchmarks."""
    from evals.harness.run import load_benchmarks
    from evals.study.baselines import baselines

    assert model is not None  # as was checked
    names = {benchmark.name for benchmark in paper_study(model).benchmarks}
    # Baselines of perplexities depend on a tokenizer, which is not here.
    benchmarks = [one for one in SUITES["paper"].benchmarks if one.name in names and one.higher_is_better]
    manager = task_manager(one.name for one in benchmarks)
    loaded = load_benchmarks(benchmarks, manager, benchmark_data=eval_options.data_folder(benchmark_data))
    found = {}
    with terminal.count_progress("no-knowledge baselines", len(loaded), "benchmarks") as progress:
        for number, one in enumerate(loaded, start=1):
            metric = one.benchmark.metric or ""
            found[one.benchmark.name] = {b.name: Score.of(b.outcomes) for b in baselines(one, metric)}
            progress(number)
    return paper_study(model, found)


if __name__ == "__main__":
    sys.exit(main())
