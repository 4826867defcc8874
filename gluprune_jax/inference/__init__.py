"""Running a model: prefill, generation, scoring."""
