"""A study: rows of models and sizes, baselines, tests and verdicts."""
