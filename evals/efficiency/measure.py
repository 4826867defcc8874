"""Timing of prefill and decoding."""

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from evals.efficiency.costs import bytes_per_token, flops_per_token
from evals.efficiency.energy import EnergyMeter
from evals.efficiency.workloads import Workload
from gluprune_jax import generate
from gluprune_jax.errors import OperationError
from gluprune_jax.inference.device_loop import decode, empty_state
from gluprune_jax.inference.generation import slots_for
from gluprune_jax.inference.sampling import Sampling
from gluprune_jax.models.decoder import Decoder
from gluprune_jax.parallel.mesh import mesh_of, shape_of, use_mesh

DEFINITIONS = {
    "time to first token": "seconds from a prompt's token ids at the host to its first new token there: prefill "
    "and one token, at batch size 1",
    "time per output token": "seconds of all new tokens but the first, over their number, at that batch size",
    "latency": "seconds from the prompts' token ids to the last new token of all of them",
    "output tokens/s": "new tokens of all prompts over the latency",
    "prefill tokens/s": "prompt tokens over the seconds to the first tokens of all prompts",
    "decode tokens/s": "new tokens but the first of each prompt, over the seconds that they take",
    "memory": "bytes of one device that the decode program holds: weights, caches and workspace, by the compiler's "
    "analysis of all layers in one program, as accelerators run it",
    "FLOPs per token": "two for each weight of a matrix, and attention over prompt and answer",
    "bytes per token": "what decoding a token must read: its share of the weights, and its keys and values",
    "energy per token": "joules of all counters while answers are generated, over new tokens; net: without the power "
    "of the idle machine, measured before",
}


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of repeats.

    Attributes:
      median: of them.
      low: first quartile.
      high: third quartile.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Timing":
        """Of at least one repeat."""
        low, median, high = np.quantile(seconds, [0.25, 0.5, 0.75]).tolist()
        return cls(median, low, high)


# ------------------------------------------------------------------------------------------------------ measuring


def measure(
    model: Decoder, workload: Workload, batch: int, repeats: int, meter: EnergyMeter, idle_watts: float | None
) -> dict[str, Any]:
    """Everything about one model, workload and batch size.

    Args:
      model: dense or sliced.
      workload: its prompts are taken in groups of `batch`, the last group filled up from the first.
      batch: prompts generated together.
      repeats: of every group.
      meter: the energy counters.
      idle_watts: power of the idle machine, if it is known.

    Returns:
      A row of the report, as JSON; times are in seconds.
    """
    groups = _groups(workload.prompts, batch)

    def no_memory(_: int) -> None:
        raise OperationError(
            f"the devices have no memory for {batch} sequences of {workload.name}; give `batch_sizes` less"
        )

    def answer(new_tokens: int) -> float:
        """Seconds to generate so many tokens for every prompt, group by group."""
        start = time.perf_counter()
        for group in groups:
            # No token ends an answer: all models do the same work.
            generate(
                model,
                group,
                max_new_tokens=new_tokens,
                slots=batch,
                prompt_lookup=False,  # a token's time shall not depend on what the text repeats
                on_out_of_memory=no_memory,
            )
        return time.perf_counter() - start

    warm_up = answer(1) + answer(workload.new_tokens)
    firsts = [answer(1) / len(groups) for _ in range(repeats)]
    wholes: list[float] = []
    energy = meter.measure(lambda: wholes.extend(answer(workload.new_tokens) / len(groups) for _ in range(repeats)))
    first, whole = Timing.of(firsts), Timing.of(wholes)
    rest = [(whole - first.median) / (workload.new_tokens - 1) for whole in wholes]
    prompt_tokens = sum(len(prompt) for group in groups for prompt in group) / len(groups)
    context = round(prompt_tokens / batch) + workload.new_tokens // 2
    decoded = batch * (workload.new_tokens - 1)
    # Where noise is larger than what the other tokens take, there is no rate.
    per_token = Timing.of(rest) if min(rest) > 0 else None
    found: dict[str, Any] = {
        "workload": workload.name,
        "batch": batch,
        "prompts": len(workload.prompts),
        "mean_prompt_tokens": prompt_tokens / batch,
        "new_tokens": workload.new_tokens,
        "warm_up": warm_up,
        "time_to_first_token": dataclasses.asdict(first) if batch == 1 else None,
        "time_per_output_token": None if per_token is None else dataclasses.asdict(per_token),
        "latency": dataclasses.asdict(whole),
        "output_tokens_per_second": batch * workload.new_tokens / whole.median,
        "prefill_tokens_per_second": prompt_tokens / first.median,
        "decode_tokens_per_second": None if per_token is None else decoded / (whole.median - first.median),
        "memory_bytes": decode_memory(model, batch, max(map(len, workload.prompts)) + workload.new_tokens),
        "flops_per_token": flops_per_token(model.config, context),
        "bytes_per_token": bytes_per_token(model.config, context, batch, model.embed_tokens[...].dtype.itemsize),
        "energy_per_token": None,
        "net_energy_per_token": None,
    }
    if energy is not None:
        tokens = repeats * len(groups) * batch * workload.new_tokens
        found["energy_per_token"] = energy.joules / tokens
        if idle_watts is not None:
            found["net_energy_per_token"] = (energy.joules - idle_watts * energy.seconds) / tokens
    return found


def _groups(prompts: Sequence[Sequence[int]], batch: int) -> list[list[Sequence[int]]]:
    count = math.ceil(len(prompts) / batch)
    return [[prompts[(number * batch + i) % len(prompts)] for i in range(batch)] for number in range(count)]


def decode_memory(model: Decoder, batch: int, longest: int) -> int | None:
    """Bytes of one device that the decode program holds, by the compiler; None where it does not say."""
    config, params = model.config, nnx.state(model, nnx.Param)
    dtype = model.embed_tokens[...].dtype
    mesh = mesh_of(model)
    slots = math.ceil(batch / shape_of(mesh).data) * shape_of(mesh).data  # as many in each replica
    with use_mesh(mesh):
        state = jax.eval_shape(lambda: empty_state(config, slots, slots_for(longest), dtype))
        sampling = Sampling.of((), 0, 1, 0)
        analysis = decode.lower(config, params, state, sampling, None).compile().memory_analysis()
    if analysis is None:
        return None
    held = analysis.argument_size_in_bytes + analysis.output_size_in_bytes + analysis.temp_size_in_bytes
    return int(held - analysis.alias_size_in_bytes)
