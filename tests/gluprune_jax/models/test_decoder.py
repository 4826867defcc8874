"""The forward pass is that of transformers for every shape of model; cache, masks and padding do not change it."""

import dataclasses
import functools
import itertools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.typing import NDArray
from tiny_config import one_rope
from tiny_models import LLAMA3_ROPE, hf_config, hf_tensors, write_folder

import convert
from convert.huggingface.config import read_config
from convert.tokenizer import encode_text, load_tokenizer
from gluprune_jax.errors import RequestError
from gluprune_jax.models.cache import KVCache, LayerCache
from gluprune_jax.models.config import ModelConfig
from gluprune_jax.models.decoder import Decoder
from gluprune_jax.models.frequencies import rope_frequencies
from gluprune_jax.models.parameters import abstract_model
from gluprune_jax.pruning.targets import width_for_percent

LENGTH = 200  # beyond the window that LLAMA3_ROPE stretches, 64
TOKENS = np.random.default_rng(1).integers(0, 97, (2, LENGTH)).astype(np.int32)
MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}


def tensors_of_unit_scale(config: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """Logits of a few units, for which 1e-5 is what float32 can hold; at full scale PyTorch itself is off by more."""
    tensors = hf_tensors(config)
    return {name: tensor / 2 if name.endswith("proj.weight") else tensor for name, tensor in tensors.items()}


def write_model(folder: Path, **changes: Any) -> Path:
    config = hf_config(**changes)
    return write_folder(folder, config, tensors_of_unit_scale(config))


@functools.partial(jax.jit, static_argnums=0)
def forward(graphdef: Any, state: Any, tokens: Any, masks: Any) -> Any:
    model = nnx.merge(graphdef, state)
    return model.logits(model(tokens, neuron_masks=masks)[0])


def logits_of(model: Decoder, tokens: Any = TOKENS, masks: Any = None) -> NDArray[np.float32]:
    return np.asarray(forward(*nnx.split(model), tokens, masks))


def change_arrays(model: Decoder, change: Callable[[tuple[Any, ...], Any], Any], config: ModelConfig) -> Decoder:
    """A new model of `config` whose arrays are those of `model`, changed."""
    graphdef, _ = nnx.split(abstract_model(config))
    flat = nnx.to_flat_state(nnx.state(model))
    changed = [(path, variable.replace(change(path, variable.get_value()))) for path, variable in flat]
    new: Decoder = nnx.merge(graphdef, nnx.from_flat_state(changed))
    return new


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return convert.load(write_model(tmp_path_factory.mktemp("model"), rope_scaling=LLAMA3_ROPE)).model


# ---------------------------------------------------------------------------------------------- transformers


def check_parity(folder: Path, load_reference: Callable[[Path], Any]) -> None:
    import torch

    with torch.no_grad():
        expected = load_reference(folder)(torch.tensor(TOKENS)).logits.numpy()
    assert expected.std() > 1
    np.testing.assert_allclose(logits_of(convert.load(folder).model), expected, rtol=0, atol=1e-5)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("kv_heads", "tied", "rope", "head_dim"),
    list(itertools.product((6, 2, 1), (False, True), (None, LLAMA3_ROPE), (8, 20))),
    ids=lambda value: value["rope_type"] if isinstance(value, dict) else None,
)
def test_parity_with_llama(
    tmp_path: Path,
    load_reference: Callable[[Path], Any],
    kv_heads: int,
    tied: bool,
    rope: dict[str, Any] | None,
    head_dim: int,
) -> None:
    changes = {"num_key_value_heads": kv_heads, "tie_word_embeddings": tied, "rope_scaling": rope, "head_dim": head_dim}
    check_parity(write_model(tmp_path, **changes), load_reference)


@pytest.mark.torch
@pytest.mark.parametrize("kv_heads", [6, 2])
def test_parity_with_mistral(tmp_path: Path, load_reference: Callable[[Path], Any], kv_heads: int) -> None:
    config = hf_config(**MISTRAL, num_key_value_heads=kv_heads, rms_norm_eps=1e-6) | {"sliding_window": None}
    check_parity(write_folder(tmp_path, config, tensors_of_unit_scale(config)), load_reference)


@pytest.mark.torch
def test_parity_of_layers_that_differ_in_width(tmp_path: Path, load_reference: Callable[[Path], Any]) -> None:
    """transformers sees the same layers padded with zero neurons."""
    widths = [80, 23, 64]
    config = hf_config(gluprune={"intermediate_sizes": widths})
    tensors = tensors_of_unit_scale(config)
    for i, width in enumerate(widths):
        for name in ("gate_proj", "up_proj"):
            tensors[f"model.layers.{i}.mlp.{name}.weight"][width:] = 0
        tensors[f"model.layers.{i}.mlp.down_proj.weight"][:, width:] = 0
    folder = write_folder(tmp_path, config, tensors)
    model = convert.load(folder).model
    assert [layer.mlp.gate_proj.shape[0] for layer in model.layers] == widths
    check_parity(folder, load_reference)


@pytest.mark.torch
@pytest.mark.real_model
def test_parity_of_a_real_model(
    demo: convert.Checkpoint, demo_folder: str, load_reference: Callable[[str], Any]
) -> None:
    import torch

    text = (Path(__file__).parents[3] / "LICENSE").read_text()
    tokens = np.array([encode_text(load_tokenizer(demo), text)[:100]], np.int32)
    assert tokens.shape == (1, 100)
    with torch.no_grad():
        expected = load_reference(demo_folder)(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(logits_of(demo.model, tokens), expected, rtol=0, atol=1e-3)


CHANGES = {
    "rope_theta": {"rope_theta": 10100.0},
    "rms_norm_eps": {"rms_norm_eps": 2e-5},
    "no scaling": {"rope_scaling": None},
    "factor": {"rope_scaling": LLAMA3_ROPE | {"factor": 16.0}},
    "low_freq_factor": {"rope_scaling": LLAMA3_ROPE | {"low_freq_factor": 0.9}},
    "high_freq_factor": {"rope_scaling": LLAMA3_ROPE | {"high_freq_factor": 3.9}},
    "original_max_position_embeddings": {"rope_scaling": LLAMA3_ROPE | {"original_max_position_embeddings": 65}},
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_number_of_the_config_shows_in_the_logits(model: Decoder, tmp_path: Path, name: str) -> None:
    """Otherwise parity would not notice that one of them is not read."""
    changed = convert.load(write_model(tmp_path, **{"rope_scaling": LLAMA3_ROPE} | CHANGES[name])).model
    assert abs(logits_of(changed) - logits_of(model)).max() > 1e-4


@pytest.mark.torch
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_frequencies_of_llama_3_2_are_those_of_transformers(head_dim: int) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    data = LLAMA_3_2["Llama-3.2-1B"] | {"head_dim": head_dim}
    expected, scaling = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig(**data), device="cpu")
    assert scaling == 1
    np.testing.assert_allclose(rope_frequencies(one_rope(read_config(data)[0]), head_dim), expected.numpy(), rtol=5e-7)


# -------------------------------------------------------------------------------------------- the paper's models

# The published config.json of each.
_COMMON = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": LLAMA3_ROPE | {"original_max_position_embeddings": 8192},
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
_1B = _COMMON | {"head_dim": 64, "hidden_size": 2048, "num_attention_heads": 32, "num_hidden_layers": 16}
_3B = _COMMON | {"head_dim": 128, "hidden_size": 3072, "num_attention_heads": 24, "num_hidden_layers": 28}
LLAMA_3_2 = {
    "Llama-3.2-1B": _1B,
    "Llama-3.2-3B": _3B,
    "Llama-3.2-1B-Instruct": _1B | {"eos_token_id": [128001, 128008, 128009]},
}


@pytest.mark.parametrize("percent", [0, 10, 20, 30, 40, 50, 60])
@pytest.mark.parametrize("name", LLAMA_3_2)
def test_the_parameter_counts_of_the_paper(name: str, percent: int) -> None:
    if "GLUPRUNE_DATA" not in os.environ:
        pytest.skip("GLUPRUNE_DATA does not name the folder of the benchmark data")
    reference = Path(os.environ["GLUPRUNE_DATA"]).parent / "reference" / "paper_reference.json"
    published = json.loads(reference.read_text())["architectures"][name]
    row = published["configs"][str(percent)]

    config, _ = read_config(LLAMA_3_2[name])
    if percent:
        widths = tuple(width_for_percent(percent, size) for size in config.intermediate_sizes)
        config = dataclasses.replace(config, intermediate_sizes=widths)
    assert config.intermediate_sizes == (row["intermediate_size"],) * published["num_hidden_layers"]
    model = abstract_model(config, jnp.bfloat16)
    assert {layer.mlp.gate_proj.shape for layer in model.layers} == {
        (row["intermediate_size"], published["hidden_size"])
    }
    leaves = jax.tree.leaves(nnx.state(model))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    assert sum(leaf.size for leaf in leaves) == row["total_parameters"]
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) == row["bf16_bytes"]
    assert config.num_parameters == row["total_parameters"]
    assert config.expansion_ratio == pytest.approx(row["expansion_ratio"], abs=1e-6)


BAD_CONFIGS = [
    ({"hidden_size": 0}, "hidden_size = 0"),
    ({"intermediate_sizes": (80, 0)}, r"intermediate_sizes\[1\] = 0"),
    ({"intermediate_sizes": ()}, "num_hidden_layers = 0"),
    ({"num_key_value_heads": 4}, "num_attention_heads = 6 and num_key_value_heads = 4"),
    ({"head_dim": 7}, "head_dim = 7"),
    ({"width_multiple": 0}, "width_multiple = 0"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_CONFIGS)
def test_an_impossible_config_is_refused(model: Decoder, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        dataclasses.replace(model.config, **changes)


# -------------------------------------------------------------------------------------------------- cache


@functools.partial(jax.jit, static_argnums=0)
def append(graphdef: Any, state: Any, tokens: Any, counts: Any, cache: KVCache) -> tuple[Any, KVCache]:
    """Logits of tokens that follow what the cache holds, and the cache with the first `counts` of each row."""
    model = nnx.merge(graphdef, state)
    hidden, new = model(tokens, caches=[cache])
    return model.logits(hidden), cache.append(new, counts)


@functools.partial(jax.jit, static_argnums=0)
def forward_forest(
    graphdef: Any, state: Any, tokens: Any, positions: Any, caches: Any = (), subtree_ends: Any = None
) -> Any:
    model = nnx.merge(graphdef, state)
    hidden, _ = model(tokens, positions, caches, subtree_ends)
    return model.logits(hidden)


def test_no_position_sees_a_later_one(model: Decoder) -> None:
    changed = TOKENS.copy()
    changed[:, 120:] = (changed[:, 120:] + 1) % 97
    before, after = logits_of(model), logits_of(model, changed)
    np.testing.assert_array_equal(after[:, :120], before[:, :120])
    assert (abs(after[:, 120:] - before[:, 120:]).max(axis=-1) > 1e-3).all()


@pytest.mark.parametrize("slots", [150, 512])
def test_prefill_and_decoding_equal_the_full_forward(model: Decoder, slots: int) -> None:
    """Each row has a prompt of its own length; the prompts are padded, the cache is longer than needed."""
    lengths, steps, padding = np.array([1, 50, 33, 64]), 40, 96
    tokens = np.random.default_rng(2).integers(0, 97, (4, LENGTH)).astype(np.int32)
    expected = logits_of(model, tokens)
    prompts = np.where(np.arange(padding) < lengths[:, None], tokens[:, :padding], 96)
    run = functools.partial(append, *nnx.split(model))
    logits, cache = run(prompts, lengths, KVCache.empty(model.config, 4, slots, jnp.float32))
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(logits[row, :length], expected[row, :length], rtol=0, atol=1e-5)
    rows = np.arange(4)
    for step in range(steps):
        at = (lengths + step).astype(np.int32)
        np.testing.assert_array_equal(cache.lengths, at)
        logits, cache = run(tokens[rows, at][:, None], np.ones(4, np.int32), cache)
        np.testing.assert_allclose(logits[:, 0], expected[rows, at], rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_long_prompt_may_be_filled_in_pieces(model: Decoder, rows: int) -> None:
    cache, pieces = KVCache.empty(model.config, rows, LENGTH, jnp.float32), []
    for start, stop in itertools.pairwise((0, 7, 130, LENGTH)):
        counts = np.full(rows, stop - start, np.int32)
        logits, cache = append(*nnx.split(model), TOKENS[:rows, start:stop], counts, cache)
        pieces.append(logits)
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), logits_of(model)[:rows], rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 3])
def test_new_tokens_are_put_behind_those_of_their_row(model: Decoder, rows: int) -> None:
    config, random = model.config, np.random.default_rng(4)
    lengths, counts = np.array([3, 0, 11])[:rows], np.array([5, 0, 2])[:rows]

    def filled(slots: int) -> tuple[LayerCache, ...]:
        shape = rows, config.num_key_value_heads, slots, config.head_dim
        return tuple(
            LayerCache(*(random.standard_normal(shape).astype(np.float32) for _ in "kv"))
            for _ in range(config.num_hidden_layers)
        )

    old, new = filled(16), filled(5)
    cache = KVCache(old, jnp.asarray(lengths, jnp.int32)).append(new, counts)
    np.testing.assert_array_equal(cache.lengths, lengths + counts)
    for row, length in enumerate(lengths):
        for before, fresh, after in zip(*map(jax.tree.leaves, (old, new, cache.layers)), strict=True):
            np.testing.assert_array_equal(after[row, :, :length], before[row, :, :length])
            np.testing.assert_array_equal(after[row, :, length : length + 5], fresh[row])


def test_a_cache_may_be_cut_back(model: Decoder) -> None:
    """What lies behind is overwritten by another continuation."""
    run = functools.partial(append, *nnx.split(model))
    _, cache = run(TOKENS[:1], np.array([LENGTH]), KVCache.empty(model.config, 1, 256, jnp.float32))
    changed = np.concatenate([TOKENS[:1, :50], TOKENS[1:, 50:80]], axis=1)
    logits, cache = run(changed[:, 50:], np.array([30]), cache.holding(np.array([50], np.int32)))
    np.testing.assert_allclose(logits, logits_of(model, changed)[:, 50:], rtol=0, atol=1e-5)
    assert cache.lengths.tolist() == [80]


def test_the_slots_of_a_cache_are_whole_blocks(model: Decoder) -> None:
    for slots in (1, 255, 256, 512):
        assert KVCache.empty(model.config, 2, slots, jnp.bfloat16).layers[0].k.shape == (2, 2, slots, 8)
    with pytest.raises(ValueError, match="a cache of 300 slots"):
        KVCache.empty(model.config, 2, 300, jnp.bfloat16)


def test_rows_share_a_beginning(model: Decoder) -> None:
    """Two texts that part after 120 tokens, on one cache of what they have in common."""
    tokens = np.concatenate([np.broadcast_to(TOKENS[:1, :120], (2, 120)), TOKENS[:, 120:]], axis=1)
    run = functools.partial(append, *nnx.split(model))
    _, cache = run(tokens[:1, :120], np.array([120]), KVCache.empty(model.config, 1, 256, jnp.float32))
    positions = np.broadcast_to(np.arange(120, LENGTH, dtype=np.int32), (2, LENGTH - 120))
    for given in (None, positions):
        logits = forward_forest(*nnx.split(model), tokens[:, 120:], given, [cache])
        np.testing.assert_allclose(logits, logits_of(model, tokens)[:, 120:], rtol=0, atol=1e-5)


def test_positions_are_counted_from_what_all_caches_hold(model: Decoder) -> None:
    """A beginning for all, a middle for each row, and the end."""
    tokens = np.concatenate([np.broadcast_to(TOKENS[:1, :90], (2, 90)), TOKENS[:, 90:]], axis=1)
    graphdef, state = nnx.split(model)
    _, beginning = append(
        graphdef, state, tokens[:1, :90], np.array([90]), KVCache.empty(model.config, 1, 100, jnp.float32)
    )
    _, new = jax.jit(lambda tokens: model(tokens, caches=[beginning]))(tokens[:, 90:150])
    middle = KVCache.empty(model.config, 2, 64, jnp.float32).append(new, np.array([60, 40]))
    last = np.stack([tokens[0, 150:160], tokens[1, 130:140]])
    logits = forward_forest(graphdef, state, last, None, [beginning, middle])
    expected = logits_of(model, tokens)
    np.testing.assert_allclose(logits[0], expected[0, 150:160], rtol=0, atol=1e-5)
    np.testing.assert_allclose(logits[1], expected[1, 130:140], rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------------ forests

# Each by the sequence before it that it shares a beginning with, how much, and how many tokens follow.
BRANCHES = [(None, 0, 50), (0, 30, 20), (1, 40, 25), (1, 30, 1), (0, 1, 60), (None, 0, 33), (5, 10, 10)]


class Forest(NamedTuple):
    """Sequences in one row: where the tokens of each are, and the row itself."""

    sequences: list[list[int]]
    paths: list[list[int]]
    tokens: NDArray[np.int32]
    positions: NDArray[np.int32]
    subtree_ends: NDArray[np.int32]


def forest(seed: int) -> Forest:
    random = np.random.default_rng(seed)
    sequences: list[list[int]] = []
    paths: list[list[int]] = []
    tokens: list[int] = []
    for parent, shared, fresh in BRANCHES:
        path, begun = ([], []) if parent is None else (paths[parent][:shared], sequences[parent][:shared])
        new = random.integers(0, 97, fresh).tolist()
        paths.append(path + list(range(len(tokens), len(tokens) + fresh)))
        sequences.append(begun + new)
        tokens += new
    positions, ends = np.zeros((2, len(tokens)), np.int32)
    for path in paths:
        positions[path] = np.arange(len(path))
        ends[path] = np.maximum(ends[path], path[-1] + 1)
    return Forest(sequences, paths, np.array(tokens, np.int32), positions, ends)


@pytest.mark.parametrize("held", [0, 40])
def test_a_forest_in_a_row_is_its_sequences_alone(model: Decoder, held: int) -> None:
    """Two rows of different forests, which stand on what the cache holds."""
    graphdef, state = nnx.split(model)
    forests = [forest(0), forest(1)]
    cache = KVCache.empty(model.config, 1, 64, jnp.float32)
    _, cache = append(graphdef, state, TOKENS[:1, :40], np.array([held]), cache)
    tokens, positions, ends = (np.stack(rows) for rows in list(zip(*forests, strict=True))[2:])
    logits = np.asarray(forward_forest(graphdef, state, tokens, held + positions, [cache], ends))
    for row, (sequences, paths, *_) in enumerate(forests):
        alone = np.zeros((len(sequences), held + max(map(len, sequences))), np.int32)
        alone[:, :held] = TOKENS[0, :held]
        for i, sequence in enumerate(sequences):
            alone[i, held : held + len(sequence)] = sequence
        expected = logits_of(model, alone)
        for i, path in enumerate(paths):
            np.testing.assert_allclose(logits[row, path], expected[i, held : held + len(path)], rtol=0, atol=1e-5)


# -------------------------------------------------------------------------------------------- mask and padding


def random_masks(config: ModelConfig) -> tuple[NDArray[np.float32], ...]:
    random = np.random.default_rng(3)
    return tuple(random.integers(0, 2, size).astype(np.float32) for size in config.stored_intermediate_sizes)


def test_a_mask_of_ones_changes_nothing(model: Decoder) -> None:
    ones = tuple(np.ones(size, np.float32) for size in model.config.intermediate_sizes)
    np.testing.assert_allclose(logits_of(model, masks=ones), logits_of(model), rtol=0, atol=1e-6)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_the_weights_of_a_masked_neuron_do_not_matter(model: Decoder, layer: int) -> None:
    ones = [np.ones(size, np.float32) for size in model.config.intermediate_sizes]
    ones[layer] = random_masks(model.config)[layer]
    masks, removed = tuple(ones), ones[layer] == 0

    def spoil(path: tuple[Any, ...], array: Any) -> Any:
        if path[:3] != ("layers", layer, "mlp"):
            return array
        return array.at[:, removed].set(99.0) if path[3] == "down_proj" else array.at[removed].set(99.0)

    spoiled = change_arrays(model, spoil, model.config)
    np.testing.assert_array_equal(logits_of(spoiled, masks=masks), logits_of(model, masks=masks))
    assert abs(logits_of(model, masks=masks) - logits_of(model)).max() > 0.1


def test_masks_may_be_of_any_dtype(model: Decoder) -> None:
    masks = random_masks(model.config)
    expected = logits_of(model, masks=masks)
    for dtype in (np.bool_, jnp.bfloat16):
        np.testing.assert_array_equal(logits_of(model, masks=tuple(m.astype(dtype) for m in masks)), expected)


@pytest.mark.parametrize("multiple", [64, 7])
def test_padding_of_the_width_changes_no_logit(model: Decoder, multiple: int) -> None:
    config = dataclasses.replace(model.config, width_multiple=multiple)
    extra = -80 % multiple

    def pad(path: tuple[Any, ...], array: Any) -> Any:
        if "mlp" not in path:
            return array
        return jnp.pad(array, ((0, 0), (0, extra)) if path[-1] == "down_proj" else ((0, extra), (0, 0)))

    padded = change_arrays(model, pad, config)
    shapes = {path: leaf.get_value().shape for path, leaf in nnx.to_flat_state(nnx.state(abstract_model(config)))}
    assert shapes == {path: leaf.get_value().shape for path, leaf in nnx.to_flat_state(nnx.state(padded))}
    assert shapes["layers", 0, "mlp", "gate_proj"] == (80 + extra, 48)
    assert config.num_parameters == model.config.num_parameters
    np.testing.assert_allclose(logits_of(padded), logits_of(model), rtol=0, atol=1e-5)


# -------------------------------------------------------------------------------------------------- dtypes


def test_bfloat16_is_close_to_float32(model: Decoder) -> None:
    half = change_arrays(model, lambda path, array: array.astype(jnp.bfloat16), model.config)
    hidden, new = jax.eval_shape(half, TOKENS)
    assert hidden.dtype == new[0].k.dtype == new[0].v.dtype == jnp.bfloat16
    logits, expected = logits_of(half), logits_of(model)
    assert logits.dtype == np.float32
    assert not np.array_equal(logits, logits.astype(jnp.bfloat16).astype(np.float32)), "rounded after all"
    error = np.sqrt(np.mean((logits - expected) ** 2)) / expected.std()
    assert error < 0.02


def test_the_variance_of_a_norm_is_float32(model: Decoder) -> None:
    """In bfloat16 the sum of these squares would stop growing at 256."""
    config = dataclasses.replace(model.config, hidden_size=4096)
    norm = type(model.norm)(config, 4096, jnp.bfloat16)
    x = jnp.ones((1, 1, 4096), jnp.bfloat16) * 3
    assert norm(x).dtype == jnp.bfloat16
    np.testing.assert_array_equal(norm(x), np.ones((1, 1, 4096)))


def test_weights_of_mixed_dtypes_run_in_the_dtype_of_the_embedding(model: Decoder) -> None:
    def mix(path: tuple[Any, ...], array: Any) -> Any:
        return array.astype(jnp.bfloat16) if "mlp" in path or path[-1] == "lm_head" else array

    mixed = change_arrays(model, mix, model.config)
    rounded = change_arrays(mixed, lambda path, array: array.astype(jnp.float32), model.config)
    assert jax.eval_shape(mixed, TOKENS)[0].dtype == jnp.float32
    np.testing.assert_allclose(logits_of(mixed), logits_of(rounded), rtol=0, atol=1e-6)


def test_abstract_models_share_nothing() -> None:
    config = dataclasses.replace(read_config(hf_config())[0], vocab_size=7)
    first, second = abstract_model(config), abstract_model(config)
    first.norm.weight.set_value(jnp.ones(48))
    assert isinstance(second.norm.weight.get_value(), jax.ShapeDtypeStruct)
    assert isinstance(abstract_model(config).norm.weight.get_value(), jax.ShapeDtypeStruct)
