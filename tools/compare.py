"""Compares two evaluation runs sample by sample.

    python tools/compare.py A B [--html OUT.html] [--markdown OUT.md] [--latex OUT.tex] [--csv OUT.csv] [--svg FOLDER]

A and B are folders of evaluation runs, or the `results.json` in them. The first line says the overall difference. For every task and
length the command prints both scores, the difference B - A with its 95 % confidence interval, and the p value of a paired permutation
test, without and with Holm's correction. It warns on standard error if the two runs did not measure the same thing (docs/results.md).
Exit status 0, 1 if a file is wrong or the runs share no sample, or 2 for a wrong option.
"""

import argparse
import sys

import refine_titan  # noqa: F401  # isort: skip  announces the device before torchtitan is imported

from refine_titan.config.user_paths import user_path
from refine_titan.errors import UserError, printable
from refine_titan.report.comparison import compare
from refine_titan.report.comparison_report import comparison_charts, csv_report, html_report, latex_report, markdown_report, text_report
from refine_titan.report.output import write_output
from refine_titan.report.svg_files import write_svg_files
from refine_titan.terminal import show


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=user_path, metavar="A", help="folder of an evaluation run, or its results.json")
    parser.add_argument("second", type=user_path, metavar="B", help="the run to compare it with")
    parser.add_argument("--html", type=user_path, metavar="OUT", help="write a page with charts")
    parser.add_argument("--markdown", type=user_path, metavar="OUT", help="write the tables")
    parser.add_argument("--latex", type=user_path, metavar="OUT", help="write the tables for LaTeX, with booktabs")
    parser.add_argument("--csv", type=user_path, metavar="OUT", help="write the numbers of the tables, with all digits")
    parser.add_argument("--svg", type=user_path, metavar="FOLDER", help="write the charts, each as a file of this folder")
    arguments = parser.parse_args()
    try:
        comparison = compare(arguments.first, arguments.second)
        for warning in comparison.warnings:
            show(f"WARNING: {printable(warning)}", sys.stderr)
        for remark in comparison.remarks:
            show(f"note: {printable(remark)}", sys.stderr)
        outputs = (
            (arguments.html, html_report),
            (arguments.markdown, markdown_report),
            (arguments.latex, latex_report),
            (arguments.csv, csv_report),
        )
        for path, write in outputs:
            if path is not None:
                write_output(path, write(comparison))
        if arguments.svg is not None:
            write_svg_files(arguments.svg, comparison_charts(comparison))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    show(text_report(comparison))
    return 0


if __name__ == "__main__":
    sys.exit(main())
