"""Makes the report of a training run, or of an evaluation, from its files.

    refine-titan report RUN [--svg FOLDER]                        # of a training run: RUN/report.html, or its curves as files
    refine-titan report FOLDER [--training RUN]                   # of an evaluation: report.html, results.json, .md, .tex, .csv
    refine-titan report FOLDER FOLDER ... --markdown OUT.md       # one table of several evaluations; also --latex, --csv, --svg

The page of a run has its curves and settings, and its rollouts to read; with --training that of an evaluation has these too. With
--markdown, --latex, --csv or --svg the command writes only these. Exit status 0, 1 if a file is wrong, 2 for a wrong command line.
"""

import argparse
import signal

from refine_titan.commands.ends import run_to_end
from refine_titan.commands.options import Parser
from refine_titan.commands.outputs import CHARTS, add_outputs, wanted, write_outputs
from refine_titan.config.user_paths import user_path
from refine_titan.errors import UsageError
from refine_titan.terminal import interrupt_on


def parser() -> Parser:
    result = Parser("refine-titan report", __doc__)
    result.add_argument("folders", type=user_path, nargs="+", metavar="FOLDER", help="folder of a training run or of an evaluation")
    result.add_argument("--training", type=user_path, metavar="RUN", help="folder of the training run that made the checkpoint")
    add_outputs(result, "write only")
    return result


def main(arguments: list[str]) -> int:
    """Reads the command line and carries it out; returns the exit status."""
    command_line = parser()
    options, _ = command_line.parse(arguments)
    if not wanted(options) and len(options.folders) > 1:
        command_line.error("several folders need --markdown, --latex, --csv or --svg")
    interrupt_on(signal.SIGTERM)  # by default the process would end and leave a half-written file
    return run_to_end(lambda: run(options), interrupted=lambda: "Interrupted; a page that is there is whole.")


def run(options: argparse.Namespace) -> int:
    """Writes the report or parts of it; returns the exit status."""
    from refine_titan.report.evaluation_report import write_report
    from refine_titan.report.markdown import results_page
    from refine_titan.report.records import RUN_FILE, read_evaluation
    from refine_titan.report.result_charts import result_charts
    from refine_titan.report.result_tables import results_csv, results_latex
    from refine_titan.report.results import aggregate
    from refine_titan.report.run_report import write_run_report
    from refine_titan.report.training_sections import METRICS_FILE, training_charts

    folder, outputs = options.folders[0], wanted(options)
    is_training = not (folder / RUN_FILE).exists() and (folder / METRICS_FILE).exists()
    if is_training and (len(options.folders) > 1 or outputs.keys() - {CHARTS}):
        raise UsageError(f"{folder} is a training run: alone, or with --svg; --markdown, --latex and --csv are for evaluations")
    if options.training is not None and (is_training or outputs):
        raise UsageError("--training is for the page of an evaluation")
    if is_training and outputs:
        written = write_outputs(options, {}, lambda: training_charts(folder))
    elif is_training:
        written = [write_run_report(folder)]
    elif outputs:
        runs = [aggregate(*read_evaluation(folder)) for folder in options.folders]
        texts = {"markdown": lambda: results_page(runs), "latex": lambda: results_latex(runs), "csv": lambda: results_csv(runs)}
        written = write_outputs(options, texts, lambda: result_charts(runs))
    else:
        write_report(folder, options.training)
        written = [folder / "report.html"]
    print(*written, sep="\n")
    return 0
