"""Turns the names of tasks, groups and files into samples."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from refine_titan.benchmarks.metrics import LONGBENCH_METRICS, RULER_QA_EXAMPLES, RULER_TASKS, check_task
from refine_titan.benchmarks.question_metrics import DEFAULT_METRIC, find_metric
from refine_titan.benchmarks.ruler.generate import RulerGenerator
from refine_titan.benchmarks.samples import Sample, TaskSamples
from refine_titan.benchmarks.task_files import SUFFIXES, TaskFileReader, benchmark_of_task, is_named_for, task_of
from refine_titan.config.type_checks import did_you_mean
from refine_titan.data.chat import ChatTemplate
from refine_titan.data.data_files import format_of
from refine_titan.data.tokenizer import BaseTokenizer
from refine_titan.errors import UserError

NIAH_TASKS = tuple(task for task in RULER_TASKS if task.startswith("niah_"))
# Groups of generated tasks. "longbench" and "ruler_qa" are groups of whatever files the data folder has.
GROUPS = {"niah": NIAH_TASKS, "ruler": RULER_TASKS}
FILE_GROUPS = ("longbench", "ruler_qa")
# Folders within the data folder that may hold a benchmark's files.
FOLDERS = {"longbench": ("longbench", "."), "ruler_qa": ("ruler_qa", "ruler", "."), "ruler": ("ruler", ".")}
# Generated samples of each task and length if no number is asked for.
DEFAULT_NUM_SAMPLES = 100


def load_samples(
    name: str,
    *,
    tokenizer: BaseTokenizer,
    data_folder: str = "",
    lengths: Sequence[int] = (4096,),
    num_samples: int | None = None,
    essay_folder: str = "",
    metric: str = DEFAULT_METRIC,
    seed: int = 0,
    cache_folder: Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> TaskSamples:
    """Loads or generates the samples of a task, a group or a file.

    Args:
        name: a generated task ("ruler/niah_single_1"); a task in a file ("ruler_qa/ruler_squadqa", "longbench/hotpotqa",
            "ruler/ruler_niah_single_1"); a group ("niah" and "ruler" are generated, "longbench" and "ruler_qa" are all files
            found); or the path of a table (a file with one of `SUFFIXES`, which may be compressed).
        tokenizer: counts the tokens of generated prompts.
        data_folder: holds the files of LongBench and RULER QA, directly or in `longbench/` and `ruler_qa/` or `ruler/`.
        lengths: tokens of generated samples, prompt plus answer.
        num_samples: samples of each generated task and length (None: 100), and the most that are taken from the start of a file
            (None: all).
        essay_folder: text for the haystacks that RULER fills with essays; empty takes a built-in substitute.
        metric: scores questions that belong to no benchmark: one of `METRICS`, or of an installed package.
        seed: seed of the generated samples.
        cache_folder: keeps generated samples; None keeps none.
        progress: called after each generated sample with the task, the number generated and the number wanted.

    Raises:
        UserError: if the name is unknown, a file is missing, ambiguous or unusable, or a task cannot have a length.
    """
    if num_samples is not None and num_samples < 1:
        raise UserError(f"num_samples is {num_samples}; allowed: a whole number from 1")
    generator = None
    samples: list[Sample] = []
    skipped: Counter[str] = Counter()
    find_metric(metric)
    for member in expand_names([name], data_folder):
        if member.startswith("ruler/") and member.removeprefix("ruler/") in RULER_TASKS:
            if not lengths:
                raise UserError(f"lengths is empty; {member} needs at least one number of tokens")
            generator = generator or RulerGenerator(tokenizer, seed, essay_folder, cache_folder)
            wanted = [(length, index) for length in dict.fromkeys(lengths) for index in range(num_samples or DEFAULT_NUM_SAMPLES)]
            for done, (length, index) in enumerate(wanted, start=1):
                samples.append(generator.sample(member.removeprefix("ruler/"), length, index))
                if progress:
                    progress(member, done, len(wanted))
        else:
            benchmark, task, path = _file_of(member, data_folder)
            reader = TaskFileReader(path, benchmark, task, ChatTemplate.of_tokenizer(tokenizer), metric)
            usable = _first(reader.samples(), num_samples)
            if not usable:
                reasons = ", ".join(f"{reason} ({count})" for reason, count in reader.skipped.items())
                raise UserError(f"{path} has no usable row{f': {reasons}' if reasons else ''}")
            samples += usable
            skipped += reader.skipped
    notes = list(generator.notes) if generator else []
    for task in dict.fromkeys(sample.task for sample in samples if sample.metric):
        notes.append(f"{task} is scored by {metric} (evaluation.metric)")
    return TaskSamples(name, samples, dict(skipped), tuple(notes))


def expand_names(names: Iterable[str], data_folder: str = "") -> list[str]:
    """Replaces groups by their tasks; keeps the order and drops repetitions.

    Raises:
        UserError: if a name is unknown, or there is no file of a group of files.
    """
    result: dict[str, None] = {}
    for name in names:
        if name in GROUPS:
            members = [f"ruler/{task}" for task in GROUPS[name]]
        elif name in FILE_GROUPS:
            members = [f"{name}/{task}" for task in _tasks_found(name, data_folder)]
        elif not _is_path(name):
            check_name(name)
            members = [name]
        else:
            members = [name]
        result |= dict.fromkeys(members)
    return list(result)


def check_name(name: str) -> None:
    """Raises UserError, which suggests the nearest known name, unless `name` is BENCHMARK/TASK of a known task."""
    benchmark, slash, task = name.partition("/")
    if not slash or benchmark not in ("ruler", *FILE_GROUPS):
        known = [*GROUPS, *(group for group in FILE_GROUPS), *(f"ruler/{task}" for task in RULER_TASKS)]
        known += [f"longbench/{task}" for task in LONGBENCH_METRICS] + [f"ruler_qa/{task}" for task in RULER_QA_EXAMPLES]
        raise UserError(
            f"task {name!r} is unknown{did_you_mean(name, known)}; allowed: {', '.join((*GROUPS, *FILE_GROUPS))}, "
            f"BENCHMARK/TASK such as ruler/niah_single_1 or longbench/hotpotqa, or the path of a {' or '.join(SUFFIXES)} file"
        )
    check_task(benchmark, task)


def _is_path(name: str) -> bool:
    return format_of(Path(name)) in SUFFIXES


def _file_of(name: str, data_folder: str) -> tuple[str | None, str | None, Path]:
    """Finds benchmark, task and file of a name; benchmark and task are None for a path, whose rows tell them."""
    if _is_path(name):
        path = Path(name).expanduser()
        if not path.is_file():
            raise UserError(f"task {name!r}: no such file")
        return None, None, path
    benchmark, _, task = name.partition("/")
    folders = _folders(benchmark, data_folder)
    found = [path for folder in folders for path in _files(folder) if is_named_for(path, task) and task_of(path) in (task, None)]
    if len(found) == 1:
        return benchmark, task, found[0]
    if found:
        raise UserError(f"task {name!r}: several files are named for it: {', '.join(map(str, found))}; give the path of one")
    there = sorted({path.name for folder in folders for path in _files(folder)})
    raise UserError(
        f"task {name!r}: no file {task} or {task}_... ending in {', '.join(SUFFIXES)} in {', '.join(map(str, folders))}; "
        f"files there: {', '.join(there) or 'none'}"
    )


def _tasks_found(benchmark: str, data_folder: str) -> list[str]:
    folders = _folders(benchmark, data_folder)
    tasks = {task_of(path): None for folder in folders for path in _files(folder)}
    tasks = [task for task in tasks if task is not None and benchmark_of_task(task) == benchmark]
    if not tasks:
        there = sorted({path.name for folder in folders for path in _files(folder)})
        raise UserError(
            f"task {benchmark!r}: no file of {benchmark} in {', '.join(map(str, folders)) or data_folder}; "
            f"files there: {', '.join(there) or 'none'}"
        )
    return tasks


def _folders(benchmark: str, data_folder: str) -> list[Path]:
    if not data_folder:
        raise UserError(f"data_folder is empty; tasks of {benchmark} need the folder of their files ({', '.join(SUFFIXES)})")
    root = Path(data_folder).expanduser()
    if not root.is_dir():
        raise UserError(f"data_folder is {data_folder!r}: no such folder")
    return [folder for folder in dict.fromkeys(root / name for name in FOLDERS[benchmark]) if folder.is_dir()]


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if format_of(path) in SUFFIXES and path.is_file())


def _first(samples: Iterable[Sample], count: int | None) -> list[Sample]:
    """Takes the first `count` samples of a file (None: all) and reads no row beyond them."""
    result = []
    for sample in samples:
        result.append(sample)
        if len(result) == count:
            break
    return result
