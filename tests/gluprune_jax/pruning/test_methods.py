"""Pruning with calibration text: the options of `python -m gluprune_jax.prune`, what they give and what they refuse."""

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import commands
import numpy as np
import pytest
from byte_tokenizer import VOCABULARY, write_tokenizer
from calibrated import with_down_projections
from calibration_text import TEXT, windows_of
from inspecting import tensors
from tiny_models import hf_config, hf_tensors, write_folder

import convert
from convert.calibration_text import spread
from convert.tokenizer import encode_documents, load_tokenizer, separator
from gluprune_jax import PruningPlan
from gluprune_jax.data import documents
from gluprune_jax.data.packing import pack
from gluprune_jax.errors import OperationError, RequestError
from gluprune_jax.prune import main
from gluprune_jax.pruning.calibration import collect, gram_matrices
from gluprune_jax.pruning.chooser import Chooser
from gluprune_jax.pruning.least_squares import compensate
from gluprune_jax.pruning.methods import Method
from gluprune_jax.pruning.plan import make_plan
from gluprune_jax.pruning.scores import score
from gluprune_jax.pruning.statistics import Statistics

Capture = pytest.CaptureFixture[str]
CONFIG = hf_config(vocab_size=VOCABULARY, eos_token_id=VOCABULARY - 1, intermediate_size=83, max_position_embeddings=64)
DATA_DRIVEN = ("hybrid", "activation", "wanda", "taylor")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a text, and a folder of texts."""
    folder = tmp_path_factory.mktemp("methods")
    write_tokenizer(write_folder(folder / "model", CONFIG, hf_tensors(CONFIG)))
    (folder / "text.txt").write_text(TEXT)
    (folder / "texts" / "deep").mkdir(parents=True)
    (folder / "texts" / "a.md").write_text("One text.\n" * 20)
    (folder / "texts" / "deep" / "b.jsonl").write_text('{"text": "Another text."}\n{"page": "And a page."}\n')
    (folder / "texts" / "notes.pdf").write_bytes(b"\xff\xfe is not looked at")
    return folder


@pytest.fixture
def argv(folder: Path, tmp_path: Path) -> list[object]:
    calibration = ("--calibration-data", folder / "text.txt", "--calibration-tokens", 640, "--sequence-length", 32)
    return ["--model", folder / "model", *calibration, "--output", tmp_path / "out"]


run = functools.partial(commands.run, main)
report = functools.partial(commands.report, main)


# --------------------------------------------------------------------------------------------------- what it does


@pytest.mark.parametrize("criterion", DATA_DRIVEN)
def test_data_driven_criteria_go_from_text_to_files(
    folder: Path, argv: list[object], tmp_path: Path, capsys: Capture, criterion: str
) -> None:
    done = report(capsys, *argv, "--prune-percent", 40, "--criterion", criterion)
    checkpoint, windows = windows_of(folder)
    statistics = collect(checkpoint.model, windows, sensitivity=criterion == "taylor")
    expected = make_plan(score(checkpoint.model, criterion, statistics=statistics), prune_percent=40)
    plan = PruningPlan.load(tmp_path / "out" / "gluprune_plan.json")
    assert [kept.tolist() for kept in plan.kept] == [kept.tolist() for kept in expected.kept]
    calibration = done["plan"]["calibration"]
    assert calibration == {**statistics.texts, "texts": [str(folder / "text.txt")]}
    assert (calibration["tokens"], calibration["window"]) == (640, 32)
    written, wanted = tensors(convert.load(tmp_path / "out")), tensors(checkpoint.pruned(expected))
    assert all(written[name].tobytes() == wanted[name].tobytes() for name in wanted)


def test_statistics_are_collected_once_and_used_again(
    folder: Path, argv: list[object], tmp_path: Path, capsys: Capture
) -> None:
    saved = tmp_path / "statistics.npz"
    first = report(capsys, *argv, "--prune-percent", 40, "--criterion", "taylor", "--statistics-out", saved)
    again = ["--model", folder / "model", "--statistics", saved]
    second = report(capsys, *again, "--prune-percent", 40, "--criterion", "taylor", "--output", tmp_path / "again")
    assert second["plan"] == first["plan"]
    plans = [(tmp_path / name / "gluprune_plan.json").read_text() for name in ("out", "again")]
    assert plans[0] == plans[1]
    for criterion in DATA_DRIVEN:  # from file to file, for the model need not run
        report(capsys, *again, "--width", 20, "--criterion", criterion, "--stream", "--dry-run")
    assert Statistics.load(saved).texts["tokens"] == 640
    # What they lack can be added to them.
    fewer = tmp_path / "fewer.npz"
    report(capsys, *argv, "--width", 20, "--criterion", "hybrid", "--statistics-out", fewer, "--overwrite")
    taylor = ("--statistics", fewer, "--prune-percent", 40, "--criterion", "taylor", "--overwrite")
    status, _, err = run(capsys, "--model", folder / "model", *taylor, "--output", tmp_path / "out")
    assert status == 2
    assert (
        "which these statistics lack; collect them with --criterion taylor, or give --calibration-data TEXT too" in err
    )
    assert report(capsys, *argv, *taylor)["plan"] == first["plan"]


@pytest.mark.parametrize("criterion", ["ppm", "hybrid", "random"])
def test_least_squares_is_that_of_the_library(
    folder: Path, argv: list[object], tmp_path: Path, capsys: Capture, criterion: str
) -> None:
    done = report(capsys, *argv, "--prune-percent", 40, "--criterion", criterion, "--compensate", "least-squares")
    checkpoint, windows = windows_of(folder)
    plan = PruningPlan.load(tmp_path / "out" / "gluprune_plan.json")
    (found,) = compensate(checkpoint.model, gram_matrices(checkpoint.model, windows), [plan])
    repaired = with_down_projections(checkpoint.model, found.down_projs)
    wanted = tensors(checkpoint.with_model(repaired).pruned(plan))
    written = convert.load(tmp_path / "out")
    for name, array in tensors(written).items():  # on eight devices, sums have another order
        np.testing.assert_allclose(array, wanted[name], rtol=2e-3, atol=2e-4)
    assert done["compensation"]["output_error"] == pytest.approx(found.summary()["output_error"], rel=1e-3)
    assert written.history[-1]["compensation"] == done["compensation"]
    assert "least-squares" in (tmp_path / "out" / "README.md").read_text()


def test_statistics_and_gram_matrices_come_from_one_pass(
    folder: Path, argv: list[object], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, windows = windows_of(folder)
    method, target = Method("hybrid", is_compensated=True), {"prune_percent": 40}

    def down_projs(*, refits: bool) -> list[Any]:
        chooser = Chooser(checkpoint.model, checkpoint.mlp_weights, windows=windows, refits=refits)
        (pruned,) = chooser.choose(method, [target])
        assert pruned.compensation is not None
        return [np.asarray(down) for down in pruned.compensation.down_projs]

    in_two = down_projs(refits=False)
    monkeypatch.setattr(
        "gluprune_jax.pruning.chooser.gram_matrices", lambda *_: pytest.fail("a second pass over the text")
    )
    for one, two in zip(down_projs(refits=True), in_two, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)
    report(capsys, *argv, "--prune-percent", 40, "--criterion", "hybrid", "--compensate", "least-squares")


def test_a_plan_is_replayed_with_compensation(
    folder: Path, argv: list[object], tmp_path: Path, capsys: Capture
) -> None:
    least_squares = ("--compensate", "least-squares")
    report(capsys, *argv, "--prune-percent", 40, *least_squares)
    plan = tmp_path / "out" / "gluprune_plan.json"
    report(capsys, *argv[:-1], tmp_path / "again", "--plan", plan, *least_squares)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("allocation", ["global", "measured"])
@pytest.mark.parametrize("extra", [(), ("--compensate", "least-squares"), ("--sequential",)], ids=str)
def test_one_budget_over_all_layers(
    argv: list[object], tmp_path: Path, capsys: Capture, allocation: str, extra: tuple[str, ...]
) -> None:
    options = ("--criterion", "hybrid", "--allocation", allocation, "--min-keep", 0.3, *extra)
    done = report(capsys, *argv, "--prune-percent", 40, *options)
    widths = done["after"]["intermediate_sizes"]
    uniform = 83 - int(0.4 * 83)
    assert 3 * uniform - 3 <= sum(widths) <= 3 * uniform
    assert min(widths) >= 0.3 * 83
    assert done["plan"]["request"]["allocation"]["method"] == allocation
    assert list(convert.load(tmp_path / "out").config.intermediate_sizes) == widths
    assert json.loads((tmp_path / "out" / "config.json").read_text())["intermediate_size"] == max(widths)
    costs = done["plan"]["request"]["allocation"].get("costs")
    assert (costs is None) == (allocation == "global")


def test_layers_that_are_not_named_stay_whole_and_out_of_the_budget(
    argv: list[object], capsys: Capture, tmp_path: Path
) -> None:
    options = ("--criterion", "wanda", "--allocation", "global", "--layers", "0,2", "--multiple-of", 4)
    widths = report(capsys, *argv, "--prune-percent", 40, *options)["after"]["intermediate_sizes"]
    assert widths[1] == 83
    assert widths[0] + widths[2] <= 2 * (83 - 33)
    assert all(width % 4 == 0 for width in (widths[0], widths[2]))


@pytest.mark.parametrize("width", [(), ("--width", 30)])
def test_the_layers_of_least_influence_are_dropped(
    folder: Path, argv: list[object], tmp_path: Path, capsys: Capture, width: tuple[object, ...]
) -> None:
    done = report(capsys, *argv, *width, "--drop-least", 2)
    checkpoint, windows = windows_of(folder)
    influences = [layer.influence for layer in collect(checkpoint.model, windows).layers]
    kept = int(np.argmax(influences))
    assert done["plan"]["dropped_layers"] == [i for i in range(3) if i != kept]
    written = tensors(convert.load(tmp_path / "out"))
    theirs = tensors(checkpoint)[f"model.layers.{kept}.self_attn.q_proj.weight"]
    assert np.array_equal(written["model.layers.0.self_attn.q_proj.weight"], theirs)
    assert done["after"]["intermediate_sizes"] == [30 if width else 83]


def test_in_order_is_recorded(argv: list[object], tmp_path: Path, capsys: Capture) -> None:
    options = ("--criterion", "hybrid", "--compensate", "least-squares", "--sequential")
    done = report(capsys, *argv, "--prune-percent", 40, *options)
    assert done["compensation"]["in_order"] is True
    assert done["plan"]["request"]["in_order"] is True
    errors = zip(done["compensation"]["output_error"], done["compensation"]["output_error_without"], strict=True)
    assert all(0 <= after <= before for after, before in errors)


def test_a_refit_that_is_cross_validated(folder: Path, argv: list[object], capsys: Capture) -> None:
    """By the command, in one word and layer by layer; the record says of each layer how strong the refit is."""
    options = ("--criterion", "entropy", "--compensate", "cv-least-squares", "--prune-percent", 40)
    done = report(capsys, *argv, *options)["compensation"]
    assert done["method"] == "cross-validated least-squares"
    assert len(done["strength"]) == len(done["dampings"])
    pairs = zip(done["held_out_error"], done["held_out_error_without"], strict=True)
    assert all(after <= before for after, before in pairs)
    done = report(capsys, *argv, *options, "--sequential", "--overwrite")["compensation"]
    assert done["in_order"] is True
    assert done["folds"] == 3


def test_a_criterion_finds_that_its_statistics_lack_a_sensitivity(folder: Path) -> None:
    checkpoint, windows = windows_of(folder)
    statistics = collect(checkpoint.model, windows, sensitivity=True)
    chooser = Chooser(checkpoint.model, checkpoint.mlp_weights, statistics=statistics)
    with pytest.raises(RequestError, match="'entropy' looks at the entropy sensitivity, which these statistics"):
        chooser.scores("entropy")


def test_the_seed_of_random_neurons(argv: list[object], capsys: Capture, folder: Path) -> None:
    model = ("--model", folder / "model", "--width", 30, "--criterion", "random", "--dry-run")
    plans = [report(capsys, *model, "--seed", seed)["plan"] for seed in (0, 0, 1)]
    assert plans[0] == plans[1]
    assert "calibration" not in plans[0]


def test_folders_and_json_lines_are_texts(folder: Path, argv: list[object], capsys: Capture) -> None:
    options = ("--calibration-tokens", 128, "--sequence-length", 32, "--criterion", "wanda", "--dry-run")
    done = report(
        capsys, "--model", folder / "model", "--calibration-data", folder / "texts", *options, "--prune-percent", 40
    )
    checkpoint = convert.load(folder / "model")
    tokenizer = load_tokenizer(checkpoint)
    texts = ["One text.\n" * 20, "Another text.", "And a page."]
    windows = pack(
        encode_documents(tokenizer, [documents.Document(text, "text", "") for text in texts]),
        32,
        separator(checkpoint, tokenizer),
    )
    windows = windows[spread(len(windows), 4)]
    assert done["plan"]["calibration"]["digest"] == collect(checkpoint.model, windows).texts["digest"]


def test_a_data_set_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[Any] = []

    def load_dataset(*names: Any, **options: Any) -> list[dict[str, Any]]:
        asked.append((*names, options))
        return [{"text": "one"}, {"messages": [{"role": "user", "content": "two"}]}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = documents.read_documents(["hub:someone/corpus/small@validation"], "`calibration`")
    assert [document.content for document in found] == ["one", [{"role": "user", "content": "two"}]]
    assert found[1].where == "hub:someone/corpus/small@validation, row 1"
    assert asked == [("someone/corpus", "small", {"split": "validation", "streaming": True})]
    documents.read_documents(["hub:someone/corpus"], "`calibration`")
    assert asked[1] == ("someone/corpus", None, {"split": "train", "streaming": True})
    with pytest.raises(RequestError, match="is no hub data set; write hub:OWNER/NAME"):
        documents.read_documents(["hub:corpus"], "`calibration`")

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(OperationError, match=r"the data set hub:a/b cannot be read: no route$"):
        documents.read_documents(["hub:a/b"], "`calibration`")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: [{"sentence": "x"}])
    with pytest.raises(RequestError, match=r'hub:a/b, row 0, is .* it must hold "text", a string, or "messages"'):
        documents.read_documents(["hub:a/b"], "`calibration`")


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("ppm", Method("ppm")),
        ("hybrid+least-squares", Method("hybrid", is_compensated=True)),
        ("hybrid+ls", Method("hybrid", is_compensated=True)),
        ("wanda+global+ls+sequential", Method("wanda", "global", is_compensated=True, sequential=True)),
        ("taylor+measured", Method("taylor", "measured")),
        ("wanda+cv-least-squares", Method("wanda", is_compensated=True, cross_validates=True)),
        ("entropy+cv-ls+sequential", Method("entropy", "uniform", 0.2, True, True, 0, True)),
    ],
)
def test_methods_in_one_word(text: str, method: Method) -> None:
    assert Method.parse(text) == method
    assert Method.parse(str(method)) == method


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("best", "unknown criterion 'best'"),
        ("ppm+more", "method 'ppm\\+more' has 'more'; behind the criterion may come global, measured, least-squares"),
        ("ppm+global+measured", "two allocations"),
        ("ppm+cv-ls+ls", "has cv-least-squares and least-squares; give one"),
    ],
)
def test_words_that_are_no_method(text: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Method.parse(text)


def test_texts_that_are_not_measured_are_not_named(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    texts = [tmp_path / name for name in ("a.txt", "b.txt", "c.txt")]
    for text in texts:
        text.write_text("word " * 30)
    argv = ["--model", folder / "model", "--width", 20, "--output", tmp_path / "out", "--sequence-length", 16, "--json"]
    status, out, err = run(capsys, *argv, "--eval-data", *texts, "--eval-tokens", 200)
    assert status == 0, err
    definition = json.loads(out)["evaluation"]["definition"]
    assert (str(texts[1]) in definition, str(texts[2]) in definition) == (True, False)
    assert f"note: {texts[2]} is not used: the texts before it have the 200 tokens" in err


def test_evaluating_needs_no_output(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    before = sorted(tmp_path.rglob("*"))
    argv = ["--model", folder / "model", "--width", 20, "--eval-data", folder / "text.txt", "--sequence-length", 16]
    done = report(capsys, *argv, "--eval-tokens", 200)
    assert list(done["evaluation"]["perplexity"]) == ["dense", "pruned"]
    assert "output" not in done
    assert sorted(tmp_path.rglob("*")) == before


# ------------------------------------------------------------------------------------------------------- bad input


def test_refusals(folder: Path, argv: list[object], tmp_path: Path, capsys: Capture) -> None:
    weights = ["--model", folder / "model", "--output", tmp_path / "out", "--width", 20]
    text = [*argv, "--width", 20]
    data = tmp_path / "data"
    data.mkdir()
    (data / "empty.txt").write_text("")
    (data / "short.txt").write_text("abc")
    (data / "bad.jsonl").write_text('{"sentence": "x"}\n')
    (data / "chat.jsonl").write_text('{"messages": [{"role": "user", "content": "x"}]}\n')
    (data / "half.jsonl").write_text('{"text": "a\\ud800b"}\n')
    (data / "deep.jsonl").write_text("[" * 200_000)
    (tmp_path / "none").mkdir()
    small = ("--sequence-length", 32, "--criterion", "wanda")
    cases: list[tuple[list[object], str]] = [
        ([*weights, "--criterion", "best"], "unknown criterion 'best'; known are ppm, vow, pon, l2, random, hybrid"),
        (
            [*weights, "--criterion", "hybrid", "--stream"],
            "criterion hybrid needs activations on text; give --calibration-data TEXT or",
        ),
        (
            [*weights[:4], "--plan", "p.json", "--compensate", "least-squares"],
            "refitting by least squares runs the model on calibration text; give --calibration-data TEXT",
        ),
        (
            [*weights, "--criterion", "hybrid", "--statistics", "x.npz", "--compensate", "least-squares"],
            "refitting by least squares runs the model on calibration text; give --calibration-data TEXT",
        ),
        ([*weights, "--allocation", "measured", "--stream"], " runs the model on calibration text"),
        ([*text, "--sequential"], "layer by layer, ppm chooses the same neurons as at once; add least squares"),
        ([*text, "--criterion", "taylor", "--sequential"], "layer by layer, taylor chooses the same neurons"),
        ([*weights, "--min-keep", "0.5"], "--min-keep 0.5 has no effect without an allocation"),
        (
            [*weights, "--statistics", "x.npz"],
            "--statistics has no effect with --criterion ppm; give a criterion that uses",
        ),
        (
            [*weights[:4], "--plan", "p.json", "--statistics", "x.npz"],
            "--statistics and --statistics-out go with",
        ),
        ([*weights, "--min-keep", "1"], "--min-keep is 1; it must be a share from 0 and below 1"),
        ([*weights, "--statistics-out", "x.npz"], "--statistics-out saves statistics of calibration text"),
        ([*weights, "--criterion", "wanda", "--statistics", data / "none.npz"], "cannot read the statistics"),
        (text, "--calibration-data has no effect with --criterion ppm"),
        (
            [*weights, "--drop-least", "1", "--stream"],
            "--drop-least needs the block influence on text; give --calibration-data TEXT or",
        ),
        (
            [*text, "--criterion", "hybrid", "--statistics-out", folder / "text.txt", "--overwrite"],
            "no statistics file",
        ),
        ([*text, "--criterion", "hybrid", "--statistics-out", folder / "model" / "s.npz"], "lies in the model"),
        ([*text, "--criterion", "hybrid", "--statistics-out", tmp_path / "out" / "s.npz"], "collide"),
        ([*text, "--criterion", "hybrid", "--statistics-out", "x.npz", "--plan-out", "x.npz"], "both name x.npz"),
        ([*weights, "--criterion", "random", "--seed", 1 << 63], "--seed is 9223372036854775808; it must lie between"),
        ([*weights, *small, "--calibration-data", ""], "--calibration-data has an empty name"),
        (
            [*weights, *small, "--calibration-data", data / "half.jsonl"],
            "half.jsonl, line 1, has half of a surrogate pair",
        ),
        ([*weights, *small, "--calibration-data", data / "deep.jsonl"], "deep.jsonl, line 1, is not JSON"),
        ([*weights, *small, "--calibration-data", tmp_path / "none"], "holds no files that end in .txt, .md, .jsonl"),
        ([*text, "--drop-least", "3"], "--drop-least is 3; of 3 layers it must be 1 to 2"),
        ([*text, "--drop-least", "1", "--drop-layers", "0"], "--drop-layers names layers and --drop-least finds them"),
        ([*text, "--drop-layers", "0", "--compensate", "least-squares"], "drop layers first, then prune what comes"),
        ([*text, "--criterion", "hybrid", "--calibration-tokens", "1"], "--calibration-tokens is 1; it must be at lea"),
        ([*text, "--criterion", "hybrid", "--calibration-tokens", "20"], "less than the 32 of one window"),
        (
            [*text, "--criterion", "hybrid", "--stream"],
            "--stream leaves the model in its files, where --calibration-data",
        ),
        (
            [*text, "--criterion", "hybrid", "--sequence-length", "65"],
            "windows of 65 tokens (--sequence-length); the",
        ),
        ([*weights, *small, "--calibration-data", data / "empty.txt"], "--calibration-data"),
        (
            [*weights, *small, "--calibration-data", data / "short.txt"],
            "the text has 3 tokens, fewer than the 32 of one",
        ),
        ([*weights, *small, "--calibration-data", data / "none.txt"], "cannot read the text"),
        (
            [*weights, *small, "--calibration-data", data / "bad.jsonl"],
            "bad.jsonl, line 1, is {'sentence': 'x'}; it must",
        ),
        ([*weights, "--eval-data", data / "chat.jsonl"], "holds conversations; give plain text"),
        (
            [*text, "--criterion", "hybrid", "--allocation", "global", "--min-keep", "0.9"],
            "--min-keep 0.9 keeps at least 225 neurons, and the target leaves 60",
        ),
    ]
    for options, message in cases:
        status, out, err = run(capsys, *options)
        assert (status, out) == (2, ""), (options, err)
        assert message in err, (options, err)
        assert [line[:15] for line in err.splitlines() if not line.startswith("note")] == ["gluprune: error"], err
    assert not (tmp_path / "out").exists()


def test_statistics_of_another_model(folder: Path, argv: list[object], tmp_path: Path, capsys: Capture) -> None:
    saved = tmp_path / "statistics.npz"
    report(capsys, *argv, "--width", 30, "--criterion", "hybrid", "--statistics-out", saved, "--dry-run")
    assert not saved.exists()  # a dry run writes nothing
    report(capsys, *argv, "--width", 30, "--criterion", "hybrid", "--statistics-out", saved)
    other = write_folder(tmp_path / "other", CONFIG, hf_tensors(CONFIG, seed=5))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / "model" / name, other)
    options = ("--width", 30, "--criterion", "hybrid", "--statistics", saved, "--dry-run")
    status, _, err = run(capsys, "--model", other, *options)
    assert (status, err.count("error")) == (2, 1)
    assert "the statistics are of other weights" in err
    saved.write_bytes(saved.read_bytes()[:200])
    status, _, err = run(capsys, "--model", folder / "model", *options)
    assert (status, err.count("\n")) == (1, 1)
    assert "holds no statistics of --statistics-out, or is damaged" in err


BAD_CRITERIA = """
import sys
import jax.numpy as jnp
def fails(gate): raise KeyError("mine")
def leaves(gate): sys.exit(0)
def looks(gate): return gate[:, 0] if gate.max() > 0 else gate[:, 1]
def imaginary(gate): return gate[:, 0] * 1j
def nothing(gate): return gate[:, 0] / 0
def keyword(*, gate): return gate[:, 0]
"""


@pytest.mark.parametrize(
    ("name", "status", "message"),
    [
        ("fails", 1, "failed: KeyError: 'mine'"),
        ("leaves", 1, "failed: SystemExit: 0"),
        ("looks", 1, "failed: TracerBoolConversionError"),
        ("imaginary", 1, "complex64 scores of shape"),
        ("nothing", 1, "83 scores that are not finite numbers"),
        ("keyword", 2, "has the parameter 'gate', which is not a plain one"),
    ],
)
def test_criteria_of_ones_own_that_fail(
    folder: Path,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    status: int,
    message: str,
) -> None:
    (tmp_path / "bad_criteria.py").write_text(BAD_CRITERIA)
    (tmp_path / "leaving.py").write_text("import sys\nsys.exit(0)\n")
    monkeypatch.syspath_prepend(tmp_path)
    argv = ("--model", folder / "model", "--width", 20, "--dry-run", "--criterion")
    found, _, err = run(capsys, *argv, f"bad_criteria:{name}")
    assert (found, message in err, "unexpected" in err) == (status, True, False), err
    found, _, err = run(capsys, *argv, "leaving:f")
    assert (found, "cannot be imported: 0" in err) == (2, True), err


def test_calibration_text_and_statistics_of_another_text(
    folder: Path, argv: list[object], tmp_path: Path, capsys: Capture
) -> None:
    saved = tmp_path / "statistics.npz"
    report(capsys, *argv, "--width", 30, "--criterion", "hybrid", "--statistics-out", saved)
    options = ("--width", 30, "--criterion", "hybrid", "--compensate", "least-squares", "--statistics", saved)
    other = ["--calibration-data", folder / "texts", *argv[4:-1], tmp_path / "other"]
    status, _, err = run(capsys, *argv[:2], *other, *options)
    assert (status, "--statistics are of other text than --calibration-data" in err) == (2, True), err
    report(capsys, *argv[:-1], tmp_path / "same", *options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": [-5, 640, 640]}, "tokens[0] is -5; it must be a whole number from 0"),
        ({"influence": [0.1, float("nan"), 0.1]}, "layer 1 has 640 tokens and an influence of nan"),
        ({"tokens": [], "influence": []}, "is damaged"),
        ({"format": "other"}, "is damaged"),
    ],
)
def test_damaged_statistics(
    folder: Path, argv: list[object], tmp_path: Path, capsys: Capture, change: dict[str, Any], message: str
) -> None:
    saved = tmp_path / "statistics.npz"
    report(capsys, *argv, "--width", 30, "--criterion", "hybrid", "--statistics-out", saved)
    with np.load(saved) as arrays:
        contents = dict(arrays)
    head = json.loads(contents["head"].tobytes()) | change
    del head["sha256"]  # as of a version that wrote none: what it says is looked at all the same
    np.savez(saved, **{**contents, "head": np.frombuffer(json.dumps(head).encode(), np.uint8)})
    options = ("--width", 30, "--criterion", "hybrid", "--statistics", saved, "--dry-run")
    status, _, err = run(capsys, "--model", folder / "model", *options)
    assert (status, message in err) == (1, True), err


def test_a_token_that_the_model_does_not_know(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    config = {**CONFIG, "vocab_size": 40, "eos_token_id": 2}
    model = write_folder(tmp_path / "small", config, hf_tensors(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / "model" / name, model)
    options = ("--calibration-data", folder / "text.txt", "--sequence-length", 32, "--criterion", "hybrid", "--dry-run")
    status, _, err = run(capsys, "--model", model, "--width", 20, *options)
    assert (status, err.count("error")) == (2, 1)
    assert "lies outside the model's vocabulary of 40" in err
