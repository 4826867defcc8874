"""Statistics of what neurons do on calibration text, and the file that they are kept in.

They are collected by `gluprune_jax.pruning.calibration`, and criteria look at them (`gluprune_jax.pruning.criteria`).
"""

import dataclasses
import datetime
import hashlib
import io
import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gluprune_jax.data.documents import self_seed
from gluprune_jax.errors import OperationError, RequestError, listed, shortened, unreadable
from gluprune_jax.files.atomic import write_file_atomic
from gluprune_jax.files.records import NUMBER, OBJECT, TEXT, WHOLE, list_of, problem, record_of
from gluprune_jax.models.config import ModelConfig

FORMAT, VERSION = "gluprune-statistics", 1
# Those that are gradients of the dense model, and take another pass over the text each.
SENSITIVITIES = ("sensitivity", "entropy_sensitivity")
# With which a model writes its own calibration text: 1, so that it is the model's own distribution.
OWN_TEXT_TEMPERATURE = 1.0

_HEAD = record_of(
    {
        "hidden_size": WHOLE,
        "fingerprint": TEXT,
        "texts": OBJECT,
        "tokens": list_of(WHOLE),
        "influence": list_of(NUMBER),
    }
)


@dataclasses.dataclass(frozen=True)
class LayerStatistics:
    """Of the activations a of one layer's neurons (the input of down_proj) over n tokens.

    Attributes:
      tokens: n.
      squares: sums of a^2, `[F]` float32.
      sums: sums of a, `[F]` float32.
      magnitudes: sums of `|a|`, `[F]` float32.
      influence: 1 - cos of the angle between what goes into the layer and what comes out of it, a mean over tokens:
        how much of a block is left out if it is dropped (arXiv 2403.03853).
      sensitivity: see `calibration.sensitivities`, `[F]` float32; None where it was not asked for.
      entropy_sensitivity: the same of the entropy.
    """

    tokens: int
    squares: NDArray[np.float32]
    sums: NDArray[np.float32]
    magnitudes: NDArray[np.float32]
    influence: float
    sensitivity: NDArray[np.float32] | None = None
    entropy_sensitivity: NDArray[np.float32] | None = None

    @property
    def activation_norm(self) -> NDArray[np.float32]:
        """L2 norm over the tokens, `[F]`."""
        return np.sqrt(self.squares)

    @property
    def mean(self) -> NDArray[np.float32]:
        """Mean over the tokens, `[F]`."""
        return (self.sums / self.tokens).astype(np.float32)

    @property
    def mean_magnitude(self) -> NDArray[np.float32]:
        """Mean absolute value over the tokens, `[F]`."""
        return (self.magnitudes / self.tokens).astype(np.float32)


_ARRAYS = ("squares", "sums", "magnitudes", *SENSITIVITIES)


@dataclasses.dataclass(frozen=True)
class Statistics:
    """The statistics of every layer, and what they are of; any number of criteria and widths may use them.

    Attributes:
      layers: in the order of the model.
      hidden_size: D.
      fingerprint: identifies the MLP weights of the model (see `scores.score`).
      texts: what the tokens are: `describe_windows`.
    """

    layers: tuple[LayerStatistics, ...]
    hidden_size: int
    fingerprint: str
    texts: Mapping[str, Any]

    def check_fits(self, config: ModelConfig, fingerprint: str | None = None) -> None:
        """Makes sure that they are of a model of this shape and, given their fingerprint, of its weights.

        Raises:
          RequestError: they are not.
        """
        ours = tuple(len(layer.squares) for layer in self.layers), self.hidden_size
        if ours != (config.intermediate_sizes, config.hidden_size):
            raise RequestError(
                f"the statistics are of a model with {len(ours[0])} layers of {max(ours[0])} neurons at hidden size "
                f"{ours[1]}; this one has {config.num_hidden_layers} of {max(config.intermediate_sizes)} at "
                f"{config.hidden_size}"
            )
        if fingerprint is not None and fingerprint != self.fingerprint:
            raise RequestError(
                f"the statistics are of other weights: they name {self.fingerprint[:23]}..., the MLP weights of this "
                f"model are {fingerprint[:23]}..."
            )

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Writes them as one .npz file, whole or not at all.

        Raises:
          RequestError: `path` exists and `overwrite` is false.
          OperationError: it cannot be written.
        """
        head, arrays = self._contents()
        head["sha256"] = self._digest()
        buffer = io.BytesIO()
        np.savez(buffer, head=np.frombuffer(json.dumps(head).encode(), np.uint8), **arrays)
        write_file_atomic(Path(path), buffer.getvalue(), overwrite=overwrite)

    def parts(self) -> Iterator[bytes]:
        """All that they say, for `distributed.check_same`: other bits mean other statistics."""
        head, arrays = self._contents()
        yield json.dumps(head).encode()
        for name, array in arrays.items():
            yield name.encode()
            yield np.ascontiguousarray(array, "<f4").tobytes()

    def _digest(self) -> str:
        """SHA-256 of `parts`, in hexadecimal."""
        return hashlib.sha256(b"".join(self.parts())).hexdigest()

    def _contents(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the file holds: a head of JSON, and arrays by name."""
        head = {
            "format": FORMAT,
            "version": VERSION,
            "hidden_size": self.hidden_size,
            "fingerprint": self.fingerprint,
            "texts": dict(self.texts),
            "tokens": [layer.tokens for layer in self.layers],
            "influence": [layer.influence for layer in self.layers],
        }
        arrays = {
            f"{name}_{i}": getattr(layer, name)
            for i, layer in enumerate(self.layers)
            for name in _ARRAYS
            if getattr(layer, name) is not None
        }
        return head, arrays

    @classmethod
    def load(cls, path: str | Path) -> "Statistics":
        """Reads what `save` wrote.

        Raises:
          RequestError: there is no such file, or it is of a later version.
          OperationError: it cannot be read, is none of these files, or is damaged.
        """
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise unreadable(f"the statistics {path}", error) from error
        what = f"{path} holds no statistics of `statistics_out`, or is damaged"
        try:
            with warnings.catch_warnings(), np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                warnings.simplefilter("ignore")  # of numpy, about headers that only a damaged file has
                found = dict(arrays)
            if strange := [name for name, array in found.items() if not isinstance(array, np.ndarray)]:
                raise ValueError(f"no arrays: {strange}")
            head = json.loads(found.pop("head").tobytes())
            is_ours, version = head["format"] == FORMAT, head["version"]
        except Exception as error:  # whatever zip, numpy and json say of bytes that are something else
            raise OperationError(what) from error
        if not is_ours:
            raise OperationError(what)
        if version != VERSION:
            raise RequestError(f"{path} has version {shortened(version)}; this program reads version {VERSION}")
        if wrong := problem(head, _HEAD):
            raise OperationError(f"{what}: {wrong}")
        if len(head["tokens"]) != len(head["influence"]):
            raise OperationError(
                f"{what}: it counts tokens of {len(head['tokens'])} layers and has the influence of "
                f"{len(head['influence'])}"
            )
        count = len(head["tokens"])
        known = {f"{name}_{i}" for name in _ARRAYS for i in range(count)}
        missing = {name for name in known - found.keys() if not name.startswith(SENSITIVITIES)}
        if not count or missing or found.keys() - known:
            names = sorted(missing) or sorted(found.keys() - known)
            reason = f"{'without' if missing else 'with an unknown'} {listed(names)}" if names else "without layers"
            raise OperationError(f"{what}: it is {reason}")
        layers = tuple(
            LayerStatistics(
                tokens=tokens,
                influence=float(influence),
                **{name: found[f"{name}_{i}"] for name in _ARRAYS if f"{name}_{i}" in found},
            )
            for i, (tokens, influence) in enumerate(zip(head["tokens"], head["influence"], strict=True))
        )
        statistics = cls(layers, head["hidden_size"], head["fingerprint"], head["texts"])
        if wrong := next((text for i, layer in enumerate(layers) if (text := _problem(layer, i))), None):
            raise OperationError(f"{what}: {wrong}")
        if "sha256" in head and head["sha256"] != statistics._digest():
            raise OperationError(f"{what}: its sha256 is not that of its content")
        return statistics


def _problem(layer: LayerStatistics, i: int) -> str | None:
    """What is wrong with the statistics of a layer that come from a file, if anything is."""
    arrays = {name: values for name in _ARRAYS if (values := getattr(layer, name)) is not None}
    for name, values in arrays.items():
        if values.dtype != np.float32 or values.ndim != 1 or values.shape != layer.squares.shape:
            return f"{name} of layer {i} is {values.dtype} of shape {values.shape}"
        if not np.isfinite(values).all() or (name != "sums" and (values < 0).any()):
            return f"{name} of layer {i} has values that cannot be"
    if layer.tokens < 1 or not math.isfinite(layer.influence):
        return f"layer {i} has {layer.tokens} tokens and an influence of {layer.influence}"
    return None


def check_finite(layer: LayerStatistics, i: int) -> None:
    """Makes sure that the statistics of layer `i` are numbers.

    Raises:
      OperationError: they are not, naming the layer.
    """
    for name in _ARRAYS:
        values = getattr(layer, name)
        if values is not None and not np.isfinite(values).all():
            raise OperationError(f"the {name} of layer {i} are not finite numbers: such a model cannot be calibrated")


def describe_windows(
    windows: NDArray[np.int32], names: Sequence[str] = (), date: datetime.date | None = None
) -> dict[str, Any]:
    """What plans and statistics say of calibration windows `[N, W]`: texts, tokens, window, and a digest of the ids.

    The date, YYYY-MM-DD, stands there only if the chat template wrote it into them, and how the model wrote its own
    text only if some of it is that.
    """
    seed = next((seed for name in names if (seed := self_seed(name)) is not None), None)
    own = {} if seed is None else {"own_text": {"seed": seed, "temperature": OWN_TEXT_TEMPERATURE}}
    return (
        {
            "texts": list(names),
            "tokens": int((windows >= 0).sum()),
            "window": windows.shape[1],
            "digest": f"sha256:{hashlib.sha256(np.ascontiguousarray(windows, '<i4').tobytes()).hexdigest()}",
        }
        | ({} if date is None else {"date": date.isoformat()})
        | own
    )
