"""Tasks and metrics: the questions that an evaluation asks a model, and the scores of its responses.

Open `tasks.py` first: it turns the name of a task into samples. `metrics.py` scores a response, `task_files.py` reads tasks from
parquet and jsonl files, `ruler/` generates RULER's tasks.
"""
