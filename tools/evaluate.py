"""Evaluation on RULER and LongBench.

    python tools/evaluate.py score FILE.jsonl    # lines of {benchmark, task, response, answers}, each written with its score
"""

import argparse
import json
import os
import sys
from pathlib import Path

from refine_titan.errors import UserError
from refine_titan.evaluation.scoring import score_file


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = result.add_subparsers(dest="command", required=True)
    score = commands.add_parser("score", help="scores responses of any model; writes to standard output")
    score.add_argument("file", type=Path, help="jsonl file of {benchmark, task, response, answers}")
    return result


def score_command(arguments: argparse.Namespace) -> int:
    lines = [encode(record) for record in score_file(arguments.file)]  # all of them before the first is written
    sys.stdout.buffer.writelines(lines)
    sys.stdout.buffer.flush()
    return 0


def encode(record: dict) -> bytes:
    try:
        return (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair, which only JSON's escapes can spell
        return (json.dumps(record) + "\n").encode("ascii")


def main() -> int:
    arguments = parser().parse_args()
    try:
        return score_command(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # of a reader like `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
