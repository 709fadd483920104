"""Documents in (Python sources, text, jsonl, parquet, synthetic), packed batches out."""
