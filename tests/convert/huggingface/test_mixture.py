"""Mixtures of experts: pruned from file to file, the same function as the dense model without the removed neurons."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import commands
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from inspecting import contents
from numpy.typing import NDArray
from tiny_mixtures import CONFIGS, tensors_of, write_mixture
from tiny_models import hf_config, write_folder

import convert
from convert import sources
from convert.huggingface import folder as folders
from convert.huggingface.mixture_config import read_mixture_config, write_mixture_config
from convert.huggingface.safetensors import index_folder, read_tensor
from gluprune_jax import PruningPlan, make_plan, score
from gluprune_jax.errors import OperationError, RequestError
from gluprune_jax.prune import main
from gluprune_jax.pruning.criteria import CRITERIA, WEIGHT_CRITERIA
from gluprune_jax.pruning.mixture import mlp_names, of_each_mlp
from gluprune_jax.pruning.scores import Scores, mixture_fingerprint, score_mixture

TOKENS = np.random.default_rng(0).integers(3, 128, (2, 24))  # longer than the window
DENSE_LAYER = "qwen3_moe, a dense layer"


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    return commands.run(main, capsys, *argv)


def report(capsys: pytest.CaptureFixture[str], *argv: object) -> Any:
    return commands.report(main, capsys, *argv)


def opened(folder: Path, **options: Any) -> convert.MixtureCheckpoint:
    checkpoint = convert.open_mixture(folder, **options)
    assert checkpoint is not None
    return checkpoint


def scores_of(checkpoint: convert.MixtureCheckpoint, criterion: str = "ppm", **options: Any) -> Scores:
    return score_mixture(checkpoint.mlp_weights(), checkpoint.sizes, criterion, **options)


def read(folder: Path) -> dict[str, NDArray[Any]]:
    return {name: read_tensor(tensor) for name, tensor in index_folder(folder).items()}


# ---------------------------------------------------------------------------------------------------- what is kept


def by_hand(gate: NDArray[np.float32], up: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """PPM in float32, and the highest of it; of equals the lower index."""
    ppm = (gate.max(1) + abs(gate.min(1))) + (up.max(1) + abs(up.min(1)))
    return np.sort(np.argsort(-ppm, kind="stable")[:count])


@pytest.mark.parametrize("name", CONFIGS)
def test_each_expert_keeps_its_own_best_neurons(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = CONFIGS[name]
    path = write_mixture(tmp_path / "dense", config)
    done = report(capsys, "--model", path, "--prune-percent", "30", "--output", tmp_path / "out")
    dense, pruned = tensors_of(config), read(tmp_path / "out")
    plan = PruningPlan.load(tmp_path / "out" / "gluprune_plan.json")
    known = read_mixture_config(config)
    changed = set()
    for (gate, up, down), kept in zip(known.mlps, plan.kept, strict=True):
        F = len(dense[gate])
        expected = by_hand(dense[gate], dense[up], F - int(0.3 * F))
        np.testing.assert_array_equal(kept, expected)
        np.testing.assert_array_equal(pruned[gate], dense[gate][expected])
        np.testing.assert_array_equal(pruned[up], dense[up][expected])
        np.testing.assert_array_equal(pruned[down], dense[down][:, expected])
        changed |= {gate, up, down}
    assert len({tuple(kept) for kept in plan.kept}) == len(plan.kept)  # each another set
    assert pruned.keys() == dense.keys()
    for tensor in dense.keys() - changed:
        np.testing.assert_array_equal(pruned[tensor], dense[tensor])
    assert done["after"]["parameters"] == sum(values.size for values in pruned.values())
    assert done["before"]["bytes"] == sum(values.nbytes for values in dense.values())
    assert done["after"]["bytes"] == sum(values.nbytes for values in pruned.values())


@pytest.mark.parametrize("criterion", [*WEIGHT_CRITERIA, "random"])
def test_criteria_of_weights_alone(criterion: str, tmp_path: Path) -> None:
    config = CONFIGS[DENSE_LAYER]
    checkpoint, tensors = opened(write_mixture(tmp_path, config)), tensors_of(config)
    found = scores_of(checkpoint, criterion, seed=3)
    for i, (gate, up, _) in enumerate(checkpoint.config.mlps):
        inputs = [jnp.asarray(tensors[gate]), jnp.asarray(tensors[up])]
        if criterion == "random":
            inputs[1] = jax.random.fold_in(jax.random.key(3), i)
        np.testing.assert_array_equal(found.values[i], np.asarray(jax.jit(CRITERIA[criterion])(*inputs)))


def test_a_dense_layer_loses_the_same_share(tmp_path: Path) -> None:
    checkpoint = opened(write_mixture(tmp_path, CONFIGS[DENSE_LAYER]))
    scores = scores_of(checkpoint)
    for target, experts, dense in (
        ({"prune_percent": 25}, 18, 36),
        ({"width": 18}, 18, 36),
        ({"width": 17}, 17, 34),
        ({"expansion_ratio": "0.5"}, 16, 32),
        ({"prune_percent": 30, "multiple_of": 8}, 16, 32),
        ({"width": 23, "multiple_of": 5}, 20, 40),
    ):
        plan = make_plan(scores, **target)
        assert plan.widths == of_each_mlp((6, 0, 6), (experts, dense, experts)), target
    narrow = Scores("ppm", (np.arange(24.0), *[np.arange(8.0)]), 32, "", "", experts=(1, 0))
    assert make_plan(narrow, width=23).widths == (23, 8)  # a share of less than a neuron
    assert make_plan(narrow, prune_percent=5).widths == (23, 8)


def test_dtypes_are_kept_or_cast(tmp_path: Path) -> None:
    config = CONFIGS["olmoe"]
    tensors = tensors_of(config, dtype="bfloat16")
    tensors |= {name: values.astype(np.float32) for name, values in tensors.items() if "norm" in name}
    path = write_mixture(tmp_path / "mixed", config, tensors)
    for dtype in (None, "float16"):
        checkpoint = opened(path, dtype=dtype)
        plan = make_plan(scores_of(checkpoint), width=40)
        convert.save(checkpoint.pruned(plan), tmp_path / f"{dtype}")
        for name, values in read(tmp_path / f"{dtype}").items():
            expected = values.dtype.name == (dtype or tensors[name].dtype.name)
            assert expected, name
        written = json.loads((tmp_path / f"{dtype}" / "config.json").read_text())
        assert written["dtype"] == written["torch_dtype"] == (dtype or "bfloat16")
    huge = tensors_of(config)
    huge["model.layers.1.mlp.experts.3.up_proj.weight"][2, 2] = 1e6
    checkpoint = opened(write_mixture(tmp_path / "huge", config, huge), dtype="float16")
    with pytest.raises(RequestError, match=r"experts\.3\.up_proj\.weight holds values too large for float16"):
        scores_of(checkpoint)
    assert tensors["lm_head.weight"].dtype == ml_dtypes.bfloat16


# ---------------------------------------------------------------------------------------------------- transformers


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    """A mixture as transformers 5 makes and writes it, all weights random, and the model."""
    import torch
    import transformers

    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("references")

    def make(name: str) -> tuple[Path, Any]:
        config = transformers.AutoConfig.for_model(
            **json.loads(json.dumps({key: value for key, value in CONFIGS[name].items() if key != "architectures"}))
        )
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        generator = torch.Generator().manual_seed(0)
        for parameter, weight in sorted(model.named_parameters()):
            values = torch.randn(weight.shape, generator=generator)
            weight.data = 1 + 0.2 * values if parameter.endswith("norm.weight") else 0.15 * values
        model.tie_weights()
        model.save_pretrained(place / name)
        return place / name, model

    return make


def transformers_logits(model: Any) -> NDArray[np.float32]:
    import torch

    with torch.no_grad():
        found: NDArray[np.float32] = model(torch.tensor(TOKENS)).logits.float().numpy()
    return found


def zero_removed(model: Any, plan: PruningPlan) -> None:
    """Zeroes the columns of down of removed neurons, in the model as transformers 5 holds it."""
    kept = iter(plan.kept)
    for layer, count in zip(model.model.layers, plan.experts, strict=True):
        matrices = layer.mlp.experts.down_proj.data if count else layer.mlp.down_proj.weight.data[None]
        for matrix in matrices:
            removed = np.setdiff1d(np.arange(matrix.shape[1]), next(kept))
            matrix[:, removed] = 0


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("target", [("--prune-percent", "25"), ("--width", "8"), ("--expansion-ratio", "0.35")])
@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_5_computes_what_the_dense_model_does_without_the_neurons(
    name: str, target: tuple[str, str], references: Callable[[str], tuple[Path, Any]], tmp_path: Path
) -> None:
    """From the folder as transformers 5 writes it, and with the config that transformers 4 reads."""
    import torch
    import transformers

    source, model = references(name)
    dense = transformers_logits(model)
    as_4 = tmp_path / "classic"
    shutil.copytree(source, as_4)
    (as_4 / "config.json").write_text(json.dumps(CONFIGS[name]))
    for path, out in ((source, tmp_path / "from-5"), (as_4, tmp_path / "from-4")):
        assert commands.status(main, "--model", path, *target, "--output", out) == 0
    assert (tmp_path / "from-5" / "model.safetensors").read_bytes() == (
        tmp_path / "from-4" / "model.safetensors"
    ).read_bytes()
    zero_removed(model, PruningPlan.load(tmp_path / "from-5" / "gluprune_plan.json"))
    expected = transformers_logits(model)
    assert np.abs(expected - dense).max() > 1e-2
    for out in ("from-5", "from-4"):
        pruned, loading = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / out, dtype=torch.float32, output_loading_info=True
        )
        assert not any(loading.values()), loading
        np.testing.assert_allclose(transformers_logits(pruned), expected, rtol=0, atol=1e-5)


TRANSFORMERS_4 = """
import json, sys, torch, transformers
assert transformers.__version__.startswith("4.")
torch.set_num_threads(1)
tokens = torch.tensor(json.loads(sys.argv[1]))
answers = {}
for folder in sys.argv[2:]:
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(loading.values()), loading
    with torch.no_grad():
        answers[folder] = model(tokens).logits.tolist()
json.dump(answers, sys.stdout)
"""


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
def test_transformers_4_computes_what_the_dense_model_does_without_the_neurons(
    references: Callable[[str], tuple[Path, Any]], tmp_path: Path
) -> None:
    python = os.environ.get("GLUPRUNE_TRANSFORMERS4_PYTHON")
    if not python:
        pytest.skip("GLUPRUNE_TRANSFORMERS4_PYTHON names no Python with transformers 4")
    paths: dict[str, tuple[Path, Path]] = {}
    for number, (name, config) in enumerate(CONFIGS.items()):
        source, _ = references(name)
        out = tmp_path / f"pruned-{number}"
        assert commands.status(main, "--model", source, "--prune-percent", "30", "--output", out) == 0
        plan, dense = PruningPlan.load(out / "gluprune_plan.json"), read(source)
        for (gate, up, down), kept in zip(read_mixture_config(config).mlps, plan.kept, strict=True):
            removed = np.setdiff1d(np.arange(len(dense[gate])), kept)
            dense[gate][removed], dense[up][removed], dense[down][:, removed] = 0, 0, 0
        paths[name] = write_mixture(tmp_path / f"masked-{number}", config, dense), out
    argv = [str(path) for pair in paths.values() for path in pair]
    done = subprocess.run(
        [python, "-W", "ignore", "-c", TRANSFORMERS_4, json.dumps(TOKENS.tolist()), *argv],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answers = json.loads(done.stdout)
    for name, (expected, found) in paths.items():
        ours, theirs = np.asarray(answers[str(found)]), np.asarray(answers[str(expected)])
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_width_that_cannot_be_grouped_runs_too(
    dtype: str, references: Callable[[str], tuple[Path, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By default transformers 5 multiplies all experts at once, which fails unless 8 divides their width."""
    import torch
    import transformers

    source, _ = references("olmoe")
    _, _, err = run(capsys, "--model", source, "--width", "17", "--output", tmp_path / "odd")
    assert "no multiple of 8, which transformers 5 needs" in err
    assert "--multiple-of 8" in err
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "odd", dtype=getattr(torch, dtype))
    assert np.isfinite(transformers_logits(model)).all()
    assert 'experts_implementation "eager"' in (tmp_path / "odd" / "README.md").read_text()
    _, _, err = run(capsys, "--model", tmp_path / "odd", "--width", "16", "--output", tmp_path / "even")
    assert "multiple" not in err
    assert "experts_implementation" not in json.loads((tmp_path / "even" / "config.json").read_text())


# ---------------------------------------------------------------------------------------------------- config.json


@pytest.mark.parametrize("name", CONFIGS)
def test_the_config_is_kept_but_for_widths_and_spellings(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name] | {"own_key": [1, None], "eos_token_id": [2, 5], "pad_token_id": None}
    checkpoint = opened(write_mixture(tmp_path / "in", config))
    plan = make_plan(scores_of(checkpoint), width=16)
    convert.save(checkpoint.pruned(plan), tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    rope = config.get("rope_scaling")
    is_qwen = config["model_type"] == "qwen3_moe"
    expected = {
        "num_experts": 6,
        "num_local_experts": 6,
        "moe_intermediate_size" if is_qwen else "intermediate_size": 16,
        "rope_scaling": rope and rope | {"attention_factor": 0.1 * np.log(4) + 1, "beta_fast": 32.0, "beta_slow": 1.0},
        "dtype": "float32",
        "torch_dtype": "float32",
    } | ({"intermediate_size": 32} if name == DENSE_LAYER else {})
    parameters = written.pop("rope_parameters")
    assert written == config | expected
    assert parameters == (expected["rope_scaling"] or {"rope_type": "default"}) | {"rope_theta": config["rope_theta"]}
    again = read_mixture_config(written | {"rope_parameters": parameters})
    assert again.sizes == plan.pruned_sizes(checkpoint.sizes)
    assert again.rope == checkpoint.config.rope


def test_absent_keys_mean_what_transformers_takes_them_for() -> None:
    for name, sizes in (
        ("qwen3_moe", (24, 128, 768, 64)),
        ("olmoe", (16, 64, 2048, 128)),
        ("mixtral", (32, 8, 14336, 128)),
    ):
        config = read_mixture_config({"model_type": name})
        assert (
            config.sizes.num_hidden_layers,
            config.sizes.experts[0],
            config.sizes.intermediate_sizes[0],
            config.head_dim,
        ) == sizes
        assert config.rope.theta == (1e6 if name == "mixtral" else 1e4)
    # Null is the number of heads, and no head_dim in qwen3_moe.
    assert read_mixture_config(CONFIGS["mixtral"] | {"num_key_value_heads": None}).num_key_value_heads == 4
    null = read_mixture_config(CONFIGS["qwen3_moe"] | {"head_dim": None, "tie_word_embeddings": None})
    assert null.head_dim == 8
    written = write_mixture_config(null, null.sizes, np.dtype(np.float32))
    assert {"head_dim", "tie_word_embeddings"}.isdisjoint(written)


@pytest.mark.parametrize(
    ("keys", "experts"),
    [
        ({"mlp_only_layers": None}, (6, 6, 6)),
        ({"mlp_only_layers": [0, 2]}, (0, 6, 0)),
        ({"decoder_sparse_step": 2}, (0, 6, 0)),
        ({"decoder_sparse_step": 3, "mlp_only_layers": [0]}, (0, 0, 6)),
    ],
)
def test_which_layers_have_experts(keys: dict[str, Any], experts: tuple[int, ...]) -> None:
    config = read_mixture_config(CONFIGS["qwen3_moe"] | keys)
    assert config.sizes.experts == experts
    assert config.sizes.intermediate_sizes == tuple(24 if count else 48 for count in experts)
    assert len(mlp_names(experts)) == len(config.mlps)


BAD_CONFIGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "two counts": ("mixtral", {"num_experts": 4}, "num_experts 4 and num_local_experts 6, which must be the same"),
    "no experts": ("olmoe", {"num_experts": 0}, "num_experts = 0; it must be a whole number from 1"),
    "all layers dense": ("qwen3_moe", {"mlp_only_layers": [0, 1, 2]}, "leave no layer with experts"),
    "no list": ("qwen3_moe", {"mlp_only_layers": "0"}, "mlp_only_layers = '0'; it must be a list of layers, or null"),
    "no step": ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step = 0"),
    "no width": ("qwen3_moe", {"moe_intermediate_size": None}, "no moe_intermediate_size"),
    "another head": ("mixtral", {"architectures": ["MixtralForSequenceClassification"]}, "architectures "),
    "quantised": ("mixtral", {"quantization_config": {"quant_method": "awq"}}, "quantization_config = "),
    "heads of a size of their own": ("olmoe", {"head_dim": 16}, "head_dim 16, which transformers 4 does not read"),
    "heads that do not divide": ("mixtral", {"num_attention_heads": 3}, "hidden_size 32, which 3 heads do not divide"),
    "two thetas": ("mixtral", {"rope_parameters": {"rope_theta": 3.0}}, "says two things about RoPE"),
    "dynamic": ("olmoe", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
    "damaged": ("olmoe", {"num_experts": 10**6, "num_hidden_layers": 10**4}, "supported are 1,000,000 in all"),
}


@pytest.mark.parametrize("what", BAD_CONFIGS)
def test_configs_that_cannot_be_are_refused(what: str, tmp_path: Path) -> None:
    name, keys, message = BAD_CONFIGS[what]
    path = write_mixture(tmp_path, CONFIGS[name])
    (path / "config.json").write_text(json.dumps(CONFIGS[name] | keys))
    with pytest.raises(RequestError, match=f"config.json.*{message}") as caught:
        convert.open_mixture(path)
    assert len(str(caught.value)) <= 470


# ---------------------------------------------------------------------------------------------------- tensors

EXPERT = "model.layers.1.mlp.experts.3"


def packed(tensors: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """As transformers 5 holds them in memory."""
    rest = {name: values for name, values in tensors.items() if ".experts." not in name}
    for i in range(3):
        downs = [tensors[f"model.layers.{i}.mlp.experts.{e}.down_proj.weight"] for e in range(6)]
        rest[f"model.layers.{i}.mlp.experts.down_proj"] = np.stack(downs)
    return rest


BAD_TENSORS: dict[str, tuple[Callable[[dict[str, NDArray[Any]]], dict[str, NDArray[Any]]], type[Exception], str]] = {
    "a narrower expert": (
        lambda t: t | {f"{EXPERT}.gate_proj.weight": np.zeros((20, 32), np.float32)},
        OperationError,
        rf"{EXPERT}.gate_proj.weight has shape \[20, 32\], config.json means \[48, 32\] \(all experts have one width, "
        r"intermediate_size\)",
    ),
    "an expert that is missing": (
        lambda t: {name: values for name, values in t.items() if not name.startswith(EXPERT)},
        OperationError,
        rf"the tensors do not match config.json: missing {EXPERT}.gate_proj.weight, .*",
    ),
    "an expert too many": (
        lambda t: t | {f"model.layers.1.mlp.experts.6.{x}.weight": np.zeros((2, 2), np.float32) for x in "ab"},
        OperationError,
        r"unexpected model.layers.1.mlp.experts.6.a.weight",
    ),
    "no router": (
        lambda t: {name: values for name, values in t.items() if name != "model.layers.2.mlp.gate.weight"},
        OperationError,
        r"missing model.layers.2.mlp.gate.weight",
    ),
    "a router of other experts": (
        lambda t: t | {"model.layers.0.mlp.gate.weight": np.zeros((5, 32), np.float32)},
        OperationError,
        r"model.layers.0.mlp.gate.weight has shape \[5, 32\], config.json means \[6, 32\]",
    ),
    "packed": (
        packed,
        RequestError,
        r"model.layers.0.mlp.experts.down_proj, .* hold several experts in one tensor; accepted: "
        r"model.layers.2.mlp.experts.5.gate_proj.weight, ",
    ),
    "packed otherwise": (
        lambda t: t | {"model.layers.0.block_sparse_moe.input_linear.weight": np.zeros((6, 2, 2), np.float32)},
        RequestError,
        r"block_sparse_moe.input_linear.weight hold several experts",
    ),
    "quantised": (
        lambda t: t | {f"{EXPERT}.gate_proj.qweight": np.zeros((2, 2), np.float32)},
        RequestError,
        "belong to quantised weights",
    ),
}


@pytest.mark.parametrize("what", BAD_TENSORS)
def test_tensors_that_do_not_match_are_refused(what: str, tmp_path: Path) -> None:
    change, kind, message = BAD_TENSORS[what]
    path = write_mixture(tmp_path, CONFIGS["olmoe"], change(tensors_of(CONFIGS["olmoe"])))
    with pytest.raises(kind, match=message):
        convert.open_mixture(path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("tensor", [f"{EXPERT}.up_proj.weight", "model.layers.1.mlp.gate.weight"])
def test_nan_is_named_and_nothing_is_written(
    tensor: str, value: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = tensors_of(CONFIGS["olmoe"])
    tensors[tensor][1, 1] = value
    path = write_mixture(tmp_path / "in", CONFIGS["olmoe"], tensors)
    status, _, err = run(capsys, "--model", path, "--width", "16", "--output", tmp_path / "out")
    assert status == 1
    assert f"{tensor} has NaN or Inf weights" in err
    assert os.listdir(tmp_path) == ["in"]


def test_a_tied_head_in_the_file(tmp_path: Path) -> None:
    config, name = CONFIGS[DENSE_LAYER], "lm_head.weight"
    tensors = tensors_of(config)
    assert name not in tensors
    same = write_mixture(tmp_path / "same", config, tensors | {name: tensors["model.embed_tokens.weight"]})
    checkpoint = opened(same)
    assert any("equals the tied embedding" in note for note in checkpoint.notes)
    assert name not in checkpoint.tensors()
    other = write_mixture(tmp_path / "other", config, tensors | {name: tensors["model.embed_tokens.weight"] + 1})
    with pytest.raises(OperationError, match="differs from the embedding"):
        convert.open_mixture(other)


# ---------------------------------------------------------------------------------------------------- plans


def test_a_plan_is_replayed_and_read_as_it_was_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_mixture(tmp_path / "in", CONFIGS[DENSE_LAYER])
    plan_file = tmp_path / "plan.json"
    report(capsys, "--model", path, "--width", "16", "--criterion", "l2", "--plan-out", plan_file)
    plan = PruningPlan.load(plan_file)
    assert plan.to_json() == plan_file.read_text()
    data = json.loads(plan_file.read_text())
    assert data["source"]["experts"] == [6, 0, 6]
    assert data["source"]["intermediate_sizes"] == [24, 48, 24]
    assert data["widths"] == [16, 32, 16]
    assert [row.get("expert") for row in data["layers"]] == [*range(6), None, *range(6)]
    report(capsys, "--model", path, "--plan", plan_file, "--output", tmp_path / "replayed")
    report(capsys, "--model", path, "--width", "16", "--criterion", "l2", "--output", tmp_path / "direct")
    a, b = contents(tmp_path / "replayed"), contents(tmp_path / "direct")
    assert a.keys() == b.keys()
    assert [name for name in a if a[name] != b[name]] == ["README.md"]  # its last line is the command
    assert json.loads(a["gluprune_history.json"])[0]["widths"] == [16, 32, 16]


def test_a_plan_is_for_the_model_that_it_was_made_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_mixture(tmp_path / "in", CONFIGS["qwen3_moe"])
    plan = make_plan(scores_of(opened(path)), width=16)
    plan.save(tmp_path / "plan.json")
    ordinary = write_folder(tmp_path / "llama", hf_config())
    other = write_mixture(tmp_path / "other", CONFIGS[DENSE_LAYER])
    weights = write_mixture(tmp_path / "weights", CONFIGS["qwen3_moe"], tensors_of(CONFIGS["qwen3_moe"], seed=1))
    for model, message in (
        (
            ordinary,
            "the plan was made for 18 experts in 3 layers, MLPs of 24 neurons at hidden size 32; this model has",
        ),
        (other, "this model has 12 experts in 3 layers, MLPs of 24 to 48 neurons at hidden size 32"),
        (weights, "the plan was made for other weights"),
    ):
        status, _, err = run(capsys, "--model", model, "--plan", tmp_path / "plan.json", "--output", tmp_path / "out")
        assert status == 2
        assert message in err
    dense = convert.load(ordinary)
    with pytest.raises(RequestError, match="the plan was made for 18 experts"):
        dense.pruned(plan)
    with pytest.raises(RequestError, match="a mixture of experts, which cannot be run under a mask"):
        plan.masks(dense.config)
    make_plan(score(dense.model), width=16).save(tmp_path / "ordinary.json")
    status, _, err = run(capsys, "--model", path, "--plan", tmp_path / "ordinary.json", "--dry-run")
    assert status == 2
    assert "the plan was made for 3 layers of" in err


def test_a_plan_with_as_many_layers_as_there_are_experts_does_not_fit(tmp_path: Path) -> None:
    """Widths and hidden size alone would be the same."""
    checkpoint = opened(write_mixture(tmp_path / "in", CONFIGS["olmoe"]))
    ordinary = Scores("ppm", tuple(np.arange(48.0, dtype=np.float32) for _ in range(18)), 32, "float32", "sha256:0")
    with pytest.raises(RequestError, match=r"made for 18 layers of 48 neurons .* this model has 18 experts"):
        checkpoint.pruned(make_plan(ordinary, width=8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data["source"].update(experts=[6, 6, 0]), "it must have 13 MLPs, those of `experts` numbered"),
        (lambda data: data["source"].update(experts=[6, 10**9, 6]), "experts is .* a line each, which are 13"),
        (lambda data: data["source"].update(experts=[6, 0]), "one number for each of 3 layers"),
        (lambda data: data["source"].update(experts=[0, 0, 0]), "experts is"),
        (lambda data: data["source"].update(experts="6"), "source.experts is '6'"),
        (lambda data: data["layers"][3].update(expert=4), "numbered in each layer"),
        (lambda data: data["layers"][3].update(kept="0-14"), "must keep equally many neurons"),
        (lambda data: data["layers"][3].update(kept="0-99"), "layer 0, expert 3, keeps '0-99'"),
        (lambda data: data["source"].pop("experts"), "it must have 3 layers"),
        (lambda data: data.update(sha256="0" * 64), "sha256"),
    ],
)
def test_damaged_plans_are_refused(change: Callable[[Any], None], message: str, tmp_path: Path) -> None:
    plan = make_plan(scores_of(opened(write_mixture(tmp_path, CONFIGS[DENSE_LAYER]))), width=16)
    data = json.loads(plan.to_json())
    change(data)
    with pytest.raises(OperationError, match=message):
        PruningPlan.from_json(json.dumps(data))


def test_pruned_twice_is_pruned_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_mixture(tmp_path / "in", CONFIGS[DENSE_LAYER])
    report(capsys, "--model", path, "--width", "20", "--output", tmp_path / "20")
    report(capsys, "--model", tmp_path / "20", "--width", "16", "--output", tmp_path / "twice")
    report(capsys, "--model", path, "--width", "16", "--output", tmp_path / "once")
    twice, once = contents(tmp_path / "twice"), contents(tmp_path / "once")
    for name in ("model.safetensors", "config.json"):
        assert twice[name] == once[name]
    assert len(json.loads(twice["gluprune_history.json"])) == 2
    assert "- Step 1 before this: pruned: ppm, width 20" in twice["README.md"].decode()
    checkpoint = opened(path)  # and without writing in between
    for width in (20, 16):
        checkpoint = checkpoint.pruned(make_plan(scores_of(checkpoint), width=width))
    convert.save(checkpoint, tmp_path / "memory")
    assert (tmp_path / "memory" / "model.safetensors").read_bytes() == once["model.safetensors"]


# ---------------------------------------------------------------------------------------------------- the command


def test_bytes_are_the_same_each_time_and_in_any_number_of_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_mixture(tmp_path / "in", CONFIGS["mixtral"])
    (path / "tokenizer_config.json").write_text("{}")
    argv = ("--model", path, "--prune-percent", "25", "--output", tmp_path / "out", "--overwrite")
    report(capsys, *argv)
    first = contents(tmp_path / "out")
    report(capsys, *argv)
    assert contents(tmp_path / "out") == first
    assert "tokenizer_config.json" in first
    one = read(tmp_path / "out")
    monkeypatch.setattr(folders, "MAX_SHARD_BYTES", 50_000)
    report(capsys, *argv)
    several = read(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    assert one.keys() == several.keys()
    for name, values in one.items():
        np.testing.assert_array_equal(several[name], values)
    status, _, _ = run(capsys, "--model", tmp_path / "out", "--width", "8", "--output", tmp_path / "again")
    assert status == 0


def test_a_dry_run_says_what_would_be_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_mixture(tmp_path / "in", CONFIGS[DENSE_LAYER])
    argv = ("--model", path, "--prune-percent", "25")
    dry = report(capsys, *argv, "--output", tmp_path / "out", "--dry-run")
    assert os.listdir(tmp_path) == ["in"]
    wet = report(capsys, *argv, "--output", tmp_path / "out")
    assert all(dry[key] == wet[key] for key in ("plan", "before", "after", "hidden_size"))
    assert dry["before"]["experts"] == [6, 0, 6]
    assert dry["after"]["intermediate_sizes"] == [18, 36, 18]
    assert dry["after"]["expansion_ratio"] == 18 / 32
    status, out, _ = run(capsys, *argv, "--dry-run")
    assert status == 0
    assert "6 experts in 2 layers; dense layers lose the same share" in out
    assert "zero-padded" not in out


def test_the_card_says_what_was_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_mixture(tmp_path / "in", CONFIGS[DENSE_LAYER])
    report(capsys, "--model", path, "--width", "16", "--output", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    for line in (
        "tags: [gluprune, pruned, qwen3_moe]",
        "Structured width pruning of the experts, which are GLU MLPs (arXiv 2512.22671) with gluprune_jax.",
        "| intermediate size of an expert | 24 | 16 |",
        "| intermediate size of a dense layer | 48 | 32 |",
        '- Target: width 16, multiple of 1, layers "all"',
    ):
        assert line in card.splitlines()
    assert "padded" not in card


RUNS = {
    "calibration": ("--calibration-data", "x.txt", "--criterion", "hybrid"),
    "a criterion": ("--criterion", "wanda"),
    "compensation": ("--compensate", "least-squares"),
    "order": ("--sequential",),
    "statistics": ("--statistics", "s.npz"),
    "evaluation": ("--evaluate",),
    "a sample": ("--sample", "Hello"),
    "dropped layers": ("--drop-layers", "1"),
    "layers": ("--layers", "0-1"),
    "an allocation": ("--allocation", "global"),
    "least layers": ("--drop-least", "1"),
    "orbax": ("--format", "hf,orbax"),
    "memory": ("--no-stream",),
    "a mesh": ("--mesh", "data=1,model=1"),
}


@pytest.mark.parametrize("what", RUNS)
def test_what_needs_a_model_that_runs_is_refused(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_mixture(tmp_path / "in", CONFIGS["mixtral"])
    argv = ("--model", path, "--prune-percent", "25", "--output", tmp_path / "out", *RUNS[what])
    status, _, err = run(capsys, *argv)
    assert status == 2
    flag = next(part for part in RUNS[what] if part.startswith("--"))
    assert f"{flag}" in err
    assert "a mixture of experts is pruned from file to file, without running it" in err
    assert "possible are criteria of weights alone (ppm, vow, pon, l2, random)" in err
    assert err.count("\n") == 1
    assert len(err) <= 501
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (("--width", "48"), "a width of 48 would not shrink layers.0.experts.0, which has 48 neurons"),
        (("--width", "49"), "a width of 49 would grow layers.0.experts.0"),
        (("--expansion-ratio", "2"), "a width of 64 would grow layers.0.experts.0"),
        (("--width", "4", "--multiple-of", "8"), "leaves layers.0.experts.0 no neuron"),
    ],
)
def test_widths_that_cannot_be_are_refused(
    target: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_mixture(tmp_path / "in", CONFIGS["olmoe"])
    status, _, err = run(capsys, "--model", path, *target, "--output", tmp_path / "out")
    assert (status, message in err) == (2, True), err


def test_it_is_not_loaded_in_any_other_way(tmp_path: Path) -> None:
    path = write_mixture(tmp_path / "in", CONFIGS["olmoe"])
    message = r"model_type 'olmoe', a mixture of experts, which is pruned from file to file by its weights alone"
    for load in (convert.load, convert.describe, lambda name: convert.load(name, stream=True)):
        with pytest.raises(RequestError, match=message):
            load(path)
    checkpoint = opened(path)
    with pytest.raises(RequestError, match="`format` orbax is written of dense models"):
        convert.save(checkpoint, tmp_path / "out", formats=["orbax"])
    for options in ({"layers": [0]}, {"drop_layers": [0]}):
        with pytest.raises(RequestError, match="cannot be given for a mixture of experts"):
            make_plan(scores_of(checkpoint), prune_percent=25, **options)
    with pytest.raises(RequestError, match="criterion 'hybrid' looks at activations, and a mixture of experts"):
        scores_of(checkpoint, "hybrid")
    assert convert.open_mixture(write_folder(tmp_path / "llama", hf_config())) is None
    assert convert.open_mixture(tmp_path / "nothing") is None


def test_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_mixture(tmp_path / "snapshot", CONFIGS["mixtral"])
    monkeypatch.setattr(sources, "hub_snapshot", lambda name, revision: path / (revision or ""))
    report(capsys, "--model", "owner/mixture", "--width", "16", "--output", tmp_path / "out")
    assert "base_model: owner/mixture" in (tmp_path / "out" / "README.md").read_text()
    status, _, err = run(capsys, "--model", "owner/mixture", "--width", "16", "--evaluate")
    assert status == 2
    assert "--evaluate cannot be given for owner/mixture: a mixture of experts" in err
    status, _, err = run(capsys, "--model", path, "--revision", "main", "--width", "16", "--dry-run")
    assert status == 2
    assert "--revision main belongs to a hub id" in err


KILLED = """
import sys, time
import convert.huggingface.mixture as mixture
from gluprune_jax.prune import main

def slow(*args):
    print("weights written", flush=True)
    time.sleep(600)
mixture.write_texts = slow
main(sys.argv[1:])
"""


@pytest.mark.parametrize("old", [False, True])
def test_kill_9_in_the_middle_of_writing(old: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = write_mixture(tmp_path / "model", CONFIGS["mixtral"]), tmp_path / "out"
    if old:
        report(capsys, "--model", path, "--width", "40", "--output", out)
    before = contents(out) if old else None
    argv = ["--model", str(path), "--width", "16", "--output", str(out), "--overwrite"]
    process = subprocess.Popen([sys.executable, "-c", KILLED, *argv], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "weights written\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert (contents(out) if out.exists() else None) == before
    report(capsys, *argv)
    assert sorted(os.listdir(tmp_path)) == ["model", "out"]
    assert opened(out).sizes.intermediate_sizes == (16,) * 3


def test_a_few_tensors_in_memory(tmp_path: Path) -> None:
    config = CONFIGS["mixtral"] | {"hidden_size": 128, "intermediate_size": 256, "num_local_experts": 24}
    tensors = tensors_of(config)
    path = write_mixture(tmp_path / "model", config, tensors)
    total = sum(values.nbytes for values in tensors.values())
    matrix = tensors["model.layers.0.block_sparse_moe.experts.0.w1.weight"].nbytes
    del tensors

    def prune(out: str) -> None:
        checkpoint = opened(path)
        convert.save(checkpoint.pruned(make_plan(scores_of(checkpoint), width=128)), tmp_path / out)

    prune("warm")
    tracemalloc.start()
    try:
        prune("out")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < total / 8
    assert peak < 20 * matrix


def test_the_fingerprint_is_that_of_the_weights(tmp_path: Path) -> None:
    config = CONFIGS["olmoe"]
    checkpoint = opened(write_mixture(tmp_path / "a", config))
    found = mixture_fingerprint(checkpoint.mlp_weights(), checkpoint.sizes)
    assert found == scores_of(checkpoint, "l2").fingerprint
    swapped = tensors_of(config)
    a, b = (f"model.layers.0.mlp.experts.{e}.gate_proj.weight" for e in (0, 1))
    swapped[a], swapped[b] = swapped[b], swapped[a]
    other = opened(write_mixture(tmp_path / "b", config, swapped))
    assert mixture_fingerprint(other.mlp_weights(), other.sizes) != found
