"""What a study says of outcomes made to order, and what it finds in the published values."""

import dataclasses
import functools
import itertools
import os
from pathlib import Path

import numpy as np
import pytest
from synthetic_studies import POINTS, study

from evals.harness.run import load_benchmarks
from evals.harness.suites import find_benchmark, task_manager
from evals.report.words import summary
from evals.results.outcomes import Outcomes
from evals.study.analysis import Analysis, analyse, compare, retention
from evals.study.baselines import baselines
from evals.study.paper import paper_study, published
from evals.study.study import Score, StudiedBenchmark, Study
from gluprune_jax.errors import RequestError


@functools.cache
def analysed() -> Analysis:
    return analyse(study())


def verdicts(found: Analysis, benchmark: str) -> list[str]:
    return [row.verdict for row in found.rows if row.benchmark == benchmark]


def test_falling_to_the_baseline_holding_and_improving_are_told_apart() -> None:
    made = analysed()
    assert verdicts(made, "mmlu") == [
        "above the baseline",
        "above the baseline, falling",
        "above the baseline, falling",
        "at the baseline: fallen to it",
        "at the baseline: fallen to it",
    ]
    assert verdicts(made, "steady")[1:] == ["above the baseline, holding"] * 4
    assert verdicts(made, "rising")[1:] == ["above the baseline, holding"] + ["above the baseline, improving"] * 3
    assert verdicts(made, "guessed") == ["at the baseline"] + ["at the baseline: not distinguishable from dense"] * 4
    assert verdicts(made, "truthfulqa_mc2")[0] == "below the baseline"
    assert verdicts(made, "truthfulqa_mc2")[-1] == "at the baseline: risen to it"
    assert verdicts(made, "ifeval")[-1] == "at the baseline: fallen to it"  # worse than the best, not the worst
    assert verdicts(made, "wikitext") == ["above the baseline"] + ["above the baseline, falling"] * 4


def test_benchmarks_are_grouped_by_what_became_of_them() -> None:
    assert analysed().groups == {
        "ppm": {
            "fragile": ["mmlu", "ifeval", "wikitext"],
            "no difference found": ["steady"],
            "improving": ["rising"],
            "at the baseline": ["guessed"],
            "below the baseline": ["truthfulqa_mc2"],
        }
    }


def test_comparisons_are_corrected_for_their_number() -> None:
    rows = [row for row in analysed().rows if row.from_dense is not None]
    assert len(rows) == 7 * 4
    for row in rows:
        assert row.from_dense is not None
        assert row.p_from_dense is not None
        assert row.from_dense.p_value <= row.p_from_dense <= 1
    smallest = min(row.from_dense.p_value for row in rows if row.from_dense is not None)
    assert min(row.p_from_dense or 1 for row in rows) == pytest.approx(len(rows) * smallest)


def test_trends_and_correlation() -> None:
    found = analysed()
    assert found.trends["ppm", "mmlu"].difference < 0
    assert found.trends["ppm", "mmlu"].high < 0
    assert found.trends["ppm", "steady"].difference == 0
    assert found.trends["ppm", "wikitext"].difference > 0  # nats
    assert found.correlations["ppm"].r < -0.9
    assert found.correlations["ppm"].points == 5


def test_retention_is_one_for_dense_and_falls() -> None:
    made, found = study(), analysed()
    left = [retention(made, found, point) for point in POINTS]
    assert left[0] == pytest.approx(1)
    assert all(a is not None and b is not None and a > b for a, b in itertools.pairwise(left))


def test_standard_errors_are_those_of_means_and_of_ratios() -> None:
    made = study()
    measured = made.benchmarks[0].measured[POINTS[0]]
    assert measured.stderr == pytest.approx((0.6 * 0.4 / 399) ** 0.5)
    perplexity = made.benchmarks[-1].measured[POINTS[0]]
    assert perplexity.outcomes is not None
    assert perplexity.value == pytest.approx(12.18, rel=0.02)
    assert perplexity.stderr == pytest.approx(0.02 / 60**0.5, rel=0.5)


def test_five_documents_of_different_lengths_can_be_above_the_baseline_and_worse() -> None:
    words = np.array([400.0, 900, 1500, 2700, 5000])
    keys = tuple(("pages", i) for i in range(5))

    def measured(loss: float) -> Score:
        noise = np.array([0.01, -0.02, 0.015, -0.01, 0.005])
        return Score.of(Outcomes(keys, words * loss * (1 + noise), words, is_perplexity=True))

    scores = {point: measured(3.0 + i) for i, point in enumerate(POINTS[:2])}
    baselines = {"all tokens equally likely": measured(12.0)}
    one = StudiedBenchmark("wikitext", "W", "word_perplexity,none", False, True, scores, baselines)
    dense, pruned = analyse(Study("m", POINTS[:2], [one], {}, {})).rows
    assert (dense.relation, pruned.relation, pruned.change) == ("above", "above", "worse")


def test_outcomes_of_other_items_are_not_compared() -> None:
    made = study()
    other = made.benchmarks[-1].measured[POINTS[0]]
    with pytest.raises(ValueError, match="not of the same items"):
        compare(made.benchmarks[0].measured[POINTS[0]], other)


# ------------------------------------------------------------------------------------------------ the published values


@pytest.fixture(scope="module")
def baselines_of_the_paper() -> dict[str, dict[str, Score]]:
    """On the full benchmarks that the findings are about."""
    if not {"GLUPRUNE_DATA", "NLTK_DATA"} <= os.environ.keys():
        pytest.skip("needs the benchmarks: set GLUPRUNE_DATA and NLTK_DATA")
    benchmarks = [find_benchmark(name) for name in ("mmlu", "truthfulqa_mc2", "ifeval")]
    manager = task_manager(one.name for one in benchmarks)
    loaded = load_benchmarks(benchmarks, manager, benchmark_data=Path(os.environ["GLUPRUNE_DATA"]))
    return {
        one.benchmark.name: {b.name: Score.of(b.outcomes) for b in baselines(one, one.benchmark.metric or "")}
        for one in loaded
    }


def test_published_correlations_come_out_to_the_digit() -> None:
    large = analyse(paper_study("Llama-3.2-3B")).correlations["ppm"]
    assert (round(large.r, 3), round(large.p_value, 3), large.points) == (-0.864, 0.012, 7)
    small = analyse(paper_study("Llama-3.2-1B")).correlations["ppm"]
    assert (round(small.r, 3), round(small.p_value, 3)) == (-0.676, 0.096)


def test_the_published_tables_are_whole() -> None:
    models = published()["models"]
    assert {name: len(about["levels"]) for name, about in models.items()} == {
        "Llama-3.2-1B": 7,
        "Llama-3.2-3B": 7,
        "Llama-3.2-1B-Instruct": 4,
    }
    made = paper_study("Llama-3.2-1B")
    assert [round(point.expansion_ratio, 1) for point in made.points] == [4.0, 3.6, 3.2, 2.8, 2.4, 2.0, 1.6]
    scores = {b.name: [b.measured[point].value for point in made.points] for b in made.benchmarks}
    assert scores["mmlu"] == [0.3111, 0.2511, 0.2661, 0.261, 0.2689, 0.2606, 0.2554]
    assert scores["wikitext"][-1] == 322.9455
    assert len(scores) == 13
    with pytest.raises(RequestError, match=r"choose from Llama-3\.2-1B"):
        paper_study("Llama-3.2-8B")


def test_gains_of_base_models_on_ifeval_stay_inside_what_contentless_text_gets(
    baselines_of_the_paper: dict[str, dict[str, Score]],
) -> None:
    for model in ("Llama-3.2-1B", "Llama-3.2-3B"):
        made = paper_study(model, baselines_of_the_paper)
        rows = [row for row in analyse(made).rows if row.benchmark == "ifeval"]
        best = next(b for b in made.benchmarks if b.name == "ifeval").best_baseline
        assert best is not None
        errors = [row.measured.stderr or 0 for row in rows]
        zs = [
            (row.measured.value - rows[0].measured.value) / (errors[0] ** 2 + error**2) ** 0.5
            for row, error in zip(rows[1:], errors[1:], strict=True)
        ]
        assert all(1.2 < z < 3.8 for z in zs), zs
        assert all(row.measured.value < best[1].value for row in rows)
        assert {row.relation for row in rows} == {"at"}
        assert "ifeval" in analyse(made).groups["ppm"]["at the baseline"]


def test_the_instruct_model_falls_to_the_baseline_on_ifeval(
    baselines_of_the_paper: dict[str, dict[str, Score]],
) -> None:
    made = paper_study("Llama-3.2-1B-Instruct", baselines_of_the_paper)
    assert verdicts(analyse(made), "ifeval") == ["above the baseline"] + ["at the baseline: fallen to it"] * 3


def test_the_correlation_of_3b_is_of_two_scores_that_approach_chance(
    baselines_of_the_paper: dict[str, dict[str, Score]],
) -> None:
    made = paper_study("Llama-3.2-3B", baselines_of_the_paper)
    found = analyse(made)
    assert verdicts(found, "mmlu")[0] == "above the baseline"
    assert verdicts(found, "mmlu")[-1] == "at the baseline: fallen to it"
    assert verdicts(found, "truthfulqa_mc2")[0] == "below the baseline"
    assert verdicts(found, "truthfulqa_mc2")[-1].startswith("at the baseline")
    sentences = " ".join(summary(made, found))
    assert "r = -0.864" in sentences
    assert "two scores that approach chance" in sentences
    assert (
        "IFEval is significantly better than dense at 40 % and 50 % (0.1645 and 0.1627), but not above its "
        "no-knowledge baseline" in sentences
    )


def test_above_is_above_every_no_knowledge_baseline() -> None:
    """The best of several on the same items may owe it to them; the second may be as hard to tell from the model."""
    points = POINTS[:1]
    keys = tuple(("task", i) for i in range(40))
    model = np.zeros(40)
    model[:20] = 1
    lucky, other = np.zeros(40), np.zeros(40)
    lucky[:11], other[30:40] = 1, 1  # 11 right with the model, 10 where it is wrong
    baselines = {name: Score.of(Outcomes(keys, one)) for name, one in (("lucky", lucky), ("other", other))}
    benchmark = StudiedBenchmark(
        "b", "B", "acc,none", True, False, {points[0]: Score.of(Outcomes(keys, model))}, baselines
    )
    (row,) = analyse(Study("m", points, [benchmark])).rows
    assert row.from_baseline is not None
    assert row.from_baseline.p_value < 0.05
    assert row.p_above is not None
    assert row.p_above > 0.05
    assert row.relation == "at"


def test_without_baselines_nothing_is_above_them() -> None:
    made = study()
    bare = dataclasses.replace(made, benchmarks=[dataclasses.replace(one, baselines={}) for one in made.benchmarks])
    found = analyse(bare)
    assert {row.relation for row in found.rows} == {None}
    assert found.groups["ppm"]["improving"] == found.groups["ppm"]["no difference found"] == []
    assert "mmlu" in found.groups["ppm"]["fragile"]
    assert not any("baseline" in sentence for sentence in summary(bare, found))
