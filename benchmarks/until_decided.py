"""How many items the verdicts of a study take, by replaying a study that was run in full.

    python benchmarks/until_decided.py STUDY [--margin 0.05]

Every benchmark and model of the study is stopped as `gluprune sweep --until-decided` would have: the same order, looks
and rule, on the outcomes that are stored. Beside each verdict stands that of the full run.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from evals.results.outcomes import SHARES
from evals.study.analysis import Row, analyse, is_settled
from evals.study.folder import load_study
from evals.study.sequential import Key, draw_order, looks
from evals.study.study import MARGIN, Score, StoppingRule, StudiedBenchmark, Study, Variant, name_variant


def stop(full: Study, margin: float) -> Study:
    """The study as it were if it had stopped when decided."""
    can_stop = [one for one in full.benchmarks if one.metric.partition(",")[0] in SHARES]
    items = {one.name: one.measured[full.dense].items for one in can_stop}
    levels = max(len(full.of_method(method)) - 1 for method in full.methods)
    rule = StoppingRule(margin, levels, len(full.benchmarks), items)
    study = dataclasses.replace(full, about={"until_decided": dataclasses.asdict(rule)})
    benchmarks = [_stopped(study, one) if one.name in items else one for one in full.benchmarks]
    return dataclasses.replace(study, benchmarks=benchmarks)


def _stopped(study: Study, benchmark: StudiedBenchmark) -> StudiedBenchmark:
    outcomes = benchmark.measured[study.dense].outcomes
    assert outcomes is not None
    order = draw_order(outcomes.keys)
    taken = {point: _taken(study, benchmark, point, order) for point in benchmark.measured}
    taken[study.dense] = max(taken.values(), key=len)
    return dataclasses.replace(benchmark, measured={p: _on(benchmark.measured[p], keys) for p, keys in taken.items()})


def _taken(study: Study, benchmark: StudiedBenchmark, point: Variant, order: Sequence[Key]) -> Sequence[Key]:
    for keys in looks(order):
        measured = {one: _on(benchmark.measured[one], keys) for one in (study.dense, point)}
        if is_settled(study, dataclasses.replace(benchmark, measured=measured), point):
            return keys
    return order


def _on(score: Score, keys: Sequence[Key]) -> Score:
    assert score.outcomes is not None
    return Score.of(score.outcomes.on(tuple(sorted(keys))))


def _verdict(row: Row) -> str:
    change = "within" if row.change == "same" and row.is_within else row.change
    return ", ".join(filter(None, (row.relation, change)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="folder of a study that was run in full")
    parser.add_argument("--margin", type=float, default=MARGIN)
    args = parser.parse_args()
    full = load_study(args.study)
    rows = list(zip(analyse(stop(full, args.margin)).rows, analyse(full).rows, strict=True))
    for early, whole in rows:
        settled = {True: "settled", False: "open", None: "in full"}[early.settled]
        name, items = name_variant(early.point), f"{early.measured.items:,} of {whole.measured.items:,}"
        verdicts = f"{_verdict(early)} | full run: {_verdict(whole)}"
        print(f"{early.benchmark:16} {name:16} {items:>16} {settled:8} {verdicts}")
    asked, there_are = (sum(row.measured.items for row in column) for column in zip(*rows, strict=True))
    print(f"{asked:,} of {there_are:,} items ({asked / there_are:.0%})")


if __name__ == "__main__":
    main()
