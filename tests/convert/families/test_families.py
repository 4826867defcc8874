"""Every family on every path: to the bit where bits are kept, and the same logits as transformers."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from inspecting import logits
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from tiny_families import CONFIGS, ONE_EACH

import convert
from convert.huggingface.config import read_config
from gluprune_jax import make_plan, score
from gluprune_jax.errors import OperationError
from gluprune_jax.inference.engine import Engine
from gluprune_jax.models.config import LayerAttention, ModelConfig
from gluprune_jax.models.decoder import Decoder
from gluprune_jax.models.parameters import abstract_model, parameters_of, with_parameters
from gluprune_jax.parallel.mesh import MeshShape, make_mesh
from gluprune_jax.pruning.calibration import Stream
from gluprune_jax.pruning.slicing import slice_model
from gluprune_jax.training.step import Objective, Schedule, loss_sums

# Longer than two windows, and than the original context of those that have one of 16.
TOKENS = np.random.default_rng(0).integers(3, 256, (2, 40)).astype(np.int32)


def random_model(config: ModelConfig, seed: int = 0) -> Decoder:
    """All weights random, norms and biases too: what transformers fills in itself hides faults."""
    rng = np.random.default_rng(seed)

    def values(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        if name.endswith("norm.weight"):
            return (float(config.norm != "float32_plus_one") + 0.2 * rng.standard_normal(shape)).astype(np.float32)
        return (0.15 * rng.standard_normal(shape)).astype(np.float32)

    shapes = parameters_of(abstract_model(config))
    return with_parameters(
        abstract_model(config), {name: jnp.asarray(values(name, leaf.shape)) for name, leaf in shapes.items()}
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's model, as we write it."""
    place = tmp_path_factory.mktemp("families")

    def folder(name: str) -> Path:
        path = place / name.replace(" ", "-")
        if not path.exists():
            config, rest = read_config(CONFIGS[name])
            convert.save(convert.LoadedCheckpoint(model=random_model(config), source=name, hf_config=rest), path)
        return path

    return folder


def test_there_is_a_model_of_every_family() -> None:
    from convert.families.registry import FAMILIES

    assert {CONFIGS[name]["model_type"] for name in ONE_EACH} == FAMILIES.keys() - {"gemma3"}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_written_is_read_to_the_bit(name: str, folders: Callable[[str], Path], tmp_path: Path) -> None:
    config, _ = read_config(CONFIGS[name])
    loaded = convert.load(folders(name))
    assert loaded.config == config
    expected = parameters_of(random_model(config))
    found = parameters_of(loaded.model)
    assert found.keys() == expected.keys()
    for parameter, array in found.items():
        assert np.asarray(array).tobytes() == np.asarray(expected[parameter]).tobytes(), parameter
    convert.save(loaded, tmp_path / "again")
    for file in folders(name).iterdir():
        if file.name != "README.md":
            assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("name", ONE_EACH)
def test_masked_equals_sliced_and_streamed_equals_in_memory(
    name: str, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    dense = convert.load(folders(name))
    scores = score(dense.model)
    plan = make_plan(scores, prune_percent=30)
    masked = logits(dense.model, TOKENS, plan.masks(dense.config))
    sliced = slice_model(dense.model, plan)
    np.testing.assert_allclose(logits(sliced, TOKENS), masked, rtol=0, atol=2e-5)
    streamed = convert.load(folders(name), stream=True)
    for one, other in zip(score(streamed.model, weights=streamed.mlp_weights()).values, scores.values, strict=True):
        np.testing.assert_array_equal(one, other)
    for made, where in ((streamed, "streamed"), (dense, "loaded")):
        convert.save(made.pruned(plan), tmp_path / where, formats=["hf", "orbax"])
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "streamed" / file).read_bytes() == (tmp_path / "loaded" / file).read_bytes(), file
    for form in ("", "orbax"):
        again = convert.load(tmp_path / "loaded" / form)
        assert again.config == plan.pruned_config(dense.config)
        np.testing.assert_allclose(logits(again.model, TOKENS), masked, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["gemma3", "phi3, long rows", "olmo3", "granite 4", "qwen2"])
@pytest.mark.parametrize("shape", [MeshShape(2, 4), MeshShape(1, 8)])
def test_a_mesh_computes_the_same(name: str, shape: MeshShape, folders: Callable[[str], Path]) -> None:
    """Also where biases, norms of projections and fused tensors are divided; kept sets to the bit."""
    one = convert.load(folders(name))
    on_mesh = convert.load(folders(name), mesh=lambda model: make_mesh(shape, model.config.num_key_value_heads))
    np.testing.assert_allclose(logits(on_mesh.model, TOKENS), logits(one.model, TOKENS), rtol=0, atol=3e-5)
    kept = [make_plan(score(checkpoint.model), prune_percent=30).kept for checkpoint in (one, on_mesh)]
    for ours, theirs in zip(*kept, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", ["gemma3", "gemma2", "smollm3", "olmo3", "qwen2 with a window from layer 2"])
def test_layers_keep_their_windows_and_ropes_when_others_are_dropped(
    name: str, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    dense = convert.load(folders(name))
    plan = make_plan(score(dense.model), drop_layers=[1])
    convert.save(dense.pruned(plan), tmp_path / "pruned")
    again = convert.load(tmp_path / "pruned")
    assert again.config.attention == tuple(dense.config.attention[i] for i in (0, 2, 3))
    layers = [layer for i, layer in enumerate(dense.model.layers) if i != 1]
    graphdef, state = nnx.split(dense.model)
    cut = nnx.merge(graphdef, state)
    cut.layers = nnx.List(layers)
    np.testing.assert_allclose(logits(again.model, TOKENS), logits(cut, TOKENS), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("name", "tensor", "shape"),
    [
        ("phi3, long rows", "model.layers.1.self_attn.qkv_proj.weight", "[128, 64]"),
        ("phi3, long rows", "model.layers.1.mlp.gate_up_proj.weight", "[192, 64]"),
        ("granite 4", "model.layers.1.shared_mlp.input_linear.weight", "[192, 64]"),
        ("qwen2", "model.layers.1.self_attn.k_proj.bias", "[32]"),
        ("olmo2", "model.layers.1.self_attn.q_norm.weight", "[64]"),
    ],
)
def test_tensors_of_the_wrong_height_are_named(
    name: str, tensor: str, shape: str, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(folders(name), tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors[tensor] = tensors[tensor][:-1].copy()
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    with pytest.raises(OperationError, match=f"{re.escape(tensor)} has shape .*, config.json means {re.escape(shape)}"):
        convert.load(tmp_path / "model")


# --------------------------------------------------------------------------------------------------- transformers


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, NDArray[np.float32]]]:
    """A family's model as transformers 5 makes and writes it, and its logits."""
    import torch
    import transformers

    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("references")
    known: dict[str, tuple[Path, NDArray[np.float32]]] = {}

    def make(name: str) -> tuple[Path, NDArray[np.float32]]:
        if name not in known:
            path = place / name.replace(" ", "-")
            config = transformers.AutoConfig.for_model(
                **json.loads(json.dumps({key: value for key, value in CONFIGS[name].items() if key != "architectures"}))
            )
            model = transformers.AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, attn_implementation="eager"
            ).eval()
            generator = torch.Generator().manual_seed(0)
            plus_one = 0.0 if "gemma" in config.model_type else 1.0
            for parameter, weight in sorted(model.named_parameters()):
                values = torch.randn(weight.shape, generator=generator)
                weight.data = plus_one + 0.2 * values if parameter.endswith("norm.weight") else 0.15 * values
            model.tie_weights()
            with torch.no_grad():
                expected = np.concatenate(
                    [model(torch.tensor(row[None], dtype=torch.long)).logits.float().numpy() for row in TOKENS]
                )
            model.save_pretrained(path)
            known[name] = path, expected
        return known[name]

    return make


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_transformers(
    name: str, references: Callable[[str], tuple[Path, NDArray[np.float32]]], tmp_path: Path
) -> None:
    """From what transformers 5 writes, from the config as transformers 4 spells it, and in what we write."""
    import torch
    import transformers

    source, expected = references(name)
    as_4 = tmp_path / "classic"
    shutil.copytree(source, as_4)
    (as_4 / "config.json").write_text(json.dumps(CONFIGS[name]))
    checkpoints = [convert.load(folder) for folder in (source, as_4)]
    for checkpoint in checkpoints:
        np.testing.assert_allclose(logits(checkpoint.model, TOKENS), expected, rtol=0, atol=1e-4)
    convert.save(checkpoints[1], tmp_path / "ours")
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(loading.values()), loading
    with torch.no_grad():
        again = np.concatenate([model(torch.tensor(row[None], dtype=torch.long)).logits.numpy() for row in TOKENS])
    np.testing.assert_allclose(again, expected, rtol=0, atol=1e-5)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ONE_EACH)
def test_bfloat16_errs_no_more_than_in_transformers(
    name: str, references: Callable[[str], tuple[Path, NDArray[np.float32]]], tmp_path: Path
) -> None:
    """Both against float32 with the same weights: on the mean at most 1.2 times as far away."""
    import torch
    import transformers

    source, _ = references(name)
    convert.save(convert.load(source, dtype="bfloat16"), tmp_path / "bfloat16")

    def theirs(dtype: Any) -> NDArray[np.float32]:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "bfloat16", dtype=dtype, attn_implementation="eager"
        )
        with torch.no_grad():
            rows = [model(torch.tensor(row[None], dtype=torch.long)).logits.float().numpy() for row in TOKENS]
        return np.concatenate(rows)

    exact = theirs(torch.float32)
    ours = logits(convert.load(tmp_path / "bfloat16").model, TOKENS)
    assert np.abs(ours - exact).mean() <= 1.2 * np.abs(theirs(torch.bfloat16) - exact).mean()


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
def test_the_text_half_of_a_multimodal_model_is_read_and_written_as_a_text_model(tmp_path: Path) -> None:
    import torch
    import transformers

    # The multimodal class applies no soft cap to its logits.
    left_out = ("architectures", "model_type", "final_logit_softcapping")
    keys = {key: value for key, value in CONFIGS["gemma3"].items() if key not in left_out}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=keys,
        vision_config=vision | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=1,
        image_token_index=255,
    )
    whole = transformers.Gemma3ForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(0)
    for weight in whole.parameters():
        weight.data = 0.15 * torch.randn(weight.shape, generator=generator)
    whole.tie_weights()
    whole.save_pretrained(tmp_path / "whole")
    tokens = torch.tensor(np.minimum(TOKENS, 254), dtype=torch.long)
    with torch.no_grad():
        expected = whole(tokens, token_type_ids=torch.zeros_like(tokens)).logits.numpy()
    checkpoint = convert.load(tmp_path / "whole")
    assert any("not of the text half were left out" in note for note in checkpoint.notes)
    np.testing.assert_allclose(logits(checkpoint.model, tokens.numpy()), expected, rtol=0, atol=1e-4)
    convert.save(checkpoint, tmp_path / "text")
    half, loading = transformers.Gemma3ForCausalLM.from_pretrained(
        tmp_path / "text", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(loading.values()), loading
    with torch.no_grad():
        np.testing.assert_allclose(half(tokens).logits.numpy(), expected, rtol=0, atol=1e-4)


FLIPS: dict[str, Callable[[ModelConfig], Any]] = {
    "norm": lambda config: "cast_first" if config.norm == "float32_plus_one" else None,
    "activation": lambda config: "silu" if config.activation == "gelu_tanh" else "gelu_tanh",
    "attention_scale": lambda config: 1.1 * (config.attention_scale or config.head_dim**-0.5),
    "attention_soft_cap": lambda config: None if config.attention_soft_cap else 2.0,
    "logit_soft_cap": lambda config: None if config.logit_soft_cap else 2.0,
    "embedding_scale": lambda config: 1.5 * config.embedding_scale,
    "residual_scale": lambda config: 1.1 * config.residual_scale,
    "logit_scale": lambda config: 1.1 * config.logit_scale,
    "window": lambda config: tuple(
        LayerAttention(attention.rope, attention.window and attention.window + 1) for attention in config.attention
    ),
    "ropes": lambda config: tuple(LayerAttention(config.attention[0].rope, a.window) for a in config.attention),
    "no rope": lambda config: tuple(LayerAttention(None, attention.window) for attention in config.attention),
}


@pytest.mark.parametrize("name", ONE_EACH)
def test_every_field_moves_the_logits(name: str, folders: Callable[[str], Path]) -> None:
    """A field whose change nobody sees is not tested by comparing logits."""
    checkpoint = convert.load(folders(name))
    config, expected = checkpoint.config, logits(checkpoint.model, TOKENS)
    parameters = parameters_of(checkpoint.model)
    for flip, other in FLIPS.items():
        value = other(config)
        field = "attention" if flip in ("window", "ropes", "no rope") else flip
        if value == getattr(config, field) or (flip == "norm" and value is None):
            continue
        changed = dataclasses.replace(config, **{field: value})
        found = logits(with_parameters(abstract_model(changed), parameters), TOKENS)
        assert np.abs(found - expected).max() > 1e-3, flip


TRANSFORMERS_4 = """
import json, sys, torch, transformers
assert transformers.__version__.startswith("4.")
torch.set_num_threads(1)
tokens = torch.tensor(json.loads(sys.argv[1]))
answers = {}
for folder in sys.argv[2:]:
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(loading.values()), loading
    with torch.no_grad():
        answers[folder] = [model(row[None]).logits[0].tolist() for row in tokens]
json.dump(answers, sys.stdout)
"""


@pytest.mark.torch
def test_transformers_4_computes_the_same_from_what_we_write(folders: Callable[[str], Path]) -> None:
    python = os.environ.get("GLUPRUNE_TRANSFORMERS4_PYTHON")
    if not python:
        pytest.skip("GLUPRUNE_TRANSFORMERS4_PYTHON names no Python with transformers 4")
    paths = {name: str(folders(name)) for name in CONFIGS}
    done = subprocess.run(
        [python, "-W", "ignore", "-c", TRANSFORMERS_4, json.dumps(TOKENS.tolist()), *paths.values()],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answers = json.loads(done.stdout)
    for name, path in paths.items():
        ours = logits(convert.load(path).model, TOKENS)
        np.testing.assert_allclose(np.asarray(answers[path]), ours, rtol=0, atol=1e-4, err_msg=name)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in ONE_EACH if not name.startswith(("granite 4", "phi3"))])
def test_kept_neurons_are_those_of_optipfair(
    name: str, references: Callable[[str], tuple[Path, NDArray[np.float32]]]
) -> None:
    """Of the two families that it refuses (fused tensors) there is nothing to compare with."""
    optipfair = pytest.importorskip(
        "optipfair", reason="compares with OptiPFair on PyTorch: pip install gluprune-jax[parity]"
    )
    import torch
    import transformers

    source, _ = references(name)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    dense = convert.load(source)
    pruned = optipfair.prune_model(
        model, pruning_type="MLP_GLU", neuron_selection_method="MAW", pruning_percentage=25, show_progress=False
    )
    plan = make_plan(score(dense.model), prune_percent=25)
    for i, layer in enumerate(pruned.model.layers):
        theirs = layer.mlp.gate_proj.weight.detach().numpy()
        ours = np.asarray(dense.model.layers[i].mlp.gate_proj[...])[plan.kept[i]]
        np.testing.assert_array_equal(ours, theirs)


def logits_of(model: Decoder, tokens: list[int], longest: int) -> NDArray[np.float32]:
    """Of every position of one sequence, `[T, V]`; one program, for `longest` tokens, serves all lengths."""
    assert len(tokens) <= longest
    padded = tokens + [0] * (longest - len(tokens))  # no token sees what comes after it
    found: NDArray[np.float32] = logits(model, [padded])[0, : len(tokens)]
    return found


@pytest.mark.parametrize("name", ["gemma3", "mistral with a window", "olmo3", "phi3 with a window"])
def test_generation_past_the_window_is_that_of_whole_sequences(name: str, folders: Callable[[str], Path]) -> None:
    """Token by token through the KV cache, as if each time all of it were computed anew."""
    from gluprune_jax import generate

    model = convert.load(folders(name)).model
    prompt = TOKENS[0, :11].tolist()
    (found,) = generate(model, [prompt], max_new_tokens=20)
    expected = list(prompt)
    for _ in range(20):
        expected.append(int(np.argmax(logits_of(model, expected, longest=31)[-1])))
    assert list(found) == expected[len(prompt) :]


def log_likelihood(model: Decoder, context: list[int], continuation: list[int]) -> float:
    """From the logits of the whole sequence at once."""
    found = logits_of(model, context + continuation, longest=224).astype(np.float64)
    found -= np.log(np.exp(found - found.max(-1, keepdims=True)).sum(-1, keepdims=True)) + found.max(-1, keepdims=True)
    positions = np.arange(len(context), len(context) + len(continuation))
    return float(found[positions - 1, continuation].sum())


@pytest.mark.parametrize("name", [name for name in ONE_EACH if not name.startswith("phi3")] + ["phi3 with a window"])
def test_requests_that_share_long_beginnings_are_scored_as_alone(name: str, folders: Callable[[str], Path]) -> None:
    """Cached beginnings and rows that hold several continuations, with windows shorter than either."""
    model = convert.load(folders(name)).model
    context, other = np.tile(TOKENS[0], 5)[:180].tolist(), TOKENS[1, :9].tolist()
    ends = [TOKENS[1, a:b].tolist() for a, b in ((0, 3), (0, 14), (5, 17), (20, 21))]
    requests = [(context, end) for end in ends] + [(context + ends[1], ends[2]), (other, ends[0])]
    for (before, after), result in zip(requests, Engine(model).loglikelihood(requests), strict=True):
        assert result.value == pytest.approx(log_likelihood(model, before, after), abs=2e-3), (before, after)


@pytest.mark.parametrize("name", ["gemma3", "granite 4", "olmo3", "qwen2", "smollm3"])
def test_calibration_and_training_see_the_loss_of_the_model(name: str, folders: Callable[[str], Path]) -> None:
    """Both run layer by layer, from an embedding and to logits of their own."""
    model = convert.load(folders(name)).model
    losses = [-log_likelihood(model, row[:1].tolist(), row[1:].tolist()) for row in TOKENS]
    expected = sum(losses) / (TOKENS.size - len(TOKENS))
    stream = Stream(model, TOKENS)
    for i in range(model.config.num_hidden_layers):
        stream.advance(i)
    assert stream.loss() == pytest.approx(expected, rel=1e-5)
    parameters = parameters_of(model)
    sums = loss_sums(model.config, ({}, parameters, 1.0), None, {}, Objective(kl=0, ce=1), jnp.asarray(TOKENS))
    assert float(sums["ce"]) == pytest.approx(sum(losses), rel=1e-5)


def test_weight_decay_is_of_matrices_alone(folders: Callable[[str], Path]) -> None:
    """Biases of heads have two axes, and are none."""
    parameters = parameters_of(convert.load(folders("llama with biases")).model)
    zeros = {name: jnp.zeros_like(array) for name, array in parameters.items()}
    optimizer = Schedule(steps=2, learning_rate=1.0, weight_decay=0.5).optimizer()
    updates, _ = optimizer.update(zeros, optimizer.init(parameters), parameters)
    for name, update in updates.items():
        is_matrix = name in ("embed_tokens", "lm_head") or name.endswith("_proj")
        assert bool(np.any(np.asarray(update))) == is_matrix, name


def test_jax_compiles_layers_that_attend_alike_once(folders: Callable[[str], Path]) -> None:
    """Calibration runs one program for all layers of a kind: here the sliding ones and the others."""
    from gluprune_jax.pruning import calibration

    model = convert.load(folders("gemma3")).model
    jax.clear_caches()
    list_of_layers = calibration.collect(model, TOKENS).layers
    assert len(list_of_layers) == 4
    assert calibration.observe_layer._cache_size() == 2
