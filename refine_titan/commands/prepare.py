"""Prepares training data: turns parquet, jsonl and text files into tokenized, filtered shards.

    refine-titan prepare run --input PATH... --tokenizer FOLDER --output FOLDER [settings]
    refine-titan prepare run --recipe NAME --input FOLDER --tokenizer FOLDER --output FOLDER [settings]
    refine-titan prepare verify FOLDER      # compares the shards with the manifest, byte for byte
    refine-titan prepare show FOLDER        # counts, origin, lengths
    refine-titan prepare --list-recipes

A training run with `data.source = "FOLDER"` reads the result. The bytes of the output depend on inputs, tokenizer, settings and
package versions, not on --workers. If a run is interrupted or killed, repeating its command continues it. The tool downloads nothing.
Exit status 0 if all is well, 1 if a file or setting is wrong or `verify` found damage, 2 for a wrong command line, 130 after Ctrl-C.
"""

import argparse
import os
import signal
import sys
from dataclasses import fields
from pathlib import Path

from refine_titan.commands.ends import FAILED, run_to_end
from refine_titan.commands.options import Parser
from refine_titan.config.user_paths import user_path
from refine_titan.errors import UserError, printable
from refine_titan.files.reasons import is_about_a_file
from refine_titan.preparation.settings import RECIPES, UNIT_BYTES, Settings, describe_recipes, flag, resolve_settings
from refine_titan.terminal import interrupt_on, show
from refine_titan.worker_process import WorkerDied


class ListRecipes(argparse.Action):
    def __call__(self, parser, *_):
        print(describe_recipes())
        parser.exit()


def parser() -> argparse.ArgumentParser:
    top = Parser("refine-titan prepare", __doc__)
    top.add_argument(
        "--list-recipes", nargs=0, action=ListRecipes, help="show all recipes, with their settings and what to download, and exit"
    )
    commands = top.add_subparsers(dest="command", required=True)
    command = commands.add_parser("run", help="prepare data", formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    command.add_argument("--list-recipes", nargs=0, action=ListRecipes, help="show all recipes and exit")
    command.add_argument("--recipe", choices=RECIPES, help="settings of a published data set; flags override them")
    command.add_argument("--input", type=user_path, nargs="+", required=True, metavar="PATH", help="files and folders, in this order")
    command.add_argument(
        "--tokenizer", required=True, metavar="FOLDER", help="folder with tokenizer.json, owner/name of the Hub, or: bytes"
    )
    command.add_argument(
        "--output", type=user_path, required=True, metavar="FOLDER", help="a path that does not exist; appears when complete"
    )
    command.add_argument("--workers", type=int, default=os.cpu_count(), metavar="N", help="number of processes; default: one per CPU")
    command.add_argument(
        "--unit-bytes",
        type=int,
        default=UNIT_BYTES,
        metavar="N",
        help=f"about how many bytes of input a process takes at a time; default: {UNIT_BYTES}",
    )
    settings = command.add_argument_group("settings (default: the recipe's, otherwise as stated)")
    for item in fields(Settings):
        choices, many = item.metadata["choices"], item.name == "suffixes"
        default = " ".join(item.default) if many else item.default
        stated = f"; default: {default}" if default not in ("", None) else ""
        settings.add_argument(
            flag(item.name),
            choices=choices or None,
            default=None,
            nargs="+" if many else None,
            type=int if isinstance(item.default, int) or item.name == "seed" else str,
            metavar=None if choices else "N" if isinstance(item.default, int) or item.name == "seed" else item.name.upper(),
            help=(item.metadata["help"] + stated).replace("%", "%%"),
        )
    command = commands.add_parser("verify", help="compare shards with the manifest, byte for byte")
    command.add_argument("folder", type=user_path, help="prepared data")
    command = commands.add_parser("show", help="counts, origin and lengths")
    command.add_argument("folder", type=user_path, help="prepared data")
    return top


def run(arguments: argparse.Namespace) -> int:
    """Prepares data; returns the exit status."""
    from refine_titan.hub.settings import model_folder
    from refine_titan.preparation.inspection import summary
    from refine_titan.preparation.run import prepare

    for name in ("workers", "unit_bytes"):
        if getattr(arguments, name) < 1:
            raise UserError(f"{flag(name)} is {getattr(arguments, name)}; allowed: at least 1")
    overrides = {item.name: value for item in fields(Settings) if (value := getattr(arguments, item.name)) is not None}
    if "suffixes" in overrides:
        overrides["suffixes"] = tuple(overrides["suffixes"])
    settings = resolve_settings(arguments.recipe, overrides)
    tokenizer = "" if arguments.tokenizer == "bytes" else str(model_folder(str(user_path(arguments.tokenizer)), "--tokenizer"))
    many = {"workers": arguments.workers, "unit_bytes": arguments.unit_bytes}
    try:
        outcome = prepare(arguments.input, tokenizer, arguments.output, settings, **many)
    except WorkerDied as error:
        hint = ": use fewer --workers" if error.was_killed else ""
        raise WorkerDied(f"{error}{hint}", error.was_killed) from None
    except OSError as error:
        if is_about_a_file(error):
            raise
        raise UserError(f"a file: {error.strerror or error}{_kept(arguments)}") from None
    show(summary(outcome.manifest))
    done = outcome.tokenization
    if done is None:
        print(f"{arguments.output} was already complete")
        return 0
    rate = f", {done.tokens / done.seconds:,.0f} tokens per second" if done.seconds > 0 and done.tokens else ""
    resumed = f", {done.resumed_units} of {done.units} units by an earlier call" if done.resumed_units else ""
    print(f"output:    {arguments.output}, {done.tokens:,} tokens read in {done.seconds:.1f} s{rate}{resumed}")
    return 0


def check(folder: Path) -> int:
    """Verifies prepared data; returns the exit status."""
    from refine_titan.preparation.inspection import verify

    problems = verify(folder)
    for problem in problems:
        show(f"error: {printable(problem)}", sys.stderr)
    if not problems:
        print(f"{folder}: every shard is as the manifest says")
    return FAILED if problems else 0


def show_folder(folder: Path) -> int:
    """Prints what prepared data hold; returns the exit status."""
    from refine_titan.preparation.inspection import describe

    show(describe(folder))
    return 0


def main(arguments: list[str]) -> int:
    """Reads the command line and carries it out; returns the exit status."""
    options, _ = parser().parse(arguments)
    interrupt_on(signal.SIGTERM)
    commands = {"run": lambda: run(options), "verify": lambda: check(options.folder), "show": lambda: show_folder(options.folder)}
    return run_to_end(commands[options.command], lambda: f"Interrupted{_kept(options)}", lambda: _kept(options))


def _kept(arguments: argparse.Namespace) -> str:
    """The end of a message that says what is left of an unfinished run."""
    from refine_titan.preparation.run import partial_folder

    if arguments.command != "run":
        return ""
    partial = partial_folder(Path(os.path.abspath(arguments.output)))
    if not partial.exists():
        return "; nothing was written"
    return f"; finished parts are kept in {partial}: repeat the command to continue, or delete the folder to give up"
