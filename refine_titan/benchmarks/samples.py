"""Samples of a benchmark: prompts with their right answers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """One prompt of one task.

    Attributes:
        benchmark: "ruler" (generated), "ruler_qa", "longbench", "questions" (a user's own) or "perplexity".
        task: name within the benchmark, e.g. "niah_single_1", "ruler_squadqa", "hotpotqa".
        index: number within the task, from 0: a file's row, or a generated sample's number.
        prompt: text that the model continues.
        answers: right answers; the metric decides which of them a response must contain.
        max_new_tokens: most tokens that the model may answer with.
        length: tokens of prompt plus answer that the sample was made for; None if the task's file does not say.
        depth: position of the needle asked for, from 0 (start) to 1 (end); None if there is not exactly one.
        metric: what scores a user's own question, as `evaluation.metric` names it; empty if the benchmark has its metric.
        classes: names that an answer chooses from, of a task of classes whose file lists them.
    """

    benchmark: str
    task: str
    index: int
    prompt: str
    answers: tuple[str, ...]
    max_new_tokens: int
    length: int | None = None
    depth: float | None = None
    metric: str = ""
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class TaskSamples:
    """The samples that one name on a user's list stands for.

    Attributes:
        name: the user's name for them, e.g. "ruler/niah_single_1", "longbench", or a path.
        samples: ordered by task, length and index.
        skipped: reason -> number of rows that could not be used.
        notes: facts that a reader of the results must know, e.g. that a built-in text stands in for essays.
    """

    name: str
    samples: list[Sample]
    skipped: dict[str, int]
    notes: tuple[str, ...] = ()
