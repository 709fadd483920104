"""Writes `results.json`, `results.md` and `report.html` of an evaluation run again, from its `run.json` and `samples.jsonl`.

    python tools/report.py FOLDER [--training RUN_FOLDER]
    python tools/report.py FOLDER FOLDER ... --markdown OUT.md

With --training the report also shows the training run's curves and rollouts. With --markdown the command writes only the tables,
with a row for each run. Exit status 0, or 1 if a file is wrong.
"""

import argparse
import sys

import refine_titan  # noqa: F401  # isort: skip  announces the device before torchtitan is imported

from refine_titan.config.user_paths import user_path
from refine_titan.errors import UserError
from refine_titan.report.evaluation_report import write_report
from refine_titan.report.markdown import results_page
from refine_titan.report.output import write_output
from refine_titan.report.records import read_evaluation
from refine_titan.report.results import aggregate


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=user_path, nargs="+", metavar="FOLDER", help="folder of an evaluation run")
    parser.add_argument("--training", type=user_path, metavar="RUN_FOLDER", help="folder of the training run that made the checkpoint")
    parser.add_argument("--markdown", type=user_path, metavar="OUT", help="write only the tables, with a row for each run")
    arguments = parser.parse_args()
    if arguments.markdown is None and len(arguments.folders) > 1:
        parser.error("several folders need --markdown OUT")
    try:
        if arguments.markdown is not None:
            runs = [aggregate(*read_evaluation(folder)) for folder in arguments.folders]
            write_output(arguments.markdown, results_page(runs))
            print(arguments.markdown)
            return 0
        write_report(arguments.folders[0], arguments.training)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(arguments.folders[0] / "report.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
