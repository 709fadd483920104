"""What an evaluation asks a model: one prompt with its right answers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """One prompt of one task.

    Attributes:
        benchmark: "ruler" (generated), "ruler_qa", "longbench" or "perplexity".
        task: its name within the benchmark, e.g. "niah_single_1", "ruler_squadqa", "hotpotqa".
        index: number within the task: the row of a file, or the number of a generated sample.
        prompt: the text that the model continues.
        answers: the right answers; which of them a response must hold is the metric's matter.
        max_new_tokens: tokens the model may answer with.
        length: tokens asked for, prompt plus answer, of generated tasks and of files that say so; None if unknown.
        depth: where the needle asked for lies, 0 (start) to 1 (end); None where there is no such single place.
    """

    benchmark: str
    task: str
    index: int
    prompt: str
    answers: tuple[str, ...]
    max_new_tokens: int
    length: int | None = None
    depth: float | None = None


@dataclass(frozen=True)
class TaskSamples:
    """The samples of one name that a user gave.

    Attributes:
        name: the name, e.g. "ruler/niah_single_1", "longbench", or a path.
        samples: in the order of the task, length, index.
        skipped: reason -> rows of files that could not be used for it.
        notes: what a reader of the results must know, e.g. that a built-in text stands in for essays.
    """

    name: str
    samples: list[Sample]
    skipped: dict[str, int]
    notes: tuple[str, ...] = ()
