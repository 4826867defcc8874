"""What pruning did to a model: perplexity now, benchmarks, statistics and the study to come."""
