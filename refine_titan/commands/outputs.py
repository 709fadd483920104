"""The files into which `compare` and `report` write what they show: the options, and the writing."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from refine_titan.commands.options import Parser
from refine_titan.config.user_paths import user_path

CHARTS = "svg"
OUTPUTS = {
    "markdown": "the tables",
    "latex": "the tables for LaTeX, with booktabs",
    "csv": "the numbers of the tables, with all digits",
    CHARTS: "the charts, each as a file of this folder",
}


def add_outputs(parser: Parser, verb: str) -> None:
    """Adds an option for each output; `verb` begins its help, such as "write"."""
    for name, what in OUTPUTS.items():
        parser.add_argument(f"--{name}", type=user_path, metavar="FOLDER" if name == CHARTS else "OUT", help=f"{verb} {what}")


def wanted(options: argparse.Namespace) -> dict[str, Path]:
    """The outputs that the command line names, each with its path."""
    return {name: path for name in OUTPUTS if (path := getattr(options, name)) is not None}


def write_outputs(options: argparse.Namespace, texts: dict[str, Callable[[], str]], charts: Callable[[], Any]) -> list[Path]:
    """Writes the outputs that the command line names; returns their files.

    Args:
        texts: makes each output but the charts.
        charts: makes the charts.
    """
    from refine_titan.report.output import write_output
    from refine_titan.report.svg_files import write_svg_files

    written = []
    for name, path in wanted(options).items():
        if name == CHARTS:
            written += write_svg_files(path, charts())
        else:
            write_output(path, texts[name]())
            written.append(path)
    return written
