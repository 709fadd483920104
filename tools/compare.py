"""Compares two evaluation runs sample by sample.

    python tools/compare.py A B [--html OUT.html] [--markdown OUT.md]

A and B are folders of evaluation runs, or the `results.json` in them. For every task and length the command prints both scores,
the difference B - A with its 95 % confidence interval, and the p value of a paired permutation test, without and with Holm's
correction. It warns on standard error if the two runs did not measure the same thing (docs/results.md). Exit status 0, or 1 if a
file is wrong or the runs share no sample.
"""

import argparse
import sys

import refine_titan  # noqa: F401  # isort: skip  announces the device before torchtitan is imported

from refine_titan.config.user_paths import user_path
from refine_titan.errors import UserError, printable
from refine_titan.report.comparison import compare
from refine_titan.report.comparison_report import html_report, markdown_report, text_report
from refine_titan.report.output import write_output
from refine_titan.terminal import show


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=user_path, metavar="A", help="folder of an evaluation run, or its results.json")
    parser.add_argument("second", type=user_path, metavar="B", help="the run to compare it with")
    parser.add_argument("--html", type=user_path, metavar="OUT", help="write a page with charts")
    parser.add_argument("--markdown", type=user_path, metavar="OUT", help="write the tables")
    arguments = parser.parse_args()
    try:
        comparison = compare(arguments.first, arguments.second)
        for warning in comparison.warnings:
            show(f"WARNING: {printable(warning)}", sys.stderr)
        for remark in comparison.remarks:
            show(f"note: {printable(remark)}", sys.stderr)
        for path, write in ((arguments.html, html_report), (arguments.markdown, markdown_report)):
            if path is not None:
                write_output(path, write(comparison))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    show(text_report(comparison))
    return 0


if __name__ == "__main__":
    sys.exit(main())
