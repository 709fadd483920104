"""Experiments whose stages have run, without running any: their folders hold what the stages would have written."""

import json
from collections.abc import Callable
from pathlib import Path

from refine_titan.reproduction.arms import FORK
from refine_titan.reproduction.experiment import Experiment

REPOSITORY = Path(__file__).parents[3]
DELTA_NET = REPOSITORY / "train_configs" / "reproduction" / "delta_net"

ARMS = """
forks = [200, 600]
seeds = [1, 2, 3, 4, 5]
baseline = "plain"
measures = ["ruler", "text"]
primary = "text/reward_cosine"

[arms.plain]
label = "+ next-token training"
settings = { refine.objective = "ntp" }

[arms.refine]
label = "+ ReFINE"
settings = { "refine.objective" = "refine" }

[arms.longer]
label = "+ more steps"
settings = { refine = { objective = "ntp" }, training.steps = 150 }
"""


def experiment_folder(folder: Path, arms: str = ARMS) -> Path:
    """Makes an experiment's folder with the files of DeltaNet's and other arms."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("start.toml", "continue.toml"):
        (folder / name).write_text((DELTA_NET / name).read_text())
    (folder / "arms.toml").write_text(arms)
    return folder


def finish(experiment: Experiment, measure: Callable[[int, str, int], float]) -> None:
    """Writes the results of every stage.

    Args:
        measure: the primary measure by fork, arm and seed; a score of 512 tokens is the same number.
    """
    for training in experiment.start.trainings:
        finish_training(training.folder, training.steps, 1.0)
    for fork in experiment.forks:
        for arm in experiment.checkpoints(fork):
            for seed in experiment.plan.seeds:
                training, _ = experiment.training(fork, arm, seed)
                if arm != FORK and experiment.plan.arms[arm].train:
                    finish_training(training.folder, training.steps, 2.0 if arm == "refine" else 1.0)
                write_measures(experiment, fork, arm, seed, measure(fork, arm, seed))


def write_measures(experiment: Experiment, fork: int, arm: str, seed: int, value: float) -> None:
    row = {"benchmark": "ruler", "task": "niah_single_1", "length": 512, "score": value}
    row |= {"num_samples": 40, "seconds_per_sample": 0.5, "adaptation_seconds_per_sample": 1.25 if arm == "refine" else None}
    text = {"measures": {"reward_cosine": value, "loss": 2 - value}, "terms": {"reward_cosine": 128, "loss": 4096}}
    results = {"ruler": {"tasks": [row]}, "text": text}
    for measure in experiment.plan.measures:
        folder = experiment.measure_folder(fork, arm, seed, measure)
        folder.mkdir(parents=True, exist_ok=True)
        name = {"ruler": "results.json", "text": "measures.json"}[measure]
        (folder / name).write_text(json.dumps(results[measure]))


def finish_training(folder: Path, steps: tuple[int, ...], step_seconds: float) -> None:
    for step in steps:
        (folder / "checkpoint" / f"step-{step}").mkdir(parents=True, exist_ok=True)
        (folder / "checkpoint" / f"step-{step}" / ".metadata").touch()
    lines = [
        {"step": s, "timing/total": step_seconds, "refine/ntp_loss": 5 - s / steps[-1], "rollout/match_mean": 0.5}
        for s in range(1, steps[-1] + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
