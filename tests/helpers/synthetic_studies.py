"""Studies with outcomes made to order."""

from collections.abc import Mapping, Sequence

import numpy as np

from evals.results.outcomes import Outcomes
from evals.study.study import DENSE, Score, StudiedBenchmark, Study, Variant

LEVELS = (0.1, 0.2, 0.4, 0.6)
POINTS = [
    Variant(DENSE, DENSE, 0.0, 4.0),
    *(Variant("ppm", f"{100 * level:.0f} %", level, 4 * (1 - level)) for level in LEVELS),
]
ITEMS = 400


def answers(shares: Sequence[float], items: int = ITEMS, seed: int = 0) -> list[Outcomes]:
    """Right-or-wrong outcomes with these shares of right ones, nested: a worse model errs where a better one does."""
    difficulty = np.random.default_rng(seed).permutation(items) / items
    keys = tuple(("task", i) for i in range(items))
    return [Outcomes(keys, (difficulty < share).astype(float)) for share in shares]


def benchmark(
    name: str, shares: Sequence[float], baselines: Mapping[str, float], *, points: Sequence[Variant] = POINTS
) -> StudiedBenchmark:
    """A benchmark with a share of right answers for each model, and constant baselines."""
    outcomes = answers(shares, seed=len(name))
    knowing_nothing = {
        rule: Score.of(Outcomes(outcomes[0].keys, np.full(ITEMS, value))) for rule, value in baselines.items()
    }
    measured = {point: Score.of(one) for point, one in zip(points, outcomes, strict=True)}
    return StudiedBenchmark(name, name.upper(), "acc,none", True, False, measured, knowing_nothing)


def pages(losses: Sequence[float], baseline: float, *, points: Sequence[Variant] = POINTS) -> StudiedBenchmark:
    """Perplexities over 60 documents, by nats a word, and that of equally likely tokens."""
    rng = np.random.default_rng(9)
    words = rng.integers(50, 500, 60).astype(float)
    noise = rng.normal(0, 0.02, 60)
    keys = tuple(("pages", i) for i in range(60))

    def outcomes(loss: float) -> Outcomes:
        return Outcomes(keys, words * (loss + noise), words, is_perplexity=True)

    measured = {point: Score.of(outcomes(loss)) for point, loss in zip(points, losses, strict=True)}
    baselines = {"all tokens equally likely": Score.of(outcomes(baseline))}
    return StudiedBenchmark("wikitext", "WikiText-2", "word_perplexity,none", False, True, measured, baselines)


def study() -> Study:
    """One benchmark of every kind of fate."""
    chance = {"a uniform guess": 0.25, "the longest choice": 0.28}
    text = {"words": 12.0, "empty": 0.0, "repetition": 0.4, "distinct_2": 0.5, "echo": 0.1, "cut_off": 0.9}
    written = benchmark("ifeval", [0.40, 0.30, 0.2, 0.15, 0.15], {"nothing": 0.0, "the prompt": 0.2})
    measured = {p: Score(m.value, m.items, m.stderr, m.outcomes, text) for p, m in written.measured.items()}
    return Study(
        "org/some-model <b>",
        POINTS,
        [
            benchmark("mmlu", [0.60, 0.50, 0.4, 0.27, 0.26], chance),
            benchmark("steady", [0.60, 0.60, 0.6, 0.60, 0.60], chance),
            benchmark("rising", [0.50, 0.50, 0.55, 0.6, 0.60], chance),
            benchmark("guessed", [0.26, 0.26, 0.26, 0.26, 0.27], chance),
            benchmark("truthfulqa_mc2", [0.15, 0.18, 0.2, 0.24, 0.27], chance),
            StudiedBenchmark(
                written.name, written.title, written.metric, True, False, measured=measured, baselines=written.baselines
            ),
            pages([2.5, 2.6, 3.0, 4.0, 6.0], 20.0),
        ],
        {"items": ITEMS},
        {"ppm, 10 %": [[1.0, 0.8], [0.9, 0.9]], "dense": [[1.0, 1.0]] * 2},
    )
