"""The paper's comparison at a small scale, on this machine, in one command.

    python tools/reproduce.py [EXPERIMENT ...] [--seeds 1 2 3 4 5] [--jobs N] [--output FOLDER]

An EXPERIMENT is a folder with start.toml, which trains a model from random weights, and continue.toml, which goes on from that
checkpoint by next-token training and by ReFINE, the same steps on the same documents, once a seed. Every checkpoint is then
evaluated on the tasks of continue.toml. Prints the scores and their differences with confidence intervals, and writes them to
reproduction.md and reproduction.json in the output folder (docs/reproduction.md).

Interrupted or killed, the same command goes on. Exit status 0, 1 if a setting, file or run is wrong, 130 if interrupted.
"""

import argparse
import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import refine_titan  # noqa: F401  # isort: skip  announces the device before torchtitan is imported
from torchtitan.tools.logging import init_logger
from torchtitan.tools.utils import device_type

from refine_titan.errors import UserError
from refine_titan.monitoring.run_folder import FolderLock, versions, write_atomically
from refine_titan.registration import register_models
from refine_titan.reproduction.experiment import Experiment
from refine_titan.reproduction.stages import run_stages
from refine_titan.reproduction.table import page, results

ROOT = Path(__file__).resolve().parents[1]
DEFAULTS = [ROOT / "train_configs" / "reproduction" / name for name in ("delta_net", "lact")]
INTERRUPTED = 130


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "experiments",
        type=Path,
        nargs="*",
        metavar="EXPERIMENT",
        default=DEFAULTS,
        help="folders (train_configs/reproduction/delta_net and lact)",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--jobs", type=int, help="processes at once (one for each CPU core, at most 4; one on a GPU)")
    parser.add_argument("--output", type=Path, default=Path("outputs/reproduction"))
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        if len(set(arguments.seeds)) < len(arguments.seeds) or min(arguments.seeds) < 1:
            raise UserError(f"--seeds is {arguments.seeds}; allowed: different numbers from 1, since 0 is the start's")
        if arguments.jobs is not None and arguments.jobs < 1:
            raise UserError(f"--jobs is {arguments.jobs}; allowed: at least 1")
        output, folders = arguments.output.resolve(), [folder.resolve() for folder in arguments.experiments]
        experiments = [Experiment(folder, output / folder.name, tuple(arguments.seeds)) for folder in folders]
        print(reproduce(experiments, output, arguments.jobs or default_jobs()))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted. The same command goes on.", file=sys.stderr)
        return INTERRUPTED
    return 0


def reproduce(experiments: list[Experiment], output: Path, num_jobs: int) -> str:
    """Runs what is not done yet; returns the comparison as Markdown.

    Raises:
        UserError: if an experiment's files are wrong or have changed since `output` was begun, or one of its processes fails.
    """
    if len({experiment.name for experiment in experiments}) < len(experiments):
        raise UserError("two experiments have folders of the same name, which is that of their results")
    init_logger()
    register_models()
    stages = [stage for experiment in experiments for stage in experiment.stages()]
    for experiment in experiments:
        if not _note(experiment).is_file():
            experiment.check_samples()
    lock = FolderLock(output, "--output", "the reproduction")
    try:
        for experiment in experiments:
            _check_same(experiment)
        threads = max(len(os.sched_getaffinity(0)) // num_jobs, 1)
        environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
        # The trainings from random weights first, which all else waits for.
        stages.sort(key=lambda stage: bool(stage.needs))
        run_stages(stages, num_jobs, output / "logs", ROOT, environment, _print)
        found = [results(experiment) for experiment in experiments]
        record = {"experiments": found, "versions": versions()}
        write_atomically(output / "reproduction.json", json.dumps(record, indent=1) + "\n")
        text = page(found)
        write_atomically(output / "reproduction.md", text)
    finally:
        lock.release()
    return f"\n{text}\n{output / 'reproduction.md'}, reproduction.json; a report of each evaluation: EXPERIMENT/evaluation/*/report.html"


def default_jobs() -> int:
    return 1 if device_type != "cpu" else min(len(os.sched_getaffinity(0)), 4)


def _check_same(experiment: Experiment) -> None:
    """The first time notes the experiment's files; later refuses others: runs of both would be compared."""
    files = sorted(path for path in experiment.folder.rglob("*") if path.is_file())
    hashes = {str(path.relative_to(experiment.folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    note = _note(experiment)
    if not note.is_file():
        write_atomically(note, json.dumps(hashes, indent=1) + "\n")
        return
    before = json.loads(note.read_text(encoding="utf-8"))
    changed = sorted(name for name in before.keys() | hashes.keys() if before.get(name) != hashes.get(name))
    if changed:
        raise UserError(f"{experiment.output} was begun with another {', '.join(changed)} of {experiment.folder}; choose another --output")


def _note(experiment: Experiment) -> Path:
    return experiment.output / "experiment.json"


def _print(line: str) -> None:
    print(line, flush=True)


def _interrupt(*_) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
