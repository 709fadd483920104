"""Metrics of questions in a user's own file, as `evaluation.metric` names them: built-in ones, and those of installed packages, which
name a function in their metadata as an entry point of the group `refine_titan.metrics`.

A metric takes a response and the tuple of right answers, and returns a number in [0, 1]. The built-in ones ignore case.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from numbers import Real

from refine_titan.benchmarks.metrics import first_nonempty_line, rouge_l, token_f1
from refine_titan.config.extensions import Extension, find_extension
from refine_titan.errors import ExtensionError

Metric = Callable[[str, tuple[str, ...]], float]
METRIC_GROUP = "refine_titan.metrics"
DEFAULT_METRIC = "contains"


def contains(response: str, answers: tuple[str, ...]) -> float:
    """1 if the response contains any right answer, else 0."""
    text = response.casefold()
    return float(any(answer.casefold().strip() in text for answer in answers))


def exact_match(response: str, answers: tuple[str, ...]) -> float:
    """1 if the response's first line that is not empty is a right answer, else 0; white space at the ends does not count."""
    line = first_nonempty_line(response).casefold().strip()
    return float(any(line == answer.casefold().strip() for answer in answers))


def f1(response: str, answers: tuple[str, ...]) -> float:
    """Token F1 of the response's first line that is not empty, with SQuAD's normalisation; the best over the answers."""
    return max(token_f1(first_nonempty_line(response), answer) for answer in answers)


def best_rouge_l(response: str, answers: tuple[str, ...]) -> float:
    """ROUGE-L f of the whole response; the best over the answers."""
    return max(rouge_l(response.lower(), answer.lower()) for answer in answers)


METRICS: dict[str, Metric] = {"contains": contains, "exact_match": exact_match, "f1": f1, "rouge_l": best_rouge_l}


@cache
def find_metric(name: str, setting: str = "evaluation.metric") -> Metric:
    """The metric that a setting names: a built-in one, or one of an installed package.

    Raises:
        UserError: if nothing has the name, or more than one thing has it.
        ExtensionError: if the package cannot be imported. The returned function raises it for a wrong result.
    """
    extension = find_extension(setting, name, METRICS, METRIC_GROUP)
    return METRICS[name] if extension is None else InstalledMetric(extension)


def score_question(metric: str, response: str, answers: tuple[str, ...]) -> dict[str, float]:
    """The score of a response to a user's own question, by the name of its metric."""
    return {metric: find_metric(metric)(response, answers)}


@dataclass(frozen=True)
class InstalledMetric:
    """A metric of an installed package whose results are checked: a number in [0, 1]."""

    extension: Extension

    def __call__(self, response: str, answers: tuple[str, ...]) -> float:
        found = self.extension(response, answers)
        if not isinstance(found, Real) or not 0 <= found <= 1:
            raise ExtensionError(f"{self.extension.label} returned {found!r:.80} for {response!r:.80}; wanted is a number from 0 to 1")
        return float(found)
