"""Extremes found on the host have the bits of those that compiled programs find."""

import itertools
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from gluprune_jax.pruning import extents
from gluprune_jax.pruning.choices import CRITERION_INPUTS, WEIGHT_CRITERION_NAMES
from gluprune_jax.pruning.criteria import CRITERIA, WEIGHT_CRITERIA, inputs_of
from gluprune_jax.pruning.device_scores import matrix_extents
from gluprune_jax.pruning.extents import host_extents

DTYPES = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))


def special(dtype: np.dtype[Any]) -> NDArray[Any]:
    """Rows of zeros of either sign, of one sign alone, of subnormal and of the largest numbers."""
    limit = ml_dtypes.finfo(dtype)
    rows = [
        [0.0, -0.0],
        [-0.0, -0.0],
        [-1.0, -2.0],
        [3.0, 1.0],
        [float(limit.max), float(limit.min)],
        [float(limit.smallest_subnormal), -float(limit.smallest_subnormal)],
        [-float(limit.max), -0.0],
    ]
    return np.array(rows, dtype)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (300, 129), (64, 4096)])
def test_the_same_bits_as_on_a_device(
    monkeypatch: pytest.MonkeyPatch,
    dtype: np.dtype[Any],
    axis: int,
    shape: tuple[int, int],
) -> None:
    weights = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    finite, device = matrix_extents(weights, axis)
    for block in (extents._BLOCK, 1, 1000):  # several blocks of rows, down to one row
        monkeypatch.setattr(extents, "_BLOCK", block)
        is_finite, host = host_extents(weights, axis)
        assert is_finite
        assert bool(finite)
        assert host.dtype == np.float32
        assert host.tobytes() == np.asarray(device).tobytes()


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_subnormal_and_largest_numbers(dtype: np.dtype[Any], axis: int) -> None:
    weights = special(dtype) if axis == 1 else np.ascontiguousarray(special(dtype).T)
    finite, host = host_extents(weights, axis)
    values = special(dtype).astype(np.float32)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(host, values.max(1) + np.abs(values.min(1)))
    assert finite


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_is_found_wherever_it_is(dtype: np.dtype[Any], axis: int) -> None:
    for bad, row, column in itertools.product((np.nan, -np.nan, np.inf, -np.inf), (0, 2, 4), (0, 3)):
        weights = np.linspace(-1, 1, 20).reshape(5, 4).astype(dtype)
        assert host_extents(weights, axis)[0]
        weights[row, column] = bad
        assert not host_extents(weights, axis)[0], (bad, row, column)
        assert not np.asarray(matrix_extents(weights, axis)[0])


def test_what_is_known_of_criteria_before_jax_is_what_they_are() -> None:
    assert {name: inputs_of(function) for name, function in CRITERIA.items()} == CRITERION_INPUTS
    assert tuple(WEIGHT_CRITERIA) == WEIGHT_CRITERION_NAMES
