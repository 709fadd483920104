"""Command lines of subcommands: argparse, with errors that name the option that was meant, and settings of a run among the options."""

import argparse
import re

from refine_titan.config.type_checks import did_you_mean


class Parser(argparse.ArgumentParser):
    """A parser whose description keeps its lines. Options are written out: `--rank` is not `--ranks`."""

    def __init__(self, prog: str, description: str | None = None, **options):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, description=description, **{"formatter_class": formatter, "allow_abbrev": False} | options)
        self.commands: argparse.Action | None = None

    def add_subparsers(self, **options):
        self.commands = super().add_subparsers(**options)
        return self.commands

    def parse(self, arguments: list[str], settings: bool | tuple[str, ...] = False) -> tuple[argparse.Namespace, list[str]]:
        """Returns the options, and the settings of a run (`--section.key value`) that were given among them.

        A command line that cannot be understood ends the process with status 2, after one line that says why.

        Args:
            settings: whether settings are allowed; or the commands that allow them.
        """
        found, rest = self.parse_known_args(arguments)
        parser: argparse.ArgumentParser = self.commands.choices[found.command] if self.commands is not None else self
        allowed = settings if isinstance(settings, bool) else found.command in settings
        for word in rest:
            name = word.partition("=")[0]
            if name.startswith("-") and not (allowed and "." in name) and not re.fullmatch(r"-[\d.]+(e-?\d+)?", name):
                parser.error(f"there is no option {name}{did_you_mean(name, re.findall(r'--[a-z][a-z-]*', parser.format_help()))}")
        if rest and not allowed:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        return found, rest

    def error(self, message: str):
        """Ends the process with a line that says what is wrong. argparse would print its usage before, which is long."""
        self.exit(2, f"error: {self.prog}: {message} ({self.prog} --help)\n")
