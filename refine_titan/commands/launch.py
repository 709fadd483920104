"""Starts the ranks of a node; run_train.sh and run_evaluate.sh call it. refine_titan/launch.py describes it."""


def main(arguments: list[str]) -> int:
    """Runs the ranks to their end; returns the exit status."""
    from refine_titan.launch import main as start

    return start(arguments)
