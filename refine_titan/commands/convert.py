"""Converts checkpoints between Hugging Face folders and torch's DCP, and reports what is in them.

    refine-titan convert from-hf HF_DIR OUT
    refine-titan convert to-hf DCP_DIR OUT [--config CONFIG.json] [--dtype DTYPE] [--push OWNER/NAME] ...
    refine-titan convert inspect DIR

from-hf writes a DCP checkpoint from which a run can start (`checkpoint.initial_load_path`). to-hf writes safetensors and the
`config.json` with which the model's own library loads them. Weights keep their stored dtype, bit for bit, unless --dtype
names another. OUT appears complete or not at all. Exit status 0 if all is well, 1 if a file or setting is wrong or `inspect` found
mismatches, 2 for a wrong command line, 130 after Ctrl-C.
"""

import argparse
import math
import re
import signal
import sys
from typing import TYPE_CHECKING

from refine_titan.commands.ends import FAILED, run_to_end
from refine_titan.commands.options import Parser
from refine_titan.config.user_paths import user_path
from refine_titan.errors import UserError, printable
from refine_titan.terminal import interrupt_on, show

if TYPE_CHECKING:  # they import torch
    from refine_titan.hub.upload import Destination
    from refine_titan.report.model_card import TrainedModel

DTYPES = ("float32", "bfloat16", "float16")
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def size(text: str) -> int:
    """Parses a size such as `500MB`, `1GB` or `2GiB` into bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)", text)
    if not found or found.group(2) not in UNITS or float(found.group(1)) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; allowed: a number above 0 and one of {', '.join(UNITS)}")
    if float(found.group(1)) == math.inf:
        raise argparse.ArgumentTypeError(f"{text[:20]!r}... is too large a size")
    return int(float(found.group(1)) * UNITS[found.group(2)])


def parser() -> argparse.ArgumentParser:
    top = Parser("refine-titan convert", __doc__)
    commands = top.add_subparsers(dest="command", required=True)
    command = commands.add_parser("from-hf", help="Hugging Face folder to DCP")
    command.add_argument("hf_dir", type=user_path, help="folder with config.json and safetensors weights, or owner/name of the Hub")
    command.add_argument("out", type=user_path, help="DCP checkpoint to write; nothing or an empty folder may be there")
    command = commands.add_parser("to-hf", help="DCP to Hugging Face folder")
    command.add_argument("dcp_dir", type=user_path, help="DCP checkpoint: a run's checkpoint/step-N, or what from-hf wrote")
    command.add_argument("out", type=user_path, help="folder to write; nothing or an empty folder may be there")
    command.add_argument("--config", type=user_path, help="config.json that describes the model; default: the checkpoint's own")
    command.add_argument("--dtype", choices=DTYPES, help="dtype of the weights; default: as stored")
    command.add_argument(
        "--max-shard-size",
        type=size,
        default=10**9,
        metavar="SIZE",
        help="size of a safetensors file; one of them is in memory at a time; default: 1GB",
    )
    command.add_argument(
        "--tokenizer",
        type=user_path,
        metavar="FOLDER",
        help="folder with a tokenizer, owner/name of the Hub, or: bytes; default: the checkpoint's own",
    )
    command.add_argument("--push", metavar="OWNER/NAME", help="push the folder with a model card to the Hugging Face Hub (HF_TOKEN)")
    command.add_argument("--private", action="store_true", help="the repository, if --push makes it, is private")
    command.add_argument(
        "--evaluation", type=user_path, nargs="+", default=[], metavar="FOLDER", help="evaluations of these weights, for the card's scores"
    )
    command = commands.add_parser("inspect", help="tensors, dtypes, sizes, and what does not match config.json")
    command.add_argument("dir", type=user_path, help="Hugging Face folder, owner/name of the Hub, or DCP checkpoint")
    return top


def run(arguments: argparse.Namespace) -> int:
    """Carries out a command; returns the exit status."""
    from refine_titan.conversion.from_hf import from_hf
    from refine_titan.conversion.inspection import inspect
    from refine_titan.hub.settings import model_folder

    if arguments.command == "inspect":
        report = inspect(model_folder(str(arguments.dir), "DIR", weights=True))
        for line in report.lines:
            show(printable(line))
        for problem in report.problems:
            show(f"error: {printable(problem)}", sys.stderr)
        return FAILED if report.problems else 0
    if arguments.command == "from-hf":
        notes = from_hf(model_folder(str(arguments.hf_dir), "HF_DIR", weights=True), arguments.out)
    else:
        notes = export(arguments)
    for note in notes:
        show(f"note: {printable(note)}", sys.stderr)
    show(arguments.out)
    return 0


def export(arguments: argparse.Namespace) -> list[str]:
    """Carries out to-hf; returns notes for the user."""
    import torch

    from refine_titan.conversion.to_hf import BYTES, to_hf
    from refine_titan.hub.settings import model_folder
    from refine_titan.hub.upload import Destination
    from refine_titan.report.model_card import model_card

    if arguments.push is None and (arguments.private or arguments.evaluation):
        raise UserError(f"{'--private' if arguments.private else '--evaluation'} is given without --push; allowed: with it")
    destination = None if arguments.push is None else Destination(arguments.push)
    tokenizer = None if arguments.tokenizer is None else str(arguments.tokenizer)
    if tokenizer not in (None, BYTES):
        tokenizer = model_folder(tokenizer, "--tokenizer")
    card = None if destination is None else model_card(described(arguments, destination))
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    notes = to_hf(arguments.dcp_dir, arguments.out, arguments.config, dtype, arguments.max_shard_size, tokenizer)
    if destination is not None:
        try:
            place = destination.push(arguments.out, card, arguments.private, f"{arguments.dcp_dir.resolve().name} of refine_titan")
        except UserError as error:
            again = f"hf upload {destination.name} {arguments.out} --delete 'model*.safetensors*'"
            raise UserError(f"{error}. {arguments.out} is complete: `{again}` pushes it") from error
        show(f"pushed to {place}")
    return notes


def described(arguments: argparse.Namespace, destination: "Destination") -> "TrainedModel":
    """What the card tells of the checkpoint."""
    import torch

    from refine_titan.conversion.dcp_weights import DCPWeights
    from refine_titan.models.model_config import ModelConfig
    from refine_titan.report.model_card import trained_model

    weights = DCPWeights(arguments.dcp_dir)
    family = ModelConfig.read(arguments.config or arguments.dcp_dir).family_name
    return trained_model(
        destination.name, family, arguments.dcp_dir, arguments.evaluation, lambda dtype: weights.sha256(getattr(torch, dtype))
    )


def main(arguments: list[str]) -> int:
    """Reads the command line and carries it out; returns the exit status."""
    options, _ = parser().parse(arguments)

    def interrupted() -> str:
        # The signal may have come after the output got its name.
        is_complete = options.command != "inspect" and options.out.is_dir() and any(options.out.iterdir())
        return f"Interrupted; {f'{options.out} is complete' if is_complete else 'nothing was written'}."

    interrupt_on(signal.SIGTERM)  # by default the process would end and leave the unfinished folder
    return run_to_end(lambda: run(options), interrupted)
