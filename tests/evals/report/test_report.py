"""The report of a study: every number in it, and a page that opens offline."""

import csv
import dataclasses
import itertools
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import commands
import pytest
from synthetic_studies import ITEMS, POINTS, benchmark, study

from evals.cli.study import print_study
from evals.report.__main__ import main
from evals.report.figures import study_figures
from evals.report.files import write_report
from evals.report.words import summary
from evals.study.analysis import analyse
from evals.study.significance import items_needed
from evals.study.study import Score, Study, Variant

FIGURES = {"dichotomy", "fragile_robust", "perplexity", "knowledge_truthfulness", "kept", "paper"}
VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Elements that are not closed, ids, and what is linked to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.sources: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        self.ids += [found["id"] or ""] if "id" in found else []
        self.links += [found["href"] or ""] if "href" in found else []
        self.sources += [found["src"] or ""] if "src" in found else []

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data


@pytest.fixture(scope="module")
def made() -> Study:
    return study()


@pytest.fixture(scope="module")
def folder(made: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_report(made, folder)
    return folder


def test_the_page_is_whole_small_and_needs_nothing_else(folder: Path, made: Study) -> None:
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert len(text.encode()) < 3e6
    page = Page(text)
    assert page.open == []
    assert len(set(page.ids)) == len(page.ids)
    inside = [link[1:] for link in page.links if link.startswith("#")]
    assert inside
    assert set(inside) <= set(page.ids)
    assert page.sources == []
    assert {link for link in page.links if not link.startswith("#")} == {"https://arxiv.org/abs/2512.22671"}
    assert made.model in page.text  # escaped: it has a tag in its name
    for one in made.benchmarks:
        assert one.title in page.text
    assert "at the baseline: fallen to it" in page.text


def test_every_figure_is_there_three_times(folder: Path) -> None:
    drawn = {path.name for path in (folder / "figures").iterdir()}
    assert drawn == {f"{name}.{ending}" for name in FIGURES for ending in ("png", "svg")}
    for path in (folder / "figures").iterdir():
        start = path.read_bytes()[:100]
        assert start.startswith(b"\x89PNG") if path.suffix == ".png" else b"<svg" in start
    text = (folder / "report.html").read_text(encoding="utf-8")
    found = re.search(r"const specs = (\{.*?\});\n", text, re.DOTALL)
    assert found is not None
    specs = json.loads(found[1])
    assert set(specs) == FIGURES
    (rows,) = specs["dichotomy"]["datasets"].values()
    assert {(row["benchmark"], row["level"]) for row in rows} >= {("MMLU", point.level) for point in POINTS}
    last = next(row for row in rows if (row["benchmark"], row["level"]) == ("MMLU", "60 %"))
    assert last["relative"] == pytest.approx(100 * 0.26 / 0.6)
    assert (last["baseline_low"], last["baseline_high"]) == pytest.approx((100 * 0.25 / 0.6, 100 * 0.28 / 0.6))
    assert last["low"] < last["relative"] < last["high"]
    pages = next(row for row in rows if (row["benchmark"], row["level"]) == ("WikiText-2", "20 %"))
    assert pages["low"] <= pages["relative"] <= pages["high"]  # of perplexities all three are shares, not nats
    assert pages["relative"] == pytest.approx(100 * math.exp(2.5 - 3.0), rel=1e-6)


def test_what_the_dense_model_cannot_do_at_all_is_drawn_too() -> None:
    points = POINTS[:3]
    one = benchmark("ifeval", [0.0, 0.1, 0.05], {"nothing": 0.0, "the prompt": 0.1}, points=points)
    made = Study("m", points, [one], {}, {})
    figures = {figure.name: figure for figure in study_figures(made, analyse(made))}
    assert "nothing right in IFEVAL: there 100 % is one right item" in figures["dichotomy"].caption
    (rows,) = figures["dichotomy"].spec["datasets"].values()
    assert [row["relative"] for row in rows] == pytest.approx([0, 10 * ITEMS, 5 * ITEMS])
    assert all(row["low"] is None or 0 <= row["low"] <= row["relative"] <= row["high"] for row in rows)
    assert "fragile_robust" not in figures  # one panel of all benchmarks: nothing is a share of zero


def test_the_page_stays_small_however_many_models_there_are(made: Study) -> None:
    points = [made.points[0], *(Variant("ppm", f"{i} %", i / 100, 4 - i / 25) for i in range(1, 13))]
    kept = {f"ppm, {i} %": [[i / 100] * 64] * 32 for i in range(1, 13)}
    many = dataclasses.replace(
        made, points=points, benchmarks=[benchmark("a", [0.5] * 13, {}, points=points)], kept=kept
    )
    (figure,) = [figure for figure in study_figures(many, analyse(many)) if figure.name == "kept"]
    (cells,) = figure.spec["datasets"].values()
    assert len(cells) == 12 * 32 * 16
    assert {(cell["model"], cell["kept"]) for cell in cells} == {(f"ppm, {i} %", i / 100) for i in range(1, 13)}
    assert max(cell["next"] for cell in cells) == 100


def test_tables_are_the_analysis(folder: Path, made: Study) -> None:
    with (folder / "tables" / "changes.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = analyse(made)
    assert len(rows) == len(found.rows)
    for shown, row in zip(rows, found.rows, strict=True):
        assert float(shown["value"]) == row.measured.value
        assert shown["verdict"] == row.verdict
        if row.from_dense is not None:
            assert float(shown["difference from dense"]) == row.from_dense.difference
            assert float(shown["p, corrected"]) == row.p_from_dense
    with (folder / "tables" / "scores.csv").open() as file:
        scores = {row["benchmark"]: row["dense"].split(" ± ") for row in csv.DictReader(file)}
    assert float(scores["MMLU"][1]) == pytest.approx((0.6 * 0.4 / 399) ** 0.5, abs=1e-4)
    perplexity = made.benchmarks[-1].measured[made.dense]  # its error is relative, for it is that of the logarithm
    assert float(scores["WikiText-2"][1]) == pytest.approx((perplexity.stderr or 0) * perplexity.value, abs=1e-4)
    names = {path.name for path in (folder / "tables").iterdir()}
    stems = {"scores", "changes", "trends", "baselines", "groups", "correlations", "texts"}
    assert names == {f"{stem}.csv" for stem in stems}


def test_the_document_has_everything_but_items(folder: Path, made: Study) -> None:
    document = json.loads((folder / "study.json").read_text())
    assert document["format"] == "gluprune-study"
    assert [row["verdict"] for row in document["rows"]] == [row.verdict for row in analyse(made).rows]
    assert document["groups"]["ppm"]["no difference found"] == ["steady"]
    assert "outcomes" not in json.dumps(document)
    assert any(
        "MMLU falls to its no-knowledge baseline at 40 % and 60 %" in sentence for sentence in document["summary"]
    )


def test_a_report_of_published_values_without_perplexities_baselines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evals.study.baselines.baselines", lambda *_, **__: [])
    monkeypatch.setattr("evals.harness.run.load_benchmarks", lambda *_, **__: [])
    status, out, err = commands.run(main, capsys, "--published", "Llama-3.2-3B", "--output", tmp_path / "report")
    assert status == 0, err
    assert "r = -0.864" in out
    with (tmp_path / "report" / "tables" / "scores.csv").open() as file:
        rows = {row["benchmark"]: row for row in csv.DictReader(file)}
    assert rows["MMLU"]["ppm, 60 %"].startswith("0.2589 ±")
    assert rows["WikiText-2"]["dense"] == "9.2628"


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv, message in (
        ([], "give the folder of a study, or --published MODEL"),
        ([tmp_path], "has no sweep.json"),
        (["--published", "Llama-3.2-1B"], "give --output DIR"),
        ([tmp_path, "--published", "Llama-3.2-1B"], "give the folder of a study, or --published MODEL"),
    ):
        status, out, err = commands.run(main, capsys, *argv)
        assert (status, out) == (2, ""), err
        assert message in err
    for text, message in (
        ("{", "sweep.json is damaged"),
        ('{"format": "gluprune-sweep", "version": 1, "rows": [{}]}', "is damaged: row 1.method is missing"),
    ):
        (tmp_path / "sweep.json").write_text(text)
        status, _, err = commands.run(main, capsys, tmp_path)
        assert status == 1
        assert message in err


def test_what_an_older_study_left_goes(made: Study, tmp_path: Path) -> None:
    write_report(made, tmp_path)
    (tmp_path / "figures" / "mine.png").write_bytes(b"mine")
    few = dataclasses.replace(made, benchmarks=made.benchmarks[:2])
    write_report(few, tmp_path)
    assert not (tmp_path / "figures" / "knowledge_truthfulness.png").exists()
    assert not (tmp_path / "tables" / "correlations.csv").exists()
    assert (tmp_path / "figures" / "mine.png").exists()


def test_names_and_numbers_that_would_break_a_page(made: Study, tmp_path: Path) -> None:
    nasty = "</script><!--<script>"
    first = dataclasses.replace(made.benchmarks[0], title=nasty)
    endless = dataclasses.replace(
        made.benchmarks[-1],
        measured={
            point: dataclasses.replace(one, value=float("inf")) for point, one in made.benchmarks[-1].measured.items()
        },
    )
    write_report(dataclasses.replace(made, benchmarks=[first, endless]), tmp_path)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.open == []
    assert nasty in page.text
    document = json.loads((tmp_path / "study.json").read_text(), parse_constant=pytest.fail)
    assert document["rows"][-1]["measured"]["value"] is None


def efficiency_row(level: int, **measured: object) -> dict[str, object]:
    second = {"median": 0.002, "low": 0.002, "high": 0.003}
    about = {"level": f"{level} %", "removed": level / 100, "aligned": False, "width": 96}
    return {
        **about,
        **{"workload": "questions", "batch": 1},
        **{"time_to_first_token": second, "time_per_output_token": second, "latency": second},
        **{"prefill_tokens_per_second": 700.0, "decode_tokens_per_second": 500.0, "memory_bytes": 4e6},
        **{"flops_per_token": 1e6, "bytes_per_token": 2e6, "energy_per_token": 0.5, "net_energy_per_token": 0.25},
        **measured,
    }


def marks_of(study: Study, rows: list[dict[str, object]], folder: Path) -> list[dict[str, Any]]:
    """What the figure of quality against speed shows."""
    about = {"definitions": {"latency": "all of it"}, "energy": {}, "devices": "1 x cpu", "dtype": "float32"}
    write_report(dataclasses.replace(study, efficiency=about | {"rows": rows}), folder)
    found = re.search(r"const specs = (\{.*?\});\n", (folder / "report.html").read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    marks: list[dict[str, Any]]
    (marks,) = json.loads(found[1])["quality_speed"]["datasets"].values()
    return marks


def test_speeds_are_shown_and_those_that_noise_hid_left_out(made: Study, tmp_path: Path) -> None:
    names = ("time_to_first_token", "time_per_output_token", "decode_tokens_per_second", "memory_bytes")
    hidden = dict.fromkeys([*names, "energy_per_token", "net_energy_per_token"])
    marks = marks_of(made, [efficiency_row(10), efficiency_row(20, **hidden)], tmp_path)
    with (tmp_path / "tables" / "efficiency.csv").open() as file:
        measured, left_out = csv.DictReader(file)
    assert float(measured["time per output token, ms"]) == pytest.approx(2.0)
    assert float(measured["decode tokens/s"]) == pytest.approx(500.0)
    assert float(left_out["latency, ms"]) == pytest.approx(2.0)
    assert left_out["time per output token, ms"] == left_out["decode tokens/s"] == left_out["J per token"] == ""
    assert {(mark["level"], mark["cost"]): mark["value"] for mark in marks} == {
        ("10 %", "decode tokens/s"): 500.0,
        ("10 %", "J per token"): 0.5,
    }


def test_the_pareto_front_is_what_no_other_model_beats(made: Study, tmp_path: Path) -> None:
    measured = {10: (400.0, 0.5), 20: (500.0, 0.6), 40: (450.0, 0.4)}
    rows = [
        efficiency_row(level, decode_tokens_per_second=rate, energy_per_token=energy)
        for level, (rate, energy) in measured.items()
    ]
    marks = marks_of(made, rows, tmp_path)
    left = {mark["level"]: mark["left"] for mark in marks}
    assert left["10 %"] > left["20 %"] > left["40 %"]
    assert {(mark["level"], mark["cost"]) for mark in marks if mark["front"]} == {
        ("10 %", "decode tokens/s"),
        ("20 %", "decode tokens/s"),
        ("10 %", "J per token"),
        ("40 %", "J per token"),
    }


@pytest.mark.parametrize("columns", [200, 72])
def test_tables_fit_the_terminal(
    made: Study, columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    print_study(made, as_json=False)
    lines = [line for line in capsys.readouterr().out.splitlines() if line and line[0] in "┏┃┡│└"]
    assert max(map(len, lines)) <= columns
    heads = [line for line in lines if line.startswith("┃ benchmark")]
    assert len(heads) == (1 if columns == 200 else 2)
    for point in made.points[1:]:
        assert sum(f" {point.level} " in head for head in heads) == 1
    for one in made.benchmarks:
        assert sum(line.startswith(f"│ {one.title} ") for line in lines) == len(heads)


def test_a_dense_model_alone_has_a_report(made: Study, tmp_path: Path) -> None:
    benchmarks = [dataclasses.replace(one, measured={made.dense: one.measured[made.dense]}) for one in made.benchmarks]
    write_report(dataclasses.replace(made, points=made.points[:1], benchmarks=benchmarks, kept={}), tmp_path)
    assert not list((tmp_path / "figures").glob("*"))
    assert (tmp_path / "tables" / "scores.csv").exists()


def test_what_was_measured_is_told_in_words(made: Study, tmp_path: Path) -> None:
    about = {"shots": {"mmlu": "5", "piqa": "0"}, "data_dir": None, "slice": True, "calibration": {"texts": ["a.txt"]}}
    write_report(dataclasses.replace(made, about=about), tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<dt>few-shot examples</dt><dd>mmlu: 5; piqa: 0</dd>" in text
    assert "<dt>sliced, not masked</dt><dd>yes</dd>" in text
    assert "<dt>calibration</dt><dd>texts: a.txt</dd>" in text
    assert "benchmark data" not in text  # it is not known


def test_the_lines_of_one_panel_have_names_that_do_not_overlap(made: Study) -> None:
    (figure,) = [one for one in study_figures(made, analyse(made)) if one.name == "fragile_robust"]
    (rows,) = figure.spec["datasets"].values()
    labels = {row["benchmark"]: row["label_at"] for row in rows if row["label_at"] is not None}
    assert set(labels) == {one.title for one in made.benchmarks}
    values = [row["relative"] for row in rows]
    places = sorted(labels.values())
    gap = (max(values) - min(values)) * 11 / 300  # a line of text in a panel of 300 pixels
    assert all(high - low >= gap - 1e-9 for low, high in itertools.pairwise(places))
    assert max(places) <= max(values)


def test_figures_for_pages_have_no_background_and_those_for_print_do(folder: Path) -> None:
    for path in (folder / "figures").glob("*.svg"):
        svg = path.read_text(encoding="utf-8")
        assert 'fill="white"' not in svg, path
        assert not re.search(r'<text[^>]*fill="(#000|black|white)"', svg), path


def test_too_few_items_to_tell_say_how_many_to_use(made: Study) -> None:
    def first(measured: Score) -> Score:
        assert measured.outcomes is not None
        keys, values = measured.outcomes.keys[:10], measured.outcomes.values[:10]
        return Score.of(dataclasses.replace(measured.outcomes, keys=keys, values=values))

    steady = next(one for one in made.benchmarks if one.name == "steady")
    few = dataclasses.replace(
        steady,
        measured={point: first(one) for point, one in steady.measured.items()},
        baselines={name: first(one) for name, one in steady.baselines.items()},
    )
    small = dataclasses.replace(made, benchmarks=[few])
    found = analyse(small)
    pruned = found.rows[-1]
    assert pruned.items_needed == items_needed([1] * 10, [1] * 10, level=0.05 / 4)
    assert pruned.verdict == "at the baseline: too few items to tell from dense: use 750"
    told, of_dense, *_ = summary(small, found)
    assert told.startswith("Too few items to tell the pruned models from the dense one: use 750 of STEADY (now 10)")
    assert of_dense.startswith("Too few items to tell the dense model from its no-knowledge baselines: use ")
    whole = analyse(dataclasses.replace(made, benchmarks=[steady]))
    assert not any("too few" in row.verdict for row in whole.rows)  # 400 items on which all agree


def test_a_report_of_before_leaves_no_latex(made: Study, tmp_path: Path) -> None:
    (tmp_path / "tables").mkdir()
    for name in ("scores.tex", "floors.csv", "thesis.tex"):
        (tmp_path / "tables" / name).write_text("old")
    write_report(dataclasses.replace(made, benchmarks=made.benchmarks[:1]), tmp_path)
    left = {path.name for path in (tmp_path / "tables").iterdir()}
    assert "thesis.tex" in left
    assert not {"scores.tex", "floors.csv"} & left
