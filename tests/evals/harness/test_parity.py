"""Item by item what lm-eval's own backend says of the 13 benchmarks of the paper; and the same by every path of ours.

The comparison is that of `benchmarks/evals_parity.py`, which is for more items than can be asked about here.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import LLAMA3_ROPE, hf_config, write_folder

import convert
from convert.tokenizer import encode_text, load_tokenizer
from evals.harness.backend import GlupruneLM
from evals.harness.task_data import task_datasets
from gluprune_jax import make_plan, score, slice_model
from gluprune_jax.inference.engine import Engine
from gluprune_jax.models.decoder import Decoder

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))
import evals_parity
import evals_vs_lm_eval
from lm_eval_peer import answers, peer_lm

LICENSE = (Path(__file__).parents[3] / "LICENSE").read_text(encoding="utf-8")
WINDOW = 96  # the second one, which cuts contexts
NEW_TOKENS = 24  # at most, in place of 256 (GSM8K) and 1280 (IFEval)

# Of each lm-eval task the shortest items: how many; and of the groups only some tasks.
ITEMS = dict.fromkeys(evals_parity.PAPER, 2) | {"leaderboard_musr": 1, "wikitext": 1, "winogrande": 4, "ifeval": 3}
PARTS = {"mmlu": ("mmlu_world_religions", "mmlu_management"), "leaderboard_musr": ("leaderboard_musr_team_allocation",)}
CUT = ("mmlu", "wikitext", evals_parity.EDGE_CASES)

Requests = Sequence[tuple[Sequence[int], Sequence[int]]]


# --------------------------------------------------------------------------------------------- lm-eval's backend


@pytest.fixture(scope="module")
def torch() -> Any:
    pytest.importorskip("accelerate", reason="lm-eval's hf backend needs it")
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # ten times faster where XLA's threads want the same cores
    yield torch
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def requests(demo: convert.Checkpoint) -> Mapping[str, Sequence[Any]]:
    """A few items of each benchmark."""
    if not os.environ.keys() >= {"GLUPRUNE_DATA", "NLTK_DATA"}:
        pytest.skip("GLUPRUNE_DATA and NLTK_DATA do not name the folders of the benchmark data and of NLTK's")
    with task_datasets(Path(os.environ["GLUPRUNE_DATA"])):
        built = {
            name: evals_parity.build_requests(name, evals_parity.shortest(count), PARTS.get(name))
            for name, count in ITEMS.items()
        }
    built[evals_parity.EDGE_CASES] = evals_parity.edge_cases(load_tokenizer(demo), WINDOW)
    return {name: evals_parity.with_gen_toks(instances, NEW_TOKENS) for name, instances in built.items()}


@pytest.mark.torch
@pytest.mark.real_model
@pytest.mark.parametrize("percent", [0, 10])
def test_every_benchmark_is_answered_as_by_lm_evals_own_backend(
    torch: Any, demo: convert.Checkpoint, requests: Mapping[str, Sequence[Any]], tmp_path: Path, percent: int
) -> None:
    checkpoint = demo if not percent else demo.pruned(make_plan(score(demo.model), prune_percent=percent))
    convert.save(checkpoint, tmp_path / "model")
    peer = peer_lm(str(tmp_path / "model"))
    ours = GlupruneLM.from_checkpoint(convert.load(tmp_path / "model"), add_bos_token=False)
    wrong, covered = [], dict.fromkeys(KINDS, 0)
    for window, names in ((None, requests), (WINDOW, CUT)):
        if window:
            peer = peer_lm(peer.model, tokenizer=peer.tokenizer, window=window)
            ours = GlupruneLM.from_checkpoint(
                convert.load(tmp_path / "model"), context_length=window, add_bos_token=False
            )
        for name in names:
            instances = requests[name]
            result = evals_parity.compare(peer, instances, answers(peer, instances), answers(ours, instances))
            if not result.within_bounds:
                wrong.append((window, name, result))
            for kind, count in evals_parity.coverage(peer, instances).items():
                covered[kind] += count
    assert not wrong
    assert all(covered.values()), covered


KINDS = (
    "single-token continuations",
    "multi-token continuations",
    "contexts cut to the window",
    "empty contexts",
    "contexts of several requests",
    "contexts of one request",
    "documents of one window",
    "documents of several windows",
    "prompts to be answered",
    "prompts cut to the window",
)


@pytest.mark.torch
@pytest.mark.real_model
def test_a_difference_does_not_go_unnoticed(torch: Any, demo_folder: str) -> None:
    peer = peer_lm(demo_folder)
    instances = evals_parity.edge_cases(peer.tokenizer, 32)
    theirs = answers(peer, instances)
    assert evals_parity.compare(peer, instances, theirs, theirs).within_bounds
    kinds = [instance.request_type for instance in instances]
    scored, rolling, text = (kinds.index(kind) for kind in ("loglikelihood", "loglikelihood_rolling", "generate_until"))
    value, greedy = theirs[scored]
    for i, other in (
        (scored, (value + 2e-3, greedy)),
        (scored, (float("nan"), greedy)),
        (scored, (value, not greedy)),
        (rolling + 2, theirs[rolling + 2] * (1 + 2e-5)),
        (rolling, float("nan")),
        (text, theirs[text] + " indeed"),
        (text, ""),
    ):
        ours = [*theirs[:i], other, *theirs[i + 1 :]]
        assert not evals_parity.compare(peer, instances, theirs, ours).within_bounds, (i, other)


@pytest.mark.torch
@pytest.mark.real_model
def test_the_gap_is_that_of_the_place_where_texts_and_flags_part(torch: Any, demo_folder: str) -> None:
    peer = peer_lm(demo_folder)
    instance = evals_parity.edge_cases(peer.tokenizer, 32)[-1]
    prompt = peer.tok_encode(instance.args[0])
    answer = answers(peer, [instance])[0]
    path = peer.tok_encode(answer)
    at = 7
    with torch.no_grad():
        logits = peer.model(torch.tensor([[*prompt, *path[:at]]])).logits[0, -1]
    first, second = logits.topk(2).indices.tolist()
    gap = float(logits[first] - logits[second])
    assert first == path[at]
    other = peer.tok_decode([*path[:at], second]) + " and then something else"
    assert evals_parity.text_gap(peer, instance, (answer, other)) == pytest.approx(gap, rel=1e-4)
    assert evals_parity.text_gap(peer, instance, (other, answer)) == pytest.approx(gap, rel=1e-4)
    context = [*prompt, *path[:at]]
    assert evals_parity.flag_gap(peer, context, [first]) == pytest.approx(gap, rel=1e-4)
    assert evals_parity.flag_gap(peer, context, [second]) == pytest.approx(gap, rel=1e-4)
    third = int(logits.topk(3).indices[2])
    assert evals_parity.flag_gap(peer, context, [third]) == pytest.approx(
        float(logits[first] - logits[third]), rel=1e-4
    )


@pytest.mark.torch
@pytest.mark.real_model
def test_bfloat16_is_as_exact_as_in_transformers(
    torch: Any, demo: convert.Checkpoint, demo_folder: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    tokens = encode_text(load_tokenizer(demo), LICENSE)[:400]

    def theirs(dtype: Any) -> np.ndarray:
        model = AutoModelForCausalLM.from_pretrained(demo_folder, dtype=dtype).eval()
        with torch.no_grad():
            values = torch.log_softmax(model(torch.tensor([tokens])).logits[0, :-1].float(), dim=-1)
        return values.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].numpy()

    def ours(model: Decoder) -> np.ndarray:
        requests = [(tokens[:i], tokens[i : i + 1]) for i in range(1, len(tokens))]
        return np.array([result.value for result in Engine(model).loglikelihood(requests)])

    exact = ours(demo.model)
    np.testing.assert_allclose(exact, theirs(torch.float32), atol=1e-3)
    half = ours(convert.load(demo_folder, dtype="bfloat16").model)
    error, their_error = np.abs(half - exact).mean(), np.abs(theirs(torch.bfloat16) - theirs(torch.float32)).mean()
    assert 1e-4 < error <= 1.2 * their_error


# ------------------------------------------------------------------------------------------------ paths of ours


def assert_same(requests: Requests, these: Sequence[Any], those: Sequence[Any]) -> None:
    for (_, continuation), this, that in zip(requests, these, those, strict=True):
        assert abs(this.value - that.value) <= 1e-4 + 5e-6 * len(continuation)
        assert this.is_greedy == that.is_greedy


def family(tokens: Sequence[int]) -> Requests:
    """Requests on a header that they share, some on a question that they share, and some on nothing."""
    header = tokens[:150]
    requests = []
    for start in range(150, len(tokens) - 50, 50):
        question = [*header, *tokens[start : start + 40]]
        requests += [(question, tokens[start + 40 : start + 40 + length]) for length in (1, 2, 9)]
        requests.append((question, [tokens[start]]))
    requests += [(tokens[i : i + 1], tokens[i + 1 : i + 30]) for i in range(3)]
    return [*requests, requests[0], (tokens[:20], tokens[20:])]


def paths(model: Decoder, percent: float) -> list[Engine]:
    """The pruned model in every way to run it, the plainest one first."""
    plan = make_plan(score(model), prune_percent=percent)
    masks = plan.masks(model.config)
    return [
        Engine(slice_model(model, plan), share_prefixes=False, batch_size=1),
        Engine(model, neuron_masks=masks, share_prefixes=False),
        Engine(model, neuron_masks=masks),
        Engine(model, neuron_masks=masks, batch_size=3),
    ]


@pytest.mark.parametrize("percent", [10, 60])
def test_every_path_gives_the_same_numbers(tmp_path: Path, percent: float) -> None:
    model = convert.load(write_folder(tmp_path, hf_config(rope_scaling=LLAMA3_ROPE))).model
    tokens = np.random.default_rng(0).integers(0, 97, 420).tolist()
    requests = family(tokens)
    plainest, *others = paths(model, percent)
    expected = plainest.loglikelihood(requests)
    documents = [tokens, tokens[:7], tokens * 3]
    rolling = plainest.loglikelihood_rolling(documents, prefix_token=1)
    for engine in others:
        assert_same(requests, engine.loglikelihood(requests), expected)
        assert engine.loglikelihood_rolling(documents, prefix_token=1) == pytest.approx(rolling, rel=1e-6)
    dense = Engine(model).loglikelihood(requests)
    assert max(abs(a.value - b.value) for a, b in zip(dense, expected, strict=True)) > 0.1, "the mask does something"


@pytest.mark.real_model
def test_every_path_of_a_real_model_gives_the_same_numbers(shallow_demo: convert.Checkpoint) -> None:
    requests = family(encode_text(load_tokenizer(shallow_demo), LICENSE)[:270])
    plainest, *others = paths(shallow_demo.model, 10)
    expected = plainest.loglikelihood(requests)
    for engine in others:
        assert_same(requests, engine.loglikelihood(requests), expected)


# ------------------------------------------------------------------------------------------- the speed figures


def run(seconds: float, compiling: float = 0.0, batch: int = 8) -> dict[str, Any]:
    return {
        "seconds": seconds,
        "compile_seconds": compiling,
        "load_seconds": 1.0,
        "peak_bytes": 1,
        "batch_size": batch,
        "programs": ["rows"],
    }


def test_the_speed_figures_take_the_peers_best_batch_and_scale_to_the_official_counts() -> None:
    ours = [[run(2, 1)], [run(4, 1)], [run(2, 1)]]
    peer = [[run(20, batch=1), run(8)], [run(20, batch=1), run(8)], [run(20, batch=1), run(12)]]
    result = evals_vs_lm_eval.compare({"gluprune_jax": ours, "lm_eval": peer})
    assert result["pairs"] == [4, 2, 6]
    assert result["times_as_fast"] == 4
    assert result["lm_eval"]["batch_size"] == 8
    suite = evals_vs_lm_eval.whole_suite({"piqa": {"items": 919, **result}})
    assert suite["seconds"] == {"gluprune_jax": 4, "lm_eval": 16}
    assert suite["seconds_compiled_once"] == {"gluprune_jax": 3, "lm_eval": 16}
    assert suite["times_as_fast"] == 4
