"""Speed, memory and energy of models: `python -m evals.efficiency`."""
