"""Perplexity is what its definition says, computed another way, whatever the batch."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compilations import compiled
from flax import nnx
from tiny_models import LLAMA3_ROPE, hf_config, hf_tensors, write_folder

import convert
from convert.tokenizer import encode_text, load_tokenizer
from evals.perplexity import perplexity
from gluprune_jax.data.documents import PYTHON_REFERENCE, read_text
from gluprune_jax.errors import RequestError
from gluprune_jax.models.decoder import Decoder
from gluprune_jax.pruning.plan import make_plan
from gluprune_jax.pruning.scores import score
from gluprune_jax.pruning.slicing import slice_model

TOKENS = np.random.default_rng(0).integers(0, 97, 1000).tolist()

forward = nnx.jit(lambda model, tokens, masks: model.logits(model(tokens, neuron_masks=masks)[0]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("model"), hf_config(rope_scaling=LLAMA3_ROPE))


@pytest.fixture(scope="module")
def model(folder: Path) -> Decoder:
    return convert.load(folder).model


def by_definition(model: Decoder, tokens: list[int], window: int, masks: Any = None) -> tuple[float, int]:
    """One window at a time, in float64."""
    losses: list[float] = []
    for start in range(0, len(tokens), window):
        piece = np.array(tokens[start : start + window])
        if len(piece) < 2:
            continue
        logits = np.asarray(forward(model, piece[None], masks), np.float64)[0, :-1]
        shifted = logits - logits.max(axis=-1, keepdims=True)
        log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
        losses += (-log_probabilities[np.arange(len(piece) - 1), piece[1:]]).tolist()
    return math.exp(np.mean(losses)), len(losses)


# Windows that divide the text, that leave a rest, a rest of one token, and that are longer than the text.
SHAPES = [(400, 100), (470, 100), (401, 100), (300, 299), (70, 512), (2, 512), (9, 2), (1000, 500)]


@pytest.mark.parametrize(("length", "window"), SHAPES)
def test_perplexity_is_its_definition(model: Decoder, length: int, window: int) -> None:
    result = perplexity(model, TOKENS[:length], sequence_length=window)
    value, predicted = by_definition(model, TOKENS[:length], window)
    assert result.value == pytest.approx(value, rel=1e-6)
    assert result.predicted_tokens == predicted
    assert result.window == min(window, length)


@pytest.mark.torch
def test_perplexity_is_that_of_transformers(
    folder: Path, model: Decoder, load_reference: Callable[[str | Path], Any]
) -> None:
    import torch

    reference, total, predicted = load_reference(folder), 0.0, 0
    for start in range(0, 1000, 150):
        ids = torch.tensor([TOKENS[start : start + 150]])
        with torch.no_grad():
            total += float(reference(ids, labels=ids).loss) * (ids.shape[1] - 1)
        predicted += ids.shape[1] - 1
    assert perplexity(model, TOKENS, sequence_length=150).value == pytest.approx(math.exp(total / predicted), rel=1e-5)


@pytest.mark.torch
@pytest.mark.real_model
def test_perplexity_of_a_real_model(
    demo: convert.Checkpoint, demo_folder: str, load_reference: Callable[[str | Path], Any]
) -> None:
    import torch

    ids = encode_text(load_tokenizer(demo), (Path(__file__).parents[2] / "LICENSE").read_text())[:250]
    batch = torch.tensor([ids])
    with torch.no_grad():
        expected = math.exp(load_reference(demo_folder)(batch, labels=batch).loss)
    result = perplexity(demo.model, ids, sequence_length=250)
    assert result.predicted_tokens == 249
    assert result.value == pytest.approx(expected, rel=1e-4)
    assert result.value < 20, "the model knows English"


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 64])
def test_the_batch_does_not_matter(model: Decoder, batch_size: int) -> None:
    result = perplexity(model, TOKENS, sequence_length=90, batch_size=batch_size)
    reference = perplexity(model, TOKENS, sequence_length=90)
    assert result.value == pytest.approx(reference.value, rel=1e-6)
    assert result.predicted_tokens == reference.predicted_tokens == 1000 - 12


def test_a_beginning_is_seen_and_not_predicted(model: Decoder) -> None:
    result = perplexity(model, TOKENS[:250], sequence_length=100, begin=1)
    losses = []
    for start in (0, 100, 200):
        piece = np.array([1, *TOKENS[start : min(start + 100, 250)]])
        logits = np.asarray(forward(model, piece[None], None), np.float64)[0, 1:-1]
        log_probabilities = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        losses += (-log_probabilities[np.arange(len(piece) - 2), piece[2:]]).tolist()
    assert result.value == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert result.predicted_tokens == len(losses) == 247
    assert result.definition.endswith("disjoint windows of 100 tokens, behind the BOS token 1")
    with pytest.raises(RequestError, match="sequence_length` is 512; it must lie between 2 and the model's 511"):
        perplexity(model, TOKENS, sequence_length=512, begin=1)


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(tmp_path: Path) -> None:
    config = hf_config()
    tensors = hf_tensors(config)
    tensors["lm_head.weight"][:] = 0
    model = convert.load(write_folder(tmp_path, config, tensors)).model
    assert perplexity(model, TOKENS[:300], sequence_length=128).value == pytest.approx(97, rel=1e-5)


def test_bfloat16_is_close_to_float32(folder: Path, model: Decoder) -> None:
    half = convert.load(folder, dtype="bfloat16").model
    exact = perplexity(model, TOKENS, sequence_length=100).value
    assert perplexity(half, TOKENS, sequence_length=100).value == pytest.approx(exact, rel=0.02)


def test_masks_measure_the_sliced_model(model: Decoder) -> None:
    plan = make_plan(score(model), prune_percent=30)
    masks = plan.masks(model.config)
    masked = perplexity(model, TOKENS, sequence_length=100, neuron_masks=masks).value
    assert masked == pytest.approx(by_definition(model, TOKENS, 100, masks)[0], rel=1e-6)
    assert masked == pytest.approx(perplexity(slice_model(model, plan), TOKENS, sequence_length=100).value, rel=1e-5)
    assert masked != pytest.approx(perplexity(model, TOKENS, sequence_length=100).value, rel=1e-3)


def test_masks_and_texts_share_their_programs(model: Decoder) -> None:
    scores = score(model)
    programs = []
    for percent in (10, 20, 60):
        masks = make_plan(scores, prune_percent=percent).masks(model.config)
        with compiled() as new:
            perplexity(model, TOKENS[percent:], sequence_length=110, neuron_masks=masks)
        programs.append(len(new))
    assert programs[0] > 0
    assert programs[1:] == [0, 0]


def test_progress_counts_tokens(model: Decoder) -> None:
    progress: list[int] = []
    perplexity(model, TOKENS, sequence_length=90, batch_size=5, on_tokens=progress.append)
    assert len(progress) == 12
    assert progress == sorted(progress)
    assert progress[-1] == 1000


def test_the_definition_says_what_was_measured(model: Decoder) -> None:
    definition = perplexity(model, TOKENS, sequence_length=100, texts=["a.txt", "b.txt"]).definition
    assert "a.txt, b.txt" in definition
    assert "990 tokens" in definition
    assert "windows of 100 tokens" in definition


REFUSALS: list[tuple[list[int], dict[str, int], str]] = [
    (TOKENS, {"sequence_length": 1}, "`sequence_length` is 1; it must lie between 2 and the model's 512"),
    (TOKENS, {"sequence_length": 513}, "`sequence_length` is 513"),
    ([5], {}, "the text has 1 tokens; perplexity needs at least 2"),
    ([], {}, "the text has 0 tokens"),
    ([1, 97], {}, "token id 97 lies outside the model's vocabulary of 97"),
    ([-1, 3], {}, "token id -1 lies outside"),
    (TOKENS, {"batch_size": 0}, "batch_size is 0; it must be at least 1"),
]


@pytest.mark.parametrize(("tokens", "arguments", "message"), REFUSALS)
def test_bad_input_is_refused(model: Decoder, tokens: list[int], arguments: dict[str, int], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        perplexity(model, tokens, **arguments)


def test_texts_are_read_as_utf_8(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes("Müller\n".encode())
    assert read_text(str(tmp_path / "text")) == "Müller\n"
    (tmp_path / "latin").write_bytes("Müller".encode("latin-1"))
    with pytest.raises(RequestError, match=r"the text .*latin is not UTF-8 text"):
        read_text(str(tmp_path / "latin"))
    with pytest.raises(RequestError, match=r"cannot read the text .*missing: No such file"):
        read_text(str(tmp_path / "missing"))


def test_the_text_that_every_python_carries() -> None:
    text = read_text(PYTHON_REFERENCE)
    assert len(text) > 300_000
    assert 'The "for" statement' in text
