"""Tasks, scorers, generation and results of RULER, LongBench and perplexity."""
