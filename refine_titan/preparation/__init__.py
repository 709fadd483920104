"""From text in parquet, jsonl and text files to tokenized, filtered shards that training reads."""
