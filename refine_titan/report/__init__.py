"""Results: turns the samples of an evaluation run into scores with confidence intervals, tables, charts and pages.

Open `results.py` first: it computes `results.json` from the files that `records.py` reads. `evaluation_report.py` and `markdown.py`
show the results of a run; `comparison.py` and `comparison_report.py` compare two runs.
"""
