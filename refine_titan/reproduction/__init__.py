"""Experiments: a model is trained, arms go on from its checkpoints over several seeds, and all are measured and compared.

Open `experiment.py` first: it lists the trainings and measures of an experiment as stages. `arms.py` reads which arms there are,
`start.py` has the trainings from random weights, `trainings.py` says what a training is and `settings.py` what its result depends on,
`stages.py` runs stages as processes, `measures.py` reads what they wrote, `results.py` computes the comparisons, `page.py` and `charts.py`
show them; `tokenizer.py` makes the tokenizers.
"""
