"""The mean score of each task, over the samples that are finished so far."""

from typing import Any

from refine_titan.report.results import perplexity_of


class RunningMeans:
    """Adds up scores by task; of perplexity's documents, whose lines have their loss, the losses."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, int]] = {}

    def add(self, line: dict[str, Any]) -> None:
        """Counts a finished sample by its line of `samples.jsonl`."""
        total, count = self._sums.get(line["task"], (0.0, 0))
        self._sums[line["task"]] = total + line.get("score", line.get("nll", 0.0)), count + 1

    def texts(self) -> list[str]:
        """`task mean` of each task that has a finished sample."""
        return [f"{task} {self._mean(task):.3f}" for task in self._sums]

    def _mean(self, task: str) -> float:
        total, count = self._sums[task]
        return perplexity_of(total / count) if task == "perplexity" else total / count
