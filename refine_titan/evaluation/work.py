"""Plans the work of an evaluation: loads the samples of the tasks that a config names, and tokenizes and cuts their prompts."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.tools.logging import logger

from refine_titan.benchmarks.samples import Sample, TaskSamples
from refine_titan.benchmarks.tasks import expand_names, load_samples
from refine_titan.config.sections import JobConfig
from refine_titan.errors import UserError
from refine_titan.evaluation import perplexity
from refine_titan.evaluation.prompts import AnswerProtocol, Prompt, prepare_prompt
from refine_titan.evaluation.sample_log import SampleKey
from refine_titan.progress import SECONDS_BETWEEN_LINES


@dataclass(frozen=True)
class Work:
    """The prompts and documents that an evaluation has to evaluate.

    Attributes:
        tasks: names of the tasks.
        prompts: prompts of all tasks except perplexity.
        documents: samples of perplexity.
        skipped: task -> reason -> number of rows that are not evaluated.
        notes: facts that a reader of the results must know.
    """

    tasks: tuple[str, ...]
    prompts: list[Prompt]
    documents: list[Sample]
    skipped: dict[str, dict[str, int]]
    notes: tuple[str, ...]

    @property
    def samples(self) -> list[Sample]:
        """Samples of all prompts and documents."""
        return [*(prompt.sample for prompt in self.prompts), *self.documents]


def plan_work(tasks: Sequence[TaskSamples], protocol: AnswerProtocol, tokenizer: BaseTokenizer) -> Work:
    """Tokenizes and cuts every prompt, and counts the rows that are not evaluated.

    Raises:
        UserError: if nothing is left to evaluate, or two tasks have the same samples.
    """
    prompts, documents, keys = [], [], set()
    skipped: dict[str, Counter[str]] = {}
    for task in tasks:
        reasons = skipped.setdefault(task_name(task), Counter())  # several files may hold one task
        reasons.update(task.skipped)
        for sample in task.samples:
            key = SampleKey.from_sample(sample)
            if key in keys:
                raise UserError(f"evaluation.tasks: {key} is given twice (the second time by {task.name!r})")
            keys.add(key)
            if sample.benchmark == perplexity.TASK:
                documents.append(sample)
                continue
            prompt = prepare_prompt(sample, protocol, tokenizer)
            if prompt.tokens:
                prompts.append(prompt)
            else:
                reasons["empty prompt"] += 1
    if not prompts and not documents:
        counts = "; ".join(f"{name}: {_counts(reasons)}" for name, reasons in skipped.items())
        raise UserError(f"evaluation.tasks: there is nothing to evaluate ({counts})")
    notes = tuple(dict.fromkeys(note for task in tasks for note in task.notes))
    reported = {name: dict(reasons) for name, reasons in skipped.items() if reasons}
    return Work(tuple(skipped), prompts, documents, reported, notes)


def task_name(task: TaskSamples) -> str:
    """BENCHMARK/TASK if all samples are of one task, else the name that the user gave."""
    names = {f"{sample.benchmark}/{sample.task}" for sample in task.samples}
    return names.pop() if len(names) == 1 else task.name


def load_tasks(config: JobConfig, tokenizer: BaseTokenizer) -> list[TaskSamples]:
    """Loads the samples of `evaluation.tasks`, one entry for each task or file.

    Raises:
        UserError: if a name is unknown, or a file is missing or unusable.
    """
    settings = config.evaluation
    names = expand_names((name for name in settings.tasks if name != perplexity.TASK), settings.data_folder)
    progress = _generation_log()
    tasks = [
        load_samples(
            name,
            tokenizer=tokenizer,
            data_folder=settings.data_folder,
            lengths=settings.lengths,
            num_samples=settings.num_samples or None,
            essay_folder=settings.essay_folder,
            metric=settings.metric,
            seed=settings.seed,
            cache_folder=evaluation_folder(config) / "generated",
            progress=progress,
        )
        for name in names
    ]
    return [*tasks, perplexity.load_documents(config, tokenizer)] if perplexity.TASK in settings.tasks else tasks


def _generation_log() -> Callable[[str, int, int], None]:
    """Makes a callback that logs the progress of generating samples, at most every SECONDS_BETWEEN_LINES."""
    last = time.monotonic()

    def say(task: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= SECONDS_BETWEEN_LINES:
            logger.info(f"Generating {task}: {done} of {total} samples")
            last = time.monotonic()

    return say


def evaluation_folder(config: JobConfig) -> Path:
    """Folder that holds a config's evaluations."""
    return Path(config.evaluation.dump_folder or Path(config.job.dump_folder, "evaluation"))


def _counts(reasons: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in reasons.items()) or "no rows"
