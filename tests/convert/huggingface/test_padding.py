"""Widths rounded up with neurons of zeros in Hugging Face folders: written, recorded, and taken away by reading."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from inspecting import contents
from jax.sharding import Mesh
from safetensors.numpy import load_file, save_file
from tiny_families import CONFIGS
from tiny_mixtures import CONFIGS as MIXTURES
from tiny_mixtures import write_mixture
from tiny_models import hf_config, hf_tensors, write_folder

import convert
from convert.families.names import grouped, tensor_names
from convert.families.registry import FAMILIES
from convert.huggingface.config import file_width, read_config
from gluprune_jax import make_plan, score
from gluprune_jax.errors import OperationError, RequestError
from gluprune_jax.models.decoder import Decoder
from gluprune_jax.parallel.mesh import MeshShape, make_mesh
from gluprune_jax.pruning.targets import padded_width

CONFIG = hf_config(num_hidden_layers=3, intermediate_size=120)  # 120 neurons a layer


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "model", CONFIG, hf_tensors(CONFIG))


def arrays(path: Path, **options: Any) -> dict[str, np.ndarray]:
    flat = nnx.to_flat_state(nnx.state(convert.load(path, **options).model, nnx.Param))
    return {str(at): np.asarray(variable.get_value()) for at, variable in flat}


def two_devices(model: Decoder) -> Mesh:
    return make_mesh(MeshShape(1, 2), model.config.num_key_value_heads, devices=jax.devices()[:2])


def assert_same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name, array in a.items():
        np.testing.assert_array_equal(array, b[name], err_msg=name)


@pytest.mark.parametrize(
    ("width", "multiple", "wanted"), [(7373, 256, 7424), (7424, 256, 7424), (5, 1, 5), (1, 32, 32)]
)
def test_a_width_is_rounded_up(width: int, multiple: int, wanted: int) -> None:
    assert padded_width(width, multiple) == wanted
    assert file_width((1, width), multiple) == wanted


@pytest.mark.parametrize("stream", [True, False])
def test_zeros_are_appended_recorded_and_taken_away(model: Path, tmp_path: Path, stream: bool) -> None:
    dense = convert.load(model, stream=stream)
    pruned = dense.pruned(make_plan(score(dense.model, weights=dense.mlp_weights()), width=77))
    convert.save(pruned, tmp_path / "plain")
    convert.save(pruned, tmp_path / "padded", pad_to=32, formats=["hf", "orbax"])
    config = json.loads((tmp_path / "padded" / "config.json").read_text())
    assert (config["intermediate_size"], config["gluprune"]) == (96, {"intermediate_sizes": [77] * 3})
    plain, padded = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "padded"))
    for name, tensor in padded.items():
        axis = {"down_proj": 1, "gate_proj": 0, "up_proj": 0}.get(name.split(".")[-2])
        if axis is None:
            np.testing.assert_array_equal(tensor, plain[name])
        else:
            real, zeros = np.split(tensor, [77], axis)
            np.testing.assert_array_equal(real, plain[name])
            assert zeros.shape[axis] == 19
            assert not zeros.any()
    for path in (tmp_path / "padded", tmp_path / "padded" / "orbax"):
        assert_same(arrays(path), arrays(tmp_path / "plain"))


def test_pruning_it_again_ranks_true_neurons_alone(model: Path, tmp_path: Path) -> None:
    results = []
    for pad_to in (1, 64):
        once, twice = tmp_path / f"once-{pad_to}", tmp_path / f"twice-{pad_to}"
        convert.save(
            convert.load(model).pruned(make_plan(score(convert.load(model).model), width=77)), once, pad_to=pad_to
        )
        for stream in (True, False):
            again = convert.load(once, stream=stream)
            scores = score(again.model, "l2", weights=again.mlp_weights())
            assert [len(values) for values in scores.values] == [77] * 3
            convert.save(again.pruned(make_plan(scores, width=70)), twice, overwrite=stream is False)
            results.append({name: data for name, data in contents(twice).items() if name != "gluprune_history.json"})
    assert all(result == results[0] for result in results)


def test_a_width_that_is_a_multiple_is_written_as_without(model: Path, tmp_path: Path) -> None:
    checkpoint = convert.load(model)
    for pad_to in (1, 8, 40):
        convert.save(checkpoint, tmp_path / str(pad_to), pad_to=pad_to)
    assert contents(tmp_path / "8") == contents(tmp_path / "1") == contents(tmp_path / "40")


def test_layers_that_differ_are_padded_to_one_multiple(model: Path, tmp_path: Path) -> None:
    dense = convert.load(model)
    pruned = dense.pruned(make_plan(score(dense.model), width=60, layers=[1]))
    convert.save(pruned, tmp_path / "out", pad_to=50)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["intermediate_size"] == 150
    assert convert.load(tmp_path / "out").config.intermediate_sizes == (120, 60, 120)


def test_it_is_read_onto_a_mesh(model: Path, tmp_path: Path) -> None:
    convert.save(convert.load(model), tmp_path / "padded", pad_to=256)
    assert_same(arrays(tmp_path / "padded", mesh=two_devices), arrays(model, mesh=two_devices))


@pytest.mark.parametrize("name", ["phi3", "gemma3", "qwen2", "olmo2"])
def test_families(tmp_path: Path, name: str) -> None:
    """Phi-3 has gate and up projections in one tensor, one under the other."""
    config = CONFIGS[next(key for key in CONFIGS if key.startswith(name))]
    rng = np.random.default_rng(0)
    names = grouped(tensor_names(read_config(config)[0], FAMILIES[config["model_type"]]), "hf")
    shapes = {hf: (sum(part.shape[0] for part in parts), *parts[0].shape[1:]) for hf, parts in names.items()}
    tensors = {hf: rng.standard_normal(shape, np.float32) for hf, shape in shapes.items()}
    model = write_folder(tmp_path / "model", config, tensors)
    convert.save(convert.load(model), tmp_path / "padded", pad_to=64)
    assert json.loads((tmp_path / "padded" / "config.json").read_text())["intermediate_size"] == 128
    assert_same(arrays(tmp_path / "padded"), arrays(model))
    assert_same(arrays(tmp_path / "padded", mesh=two_devices), arrays(model, mesh=two_devices))


# ---------------------------------------------------------------------------------------------------- bad input


def test_weights_where_there_should_be_padding(model: Path, tmp_path: Path) -> None:
    convert.save(convert.load(model), tmp_path / "padded", pad_to=256)
    file = tmp_path / "padded" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][120, 3] = 1.0
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(OperationError, match=r"has weights beyond neuron 119.*gluprune\.intermediate_sizes"):
        convert.load(tmp_path / "padded")


@pytest.mark.parametrize(
    ("pad_to", "formats", "message"),
    [
        (0, ["hf"], "`pad_to` is 0; it must lie between 1 and 4096"),
        (-256, ["hf"], "`pad_to` is -256"),
        (4097, ["hf"], "`pad_to` is 4097"),
        (256, ["orbax"], "`pad_to` 256 has no effect with `format` orbax: Orbax has the true widths"),
    ],
)
def test_no_such_padding(model: Path, tmp_path: Path, pad_to: int, formats: list[str], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        convert.save(convert.load(model), tmp_path / "out", pad_to=pad_to, formats=formats)
    assert not (tmp_path / "out").exists()


def test_experts_are_not_padded(tmp_path: Path) -> None:
    mixture = convert.open_mixture(write_mixture(tmp_path / "model", next(iter(MIXTURES.values()))))
    assert mixture is not None
    with pytest.raises(RequestError, match=r"`pad_to` pads no experts.*give `multiple_of`"):
        convert.save(mixture, tmp_path / "out", pad_to=8)
