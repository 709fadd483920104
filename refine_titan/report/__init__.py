"""Results: turns the samples of an evaluation run into scores with confidence intervals, tables, charts and pages.

Open `results.py` first: it computes `results.json` from the files that `records.py` reads. `evaluation_report.py`, `result_tables.py` and
`markdown.py` show the results of a run; `comparison.py` and `comparison_report.py` compare two runs; `run_report.py` makes the page of a
training run. `escaping.py` is where text of files and models becomes text of a page.
"""
