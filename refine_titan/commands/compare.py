"""Compares two evaluation runs sample by sample.

    refine-titan compare A B [--html OUT.html] [--markdown OUT.md] [--latex OUT.tex] [--csv OUT.csv] [--svg FOLDER]

A and B are folders of evaluation runs, or the `results.json` in them. The first line says the overall difference. For every task and
length the command prints both scores, the difference B - A with its 95 % confidence interval, and the p value of a paired permutation
test, without and with Holm's correction. It warns on standard error if the two runs did not measure the same thing (docs/results.md).
Exit status 0, 1 if a file is wrong or the runs share no sample, 2 for a wrong command line.
"""

import argparse
import signal
import sys

from refine_titan.commands.ends import run_to_end
from refine_titan.commands.options import Parser
from refine_titan.commands.outputs import add_outputs, write_outputs
from refine_titan.config.user_paths import user_path
from refine_titan.errors import printable
from refine_titan.terminal import interrupt_on, show


def parser() -> Parser:
    result = Parser("refine-titan compare", __doc__)
    result.add_argument("first", type=user_path, metavar="A", help="folder of an evaluation run, or its results.json")
    result.add_argument("second", type=user_path, metavar="B", help="the run to compare it with")
    result.add_argument("--html", type=user_path, metavar="OUT", help="write a page with charts")
    add_outputs(result, "write")
    return result


def main(arguments: list[str]) -> int:
    """Reads the command line and carries it out; returns the exit status."""
    options, _ = parser().parse(arguments)
    interrupt_on(signal.SIGTERM)  # by default the process would end and leave a half-written file
    return run_to_end(lambda: run(options), interrupted=lambda: "Interrupted; a page that is there is whole.")


def run(options: argparse.Namespace) -> int:
    """Compares and prints; returns the exit status."""
    from refine_titan.report.comparison import compare
    from refine_titan.report.comparison_report import comparison_charts, csv_report, html_report, latex_report, markdown_report, text_report
    from refine_titan.report.output import write_output

    comparison = compare(options.first, options.second)
    for warning in comparison.warnings:
        show(f"WARNING: {printable(warning)}", sys.stderr)
    for remark in comparison.remarks:
        show(f"note: {printable(remark)}", sys.stderr)
    if options.html is not None:
        write_output(options.html, html_report(comparison))
    texts = {
        "markdown": lambda: markdown_report(comparison),
        "latex": lambda: latex_report(comparison),
        "csv": lambda: csv_report(comparison),
    }
    write_outputs(options, texts, lambda: comparison_charts(comparison))
    show(text_report(comparison))
    return 0
