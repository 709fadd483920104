"""Runs the paper's comparison at a small scale, on this machine.

    refine-titan reproduce [EXPERIMENT ...] [--seeds 1 2 3 4 5] [--jobs N] [--output FOLDER]

An EXPERIMENT is a folder with two files. start.toml trains a model from random weights. continue.toml continues its checkpoint by
next-token training and by ReFINE, with the same steps on the same documents, once for each seed. Every checkpoint is then
evaluated on the tasks of continue.toml. The command prints the scores and their differences with confidence intervals, and writes
them to reproduction.md and reproduction.json in the output folder (docs/reproduction.md).

The same command resumes after an interruption. Exit status 0 for success, 1 for a wrong setting, file or run, 2 for a wrong
command line, 130 after an interruption.
"""

import argparse
import contextlib
import hashlib
import json
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from refine_titan.commands.ends import run_to_end
from refine_titan.commands.options import Parser
from refine_titan.config.user_paths import user_path
from refine_titan.errors import UserError
from refine_titan.terminal import begin_log

if TYPE_CHECKING:  # it imports torch
    from refine_titan.reproduction.experiment import Experiment

# A clone of the repository has experiments, an installed package has none. Relative paths in their files are relative to the repository.
REPOSITORY = Path(__file__).resolve().parents[2]
EXPERIMENTS = REPOSITORY / "train_configs" / "reproduction"
DEFAULTS = [EXPERIMENTS / name for name in ("delta_net", "lact")]


def parser() -> Parser:
    result = Parser("refine-titan reproduce", __doc__)
    result.add_argument(
        "experiments",
        type=user_path,
        nargs="*",
        metavar="EXPERIMENT",
        default=DEFAULTS,
        help="folders of experiments (default: delta_net and lact of train_configs/reproduction)",
    )
    result.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    result.add_argument("--jobs", type=int, help="processes at once (default: one for each CPU core, at most 4; one on a GPU)")
    result.add_argument("--output", type=user_path, default=Path("outputs/reproduction"))
    return result


def main(arguments: list[str]) -> int:
    """Reads the command line and carries it out; returns the exit status."""
    options, _ = parser().parse(arguments)
    from refine_titan.distributed.stop_request import interrupt_on

    interrupt_on(signal.SIGTERM)
    return run_to_end(lambda: run(options), interrupted=lambda: "Interrupted. The same command goes on.")


def run(options: argparse.Namespace) -> int:
    """Checks the options and runs the experiments; returns the exit status."""
    from refine_titan.reproduction.experiment import Experiment

    if len(set(options.seeds)) < len(options.seeds) or min(options.seeds) < 1:
        raise UserError(f"--seeds is {options.seeds}; allowed: different numbers from 1; 0 is the start's seed")
    if options.jobs is not None and options.jobs < 1:
        raise UserError(f"--jobs is {options.jobs}; allowed: at least 1")
    if options.experiments is DEFAULTS and not EXPERIMENTS.is_dir():
        raise UserError(f"EXPERIMENT is missing, and there is no {EXPERIMENTS}; allowed: folders with start.toml and continue.toml")
    output, folders = options.output.resolve(), [folder.resolve() for folder in options.experiments]
    directory = REPOSITORY if EXPERIMENTS.is_dir() else Path.cwd()
    experiments = [Experiment(folder, output / folder.name, tuple(options.seeds)) for folder in folders]
    with contextlib.chdir(directory):
        print(reproduce(experiments, output, options.jobs or default_jobs()))
    return 0


def reproduce(experiments: "list[Experiment]", output: Path, num_jobs: int) -> str:
    """Runs every stage that is not done; returns the comparison as Markdown.

    Raises:
        UserError: if an experiment's files are wrong or differ from those that `output` was begun with, or a process fails.
    """
    from refine_titan.files.whole_files import write_atomically
    from refine_titan.monitoring.run_folder import FolderLock, versions
    from refine_titan.registration import register_models
    from refine_titan.reproduction.stages import run_stages
    from refine_titan.reproduction.table import comparison_latex, comparison_page, experiment_results

    if len({experiment.name for experiment in experiments}) < len(experiments):
        raise UserError("two experiments have folders of the same name, but their results need folders of different names")
    begin_log()
    register_models()
    stages = [stage for experiment in experiments for stage in experiment.stages()]
    for experiment in experiments:
        if not _hashes_path(experiment).is_file():
            experiment.check_samples()
    lock = FolderLock(output, "--output", "the reproduction")
    try:
        for experiment in experiments:
            _check_unchanged(experiment)
        threads = max(len(os.sched_getaffinity(0)) // num_jobs, 1)
        environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
        # Trainings from random weights come first, since all other stages wait for them.
        stages.sort(key=lambda stage: bool(stage.needs))
        run_stages(stages, num_jobs, output / "logs", Path.cwd(), environment, _print)
        found = [experiment_results(experiment) for experiment in experiments]
        record = {"experiments": found, "versions": versions()}
        write_atomically(output / "reproduction.json", json.dumps(record, indent=1) + "\n")
        text = comparison_page(found)
        write_atomically(output / "reproduction.md", text)
        write_atomically(output / "reproduction.tex", comparison_latex(found))
    finally:
        lock.release()
    return f"\n{text}\n{output / 'reproduction.md'}, .tex, .json; a report of each evaluation: EXPERIMENT/evaluation/*/report.html"


def default_jobs() -> int:
    """Processes at once if `--jobs` is not given."""
    from torchtitan.tools.utils import device_type

    return 1 if device_type != "cpu" else min(len(os.sched_getaffinity(0)), 4)


def _check_unchanged(experiment: "Experiment") -> None:
    """Writes the hashes of the experiment's files the first time; later raises UserError if a file has changed.

    Otherwise the comparison could mix runs of different settings.
    """
    from refine_titan.files.whole_files import write_atomically

    files = sorted(path for path in experiment.folder.rglob("*") if path.is_file())
    hashes = {str(path.relative_to(experiment.folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    path = _hashes_path(experiment)
    if not path.is_file():
        write_atomically(path, json.dumps(hashes, indent=1) + "\n")
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    changed = sorted(name for name in before.keys() | hashes.keys() if before.get(name) != hashes.get(name))
    if changed:
        raise UserError(f"{experiment.output} was begun with another {', '.join(changed)} of {experiment.folder}; choose another --output")


def _hashes_path(experiment: "Experiment") -> Path:
    return experiment.output / "experiment.json"


def _print(line: str) -> None:
    print(line, flush=True)
