"""Evaluates a checkpoint: prompts are answered and scored, documents are read for their perplexity, results are reported.

Open `job.py` first: it runs an evaluation from configuration to results. `work.py` plans the work, `prompts.py` and `answering.py`
make answers (`adapted_answers.py` with test-time training), `runner.py` shares the work out and writes it to disk as it is
finished (`ranks.py` joins the ranks). `periodic.py` is
evaluation during training, `harness.py` runs tasks of lm-evaluation-harness.
"""
