"""Makes the report of a training run, or of an evaluation, from its files.

    python tools/report.py RUN [--svg FOLDER]                        # of a training run: RUN/report.html, or its curves as files
    python tools/report.py FOLDER [--training RUN]                   # of an evaluation: report.html, results.json, .md, .tex, .csv
    python tools/report.py FOLDER FOLDER ... --markdown OUT.md       # one table of several evaluations; also --latex, --csv, --svg

The page of a run has its curves and settings, and its rollouts to read; with --training that of an evaluation has these too. With
--markdown, --latex, --csv or --svg the command writes only these. Exit status 0, 1 if a file is wrong, or 2 for a wrong option.
"""

import argparse
import sys

import refine_titan  # noqa: F401  # isort: skip  announces the device before torchtitan is imported

from refine_titan.config.user_paths import user_path
from refine_titan.errors import UserError
from refine_titan.report.evaluation_report import write_report
from refine_titan.report.markdown import results_page
from refine_titan.report.output import write_output
from refine_titan.report.records import RUN_FILE, read_evaluation
from refine_titan.report.result_charts import result_charts
from refine_titan.report.result_tables import results_csv, results_latex
from refine_titan.report.results import aggregate
from refine_titan.report.run_report import write_run_report
from refine_titan.report.svg_files import write_svg_files
from refine_titan.report.training_sections import METRICS_FILE, training_charts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=user_path, nargs="+", metavar="FOLDER", help="folder of a training run or of an evaluation")
    parser.add_argument("--training", type=user_path, metavar="RUN", help="folder of the training run that made the checkpoint")
    parser.add_argument("--markdown", type=user_path, metavar="OUT", help="write only the tables, with a row for each evaluation")
    parser.add_argument("--latex", type=user_path, metavar="OUT", help="the same for LaTeX, with booktabs")
    parser.add_argument("--csv", type=user_path, metavar="OUT", help="write only the numbers, a line for each metric")
    parser.add_argument("--svg", type=user_path, metavar="FOLDER", help="write only the charts, each as a file of this folder")
    arguments = parser.parse_args()
    outputs = ((arguments.markdown, results_page), (arguments.latex, results_latex), (arguments.csv, results_csv))
    only_some = any(path is not None for path in (arguments.markdown, arguments.latex, arguments.csv, arguments.svg))
    if not only_some and len(arguments.folders) > 1:
        parser.error("several folders need --markdown, --latex, --csv or --svg")
    folder, written = arguments.folders[0], []
    is_training = not (folder / RUN_FILE).exists() and (folder / METRICS_FILE).exists()
    if is_training and (len(arguments.folders) > 1 or any(path is not None for path, _ in outputs)):
        parser.error(f"{folder} is a training run: alone, or with --svg; --markdown, --latex and --csv are for evaluations")
    if arguments.training is not None and (is_training or only_some):
        parser.error("--training is for the page of an evaluation")
    try:
        if is_training and only_some:
            written += write_svg_files(arguments.svg, training_charts(folder))
        elif is_training:
            written.append(write_run_report(folder))
        elif only_some:
            runs = [aggregate(*read_evaluation(folder)) for folder in arguments.folders]
            for path, make in outputs:
                if path is not None:
                    write_output(path, make(runs))
                    written.append(path)
            if arguments.svg is not None:
                written += write_svg_files(arguments.svg, result_charts(runs))
        else:
            write_report(folder, arguments.training)
            written.append(folder / "report.html")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(*written, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
