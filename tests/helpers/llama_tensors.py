"""The tensors of Llama models by the names of Hugging Face files, for tests that are about one family."""

from collections.abc import Iterator, Mapping
from typing import Any

from convert import loaded
from convert.families import names
from convert.families.names import TensorName
from convert.families.registry import FAMILIES
from gluprune_jax.models.config import ModelConfig
from gluprune_jax.models.decoder import Decoder
from gluprune_jax.models.parameters import abstract_model, parameters_of


def tensor_names(config: ModelConfig) -> list[TensorName]:
    return names.tensor_names(config, FAMILIES["llama"])


def model_arrays(model: Decoder) -> Iterator[tuple[TensorName, Any]]:
    arrays = parameters_of(model)
    for name in tensor_names(model.config):
        yield name, arrays[name.name]


def build_model(config: ModelConfig, arrays: Mapping[str, Any]) -> Decoder:
    return loaded.build_model(config, {name.name: arrays[name.hf] for name in tensor_names(config)})


def parameter_shapes(config: ModelConfig) -> dict[str, Any]:
    return {name.hf: leaf for name, leaf in model_arrays(abstract_model(config))}
