"""Runs experiments: a model is trained from random weights, arms go on from its checkpoints, and all are measured and compared.

    refine-titan reproduce [EXPERIMENT ...] [--arms ARM ...] [--forks STEP ...] [--seeds SEED ...] [--jobs N] [--output FOLDER]

An EXPERIMENT is a folder with three files. start.toml trains a model from random weights; start_2.toml, if it is there, goes on from its
last checkpoint. continue.toml continues its checkpoints, and says what is measured. arms.toml names the arms, which are settings over
those of continue.toml, the steps of the start that they go on from, the seeds, and the measures. The command prints the answers with
confidence intervals, and writes them to reproduction.html, .md, .tex and .json in the output folder (docs/reproduction.md).

The same command resumes after an interruption. What is done is not run again, unless a setting or file that it depends on has changed.
Exit status 0 for success, 1 for a wrong setting, file or run, 2 for a wrong command line, 130 after an interruption.
"""

import argparse
import contextlib
import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refine_titan.commands.ends import run_to_end
from refine_titan.commands.options import Parser
from refine_titan.config.user_paths import user_path
from refine_titan.errors import UserError
from refine_titan.terminal import begin_log, interrupt_on, show

if TYPE_CHECKING:  # it imports torch
    from refine_titan.reproduction.experiment import Experiment
    from refine_titan.reproduction.stages import Stage

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
        help="folders of experiments, or a file of arms of one (default: delta_net and lact of train_configs/reproduction)",
    )
    result.add_argument(
        "--arms", nargs="+", metavar="ARM", help="arms of arms.toml to run, with those they are compared with (default: all)"
    )
    result.add_argument("--forks", type=int, nargs="+", metavar="STEP", help="forks of arms.toml to run (default: all)")
    result.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="seeds (default: those of arms.toml)")
    result.add_argument("--jobs", type=int, help="processes at once (default: one for each CPU core, at most 4; one on a GPU)")
    result.add_argument("--report", action="store_true", help="reports the seeds of which everything is done; runs nothing")
    result.add_argument("--dry-run", action="store_true", help="lists the stages and whether they are done; runs nothing")
    result.add_argument("--output", type=user_path, default=Path("outputs/reproduction"))
    return result


def main(arguments: list[str]) -> int:
    """Reads the command line and carries it out; returns the exit status."""
    options, _ = parser().parse(arguments)
    interrupt_on(signal.SIGTERM)
    return run_to_end(lambda: run(options), interrupted=lambda: "Interrupted. The same command goes on.")


def run(options: argparse.Namespace) -> int:
    """Checks the options and runs the experiments; returns the exit status."""
    from refine_titan.reproduction.arms import check_seeds
    from refine_titan.reproduction.experiment import Experiment

    if options.seeds is not None:
        check_seeds(options.seeds, "--seeds")
    if options.jobs is not None and options.jobs < 1:
        raise UserError(f"--jobs is {options.jobs}; allowed: at least 1")
    if options.experiments is DEFAULTS and not EXPERIMENTS.is_dir():
        raise UserError(
            f"EXPERIMENT is missing, and there is no {EXPERIMENTS}; allowed: folders with start.toml, continue.toml and arms.toml"
        )
    output, paths = options.output.resolve(), [path.resolve() for path in options.experiments]
    directory = REPOSITORY if EXPERIMENTS.is_dir() else Path.cwd()
    with contextlib.chdir(directory):
        read = [Experiment.read(path, output / (path.parent if path.is_file() else path).name) for path in paths]
        experiments = [replace(one, plan=one.plan.chosen(options.arms, options.forks, options.seeds)) for one in read]
        if options.dry_run:
            show(listing(experiments))
        elif options.report:
            show(report(finished(experiments), output))
        else:
            show(reproduce(experiments, output, options.jobs or default_jobs()))
    return 0


def reproduce(experiments: "list[Experiment]", output: Path, num_jobs: int) -> str:
    """Runs every stage that is not done; returns the comparison as Markdown.

    Raises:
        UserError: if an experiment's files are wrong, or a process fails.
    """
    from refine_titan.monitoring.run_folder import FolderLock
    from refine_titan.reproduction.stages import run_stages

    stages = _stages(experiments)
    if not all(stage.is_done() for stage in stages):
        for experiment in experiments:
            experiment.check_samples()
    lock = FolderLock(output, "--output", "the reproduction")
    try:
        threads = max(len(os.sched_getaffinity(0)) // num_jobs, 1)
        environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
        run_stages(stages, num_jobs, output / "logs", Path.cwd(), environment, _print)
        return report(experiments, output)
    finally:
        lock.release()


def report(experiments: "list[Experiment]", output: Path) -> str:
    """Writes the reports of experiments whose stages are done; returns the comparison as Markdown."""
    from refine_titan.reproduction.page import markdown_page
    from refine_titan.reproduction.results import experiment_results

    found = [experiment_results(experiment) for experiment in experiments]
    _write(experiments, found, output)
    reports = f"{output / 'reproduction.html'}, .md, .tex, .json; figures: EXPERIMENT/figure.svg"
    return f"\n{markdown_page(found)}\n{reports}"


def finished(experiments: "list[Experiment]") -> "list[Experiment]":
    """The experiments with the seeds of which everything is done.

    Raises:
        UserError: there is none in an experiment.
    """
    _stages(experiments)
    found = []
    for experiment in experiments:
        seeds = experiment.finished_seeds()
        if not seeds:
            raise UserError(f"--report: {experiment.output} has no seed of which everything is done (--dry-run lists what is)")
        missing = tuple(seed for seed in experiment.plan.seeds if seed not in seeds)
        found.append(replace(experiment, plan=replace(experiment.plan, seeds=seeds, missing=missing)))
    return found


def listing(experiments: "list[Experiment]") -> str:
    """Lists the stages of experiments, whether they are done, and the folders of their results."""
    stages = _stages(experiments)
    states = [(("done" if stage.is_done() else "to run"), stage) for stage in stages]
    lines = [f"{state:6}  {stage.name}  {stage.folder}" for state, stage in states]
    num_done = sum(state == "done" for state, _ in states)
    return "\n".join([*lines, f"{num_done} of {len(stages)} stages are done"])


def _stages(experiments: "list[Experiment]") -> "list[Stage]":
    """The stages of experiments in the order in which they run, after a check of their settings."""
    from refine_titan.registration import register_models
    from refine_titan.reproduction.experiment import Experiment

    if len({experiment.name for experiment in experiments}) < len(experiments):
        raise UserError("two experiments have folders of the same name; files of arms of one folder run one after the other")
    begin_log()
    register_models()
    for experiment in experiments:
        experiment.check()
    # The starts come first, since all other stages wait for them.
    starts, arms = ([stage for one in experiments for stage in stages(one)] for stages in (Experiment.start_stages, Experiment.arm_stages))
    return starts + arms


def _write(experiments: "list[Experiment]", found: list[dict[str, Any]], output: Path) -> None:
    """Writes the reports of experiments and their figures."""
    from refine_titan.files.whole_files import write_atomically
    from refine_titan.monitoring.run_folder import versions
    from refine_titan.report.svg_files import svg_file
    from refine_titan.reproduction.charts import main_chart
    from refine_titan.reproduction.page import html, latex, markdown_page

    record = {"experiments": found, "versions": versions()}
    write_atomically(output / "reproduction.json", json.dumps(record, indent=1) + "\n")
    write_atomically(output / "reproduction.md", markdown_page(found))
    write_atomically(output / "reproduction.tex", latex(found))
    write_atomically(output / "reproduction.html", html(experiments, found))
    for experiment, results in zip(experiments, found):
        chart = main_chart(results)
        if chart is not None:
            write_atomically(experiment.figure, svg_file(chart))


def default_jobs() -> int:
    """Processes at once if `--jobs` is not given."""
    from torchtitan.tools.utils import device_type

    return 1 if device_type != "cpu" else min(len(os.sched_getaffinity(0)), 4)


def _print(line: str) -> None:
    print(line, flush=True)
