"""Evaluates a checkpoint on RULER, LongBench and long documents.

    refine-titan evaluate run CONFIG.toml --checkpoint DIR --tasks niah longbench [--section.key value ...]
    refine-titan evaluate text CONFIG.toml --checkpoint DIR --source PATH    # held-out documents: loss, recall, continuations
    refine-titan evaluate harness CONFIG.toml --checkpoint DIR --tasks TASK ...    # tasks of lm-evaluation-harness
    refine-titan evaluate score FILE.jsonl    # adds a score to lines of {benchmark, task, response, answers}

`run` writes into DUMP_FOLDER/evaluation/NAME. The same command resumes an evaluation that was interrupted or killed; finished
samples are not run again. Several GPUs share the samples: run_evaluate.sh. Exit status 0 for success, 1 for a wrong setting or file, 2 for
a wrong command line, 75 after SIGTERM or SIGUSR1, 130 after Ctrl-C.
"""

import argparse
import json
import shlex
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from refine_titan.commands.ends import run_to_end
from refine_titan.commands.options import Parser
from refine_titan.config.user_paths import user_path
from refine_titan.distributed.launched_rank import end_with_launcher, is_launched
from refine_titan.errors import UserError
from refine_titan.terminal import INTERRUPTED, begin_log, interrupt_on

if TYPE_CHECKING:  # it imports torch
    from refine_titan.hub.together import Companions

# Options of `run` for settings of [evaluation].
SETTINGS = {
    "data-folder": "folder with the files of ruler_qa and longbench tasks",
    "metric": "what scores the questions of your own files: contains, exact_match, f1, rouge_l, or one of an installed package",
    "num-samples": "samples of each task and length",
    "essay-folder": "folder with the essays that some RULER tasks hide needles in",
    "seed": "seed of generated samples and of sampling",
    "engine": "native, vllm or auto",
    "protocol": "default (greedy) or reference (sampled, as in the published code)",
    "batch-size": "answers decoded at once",
    "max-prompt-tokens": "longest prompt; longer ones are cut and counted",
}


def parser() -> argparse.ArgumentParser:
    result = Parser("refine-titan evaluate", __doc__)
    commands = result.add_subparsers(dest="command", required=True)
    run = commands.add_parser(
        "run",
        help="evaluates a checkpoint",
        epilog="Any setting of the config can be given as --section.key value.",
        allow_abbrev=False,
    )
    _add_model(run)
    run.add_argument("--tasks", nargs="+", help="tasks, groups (niah, ruler, ruler_qa, longbench), perplexity, or files")
    run.add_argument("--lengths", nargs="+", help="lengths of generated tasks in tokens")
    for name, meaning in SETTINGS.items():
        run.add_argument(f"--{name}", help=meaning)
    run.add_argument("--name", help="name of the evaluation's folder (default: the checkpoint's name)")
    run.add_argument("--output", type=user_path, help="the evaluation's folder (default: DUMP_FOLDER/evaluation/NAME)")
    text = commands.add_parser(
        "text",
        help="measures a checkpoint on held-out documents",
        epilog="Any setting of the config can be given as --section.key value.",
        allow_abbrev=False,
    )
    _add_model(text)
    text.add_argument("--source", help="documents: any that data.source may name (default: those that data.holdout_percent holds out)")
    text.add_argument("--sequences", type=int, default=64, help="sequences that are measured (default: 64)")
    text.add_argument("--length", help="tokens of a sequence (default: training.seq_len)")
    text.add_argument("--seed", help="seed of documents, positions and rollouts (default: evaluation.seed)")
    text.add_argument("--ngram", type=int, default=3, help="tokens that must come again for a recall token (default: 3)")
    text.add_argument("--beyond", type=int, default=256, help="how many tokens ago they came, more than this (default: 256)")
    text.add_argument("--output", type=user_path, help="folder of measures.json (default: DUMP_FOLDER/evaluation/CHECKPOINT-text)")
    harness = commands.add_parser("harness", help="runs tasks of lm-evaluation-harness on a checkpoint", allow_abbrev=False)
    _add_model(harness)
    harness.add_argument("--tasks", nargs="+", required=True, help="tasks that lm-evaluation-harness knows")
    harness.add_argument("--include-path", type=user_path, help="folder with further tasks")
    harness.add_argument("--metadata", type=json_object, help='values for the tasks as JSON: ruler takes {"max_seq_lengths": [4096]}')
    harness.add_argument("--num-fewshot", type=int)
    harness.add_argument("--limit", type=int, help="samples of each task")
    harness.add_argument("--output", type=user_path, help="file that the harness's results go to as JSON")
    score = commands.add_parser("score", help="scores responses of any model; writes to standard output")
    score.add_argument("file", type=user_path, help="jsonl file of {benchmark, task, response, answers}")
    return result


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", help="TOML file of a run")
    command.add_argument(
        "--checkpoint",
        type=user_path,
        help="DCP checkpoint, Hugging Face folder, or owner/name of the Hub (default: the last checkpoint of the config's run)",
    )


def json_object(text: str) -> dict:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r:.80} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r:.80} is no JSON object")
    return value


def run_command(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from refine_titan.distributed.stop_request import StopRequest, stopped_status
    from refine_titan.evaluation.checkpoints import resolve_checkpoint
    from refine_titan.evaluation.job import evaluate, output_folder
    from refine_titan.evaluation.ranks import Ranks
    from refine_titan.hub.together import Companions
    from refine_titan.report.markdown import results_page

    for name in ("lengths", *SETTINGS):
        value = getattr(arguments, name.replace("-", "_"))
        if value is not None:
            values = value if isinstance(value, list) else [value]
            overrides = [*overrides, f"--evaluation.{name.replace('-', '_')}", *values]
    if arguments.output is not None and arguments.output == Path():
        raise UserError("--output is empty; give the folder of the evaluation")
    companions = Companions.from_environment()  # `Ranks` makes each rank a rank alone
    # Under the launcher a request to stop is noticed after a batch; otherwise it ends the process at once.
    end_with_launcher()
    with StopRequest() if is_launched() else nullcontext() as stop_request, Ranks.from_environment(stop_request) as ranks:
        config = load(arguments.config, overrides, companions)
        if arguments.tasks is not None:
            config.evaluation.tasks = arguments.tasks  # torchtitan's command line would split a path at its commas
        checkpoint = resolve_checkpoint(config, arguments.checkpoint, companions)
        folder = arguments.output or output_folder(config, checkpoint, arguments.name)
        goes_on = f"finished samples are in {folder}. The same command goes on."
        try:
            results = evaluate(config, checkpoint, folder, ranks)
        except KeyboardInterrupt as interrupt:
            ranks.tell_failure("was interrupted")
            if ranks.is_writer:
                print(f"Interrupted; {goes_on}", file=sys.stderr)
            return getattr(interrupt, "status", INTERRUPTED)
        if results is not None:
            print(results_page([results]))
            print(f"Results: {folder}/results.json, results.md, report.html")
        elif ranks.should_stop():
            if ranks.is_writer:
                print(f"Stopped on request; {goes_on}", file=sys.stderr)
            return stopped_status()
        return 0


# Options of `text` for settings of the run.
TEXT_SETTINGS = {"source": "evaluation.perplexity_source", "length": "training.seq_len", "seed": "evaluation.seed"}


def text_command(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from refine_titan.evaluation.checkpoints import resolve_checkpoint
    from refine_titan.evaluation.job import output_folder
    from refine_titan.evaluation.text.job import TextOptions, measure_text, measures_table, write_measures

    options = TextOptions(arguments.sequences, arguments.ngram, arguments.beyond)
    for name, setting in TEXT_SETTINGS.items():
        if getattr(arguments, name) is not None:
            overrides = [*overrides, f"--{setting}", getattr(arguments, name)]
    for name in ("source", "output"):
        if getattr(arguments, name) in ("", Path()):
            raise UserError(f"--{name} is empty")
    config = load(arguments.config, overrides)
    checkpoint = resolve_checkpoint(config, arguments.checkpoint)
    folder = arguments.output or output_folder(config, checkpoint, None).with_name(f"{output_folder(config, checkpoint, None).name}-text")
    record = measure_text(config, checkpoint, options)
    path = write_measures(folder, {"command": arguments.command_line, **record})
    print(measures_table(record))
    print(f"Measures: {path}")
    return 0


def harness_command(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from refine_titan.data.tokenizer import build_tokenizer
    from refine_titan.evaluation.checkpoints import resolve_checkpoint, with_tokenizer
    from refine_titan.evaluation.harness import evaluate_harness_tasks, load_harness_tasks
    from refine_titan.inference import Inference
    from refine_titan.report.output import write_output
    from refine_titan.rollout.build import resolve_evaluation_engine

    config = load(arguments.config, overrides)
    checkpoint = resolve_checkpoint(config, arguments.checkpoint)
    config = with_tokenizer(config, checkpoint)
    settings = config.evaluation
    tasks = load_harness_tasks(
        arguments.tasks,
        build_tokenizer(config),
        include_path=arguments.include_path,
        metadata=arguments.metadata,
        seed=settings.seed,
    )
    with Inference.from_config(config, checkpoint) as inference:
        engine = inference.build_engine(
            resolve_evaluation_engine(config, inference.args, inference.device),
            width=settings.batch_size,
            max_tokens=config.training.seq_len,
        )
        try:
            results = evaluate_harness_tasks(
                inference,
                engine,
                tasks,
                num_fewshot=arguments.num_fewshot,
                limit=arguments.limit,
                batch_size=settings.batch_size,
                seed=settings.seed,
            )
        finally:
            engine.close()
    text = json.dumps({name: results[name] for name in ("results", "n-samples", "versions", "configs")}, indent=1, default=str)
    print(json.dumps(results["results"], indent=1, default=str))
    if arguments.output is not None:
        write_output(arguments.output, text + "\n")
    return 0


def score_command(arguments: argparse.Namespace) -> int:
    from refine_titan.benchmarks.response_files import score_file

    lines = [encode(record) for record in score_file(arguments.file)]  # an error in any line leaves nothing written
    sys.stdout.buffer.writelines(lines)
    sys.stdout.buffer.flush()
    return 0


def load(path: str, overrides: list[str], companions: "Companions | None" = None):
    """The settings of a run, with its models registered; the log begins."""
    from refine_titan.registration import register_models
    from refine_titan.validation import load_config

    begin_log()
    config = load_config([path, *overrides], companions)
    register_models()
    return config


def encode(record: dict) -> bytes:
    try:
        return (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair, which only JSON's escapes can write
        return (json.dumps(record) + "\n").encode("ascii")


def main(arguments: list[str]) -> int:
    """Reads the command line and carries it out; returns the exit status."""
    options, overrides = parser().parse(arguments, settings=("run", "text", "harness"))
    options.command_line = shlex.join(["refine-titan", "evaluate", *arguments])
    from torch.distributed.elastic.multiprocessing.errors import record

    from refine_titan.distributed.stop_request import SIGNALS, STOPPED

    class Stopped(KeyboardInterrupt):
        """SIGTERM or SIGUSR1 has asked this process to stop."""

        status = STOPPED

    interrupt_on(*SIGNALS, by=Stopped)
    if options.command == "score":
        work = record(lambda: score_command(options))
    else:
        command = {"run": run_command, "text": text_command, "harness": harness_command}[options.command]
        work = record(lambda: command(options, overrides))
    return run_to_end(work, interrupted=lambda: "Interrupted; nothing was written.")
