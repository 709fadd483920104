"""Scores responses as LongBench, RULER and lm-evaluation-harness define it.

LongBench's metrics are token F1 (question answering), ROUGE-L f of the package `rouge` 1.0.1 (summaries), class match (trec), the
rounded indel ratio of the first line of code (lcc, repobench-p), and the share of the response's numbers that are right
(passage_count, passage_retrieval_en). A response gets its best score over the answers.

RULER's metric is the share of references that the response contains. RULER QA's is whether the response's first line contains any
reference. Both ignore case.
"""

import re
import string
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import rouge
from rapidfuzz import fuzz

from refine_titan.config.type_checks import did_you_mean
from refine_titan.errors import UserError

RULER_TASKS = (
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multiquery",
    "niah_multivalue",
    "vt",
    "cwe",
    "fwe",
)
# Tasks in files are named ruler_...: RULER's synthetic tasks, or question answering over documents.
RULER_FILE_NAMES = re.compile(r"ruler_(niah|vt|cwe|fwe)(_\w+)?")
RULER_QA_NAMES = re.compile(r"ruler_(?!(?:niah|vt|cwe|fwe)(?:_|$))\w+|qa_\d+")
RULER_QA_EXAMPLES = ("ruler_squadqa", "ruler_hotpotqa")

# TREC's question types exactly as LongBench's prompts spell them, "somethin" included.
TREC_CLASSES = (
    "Abbreviation",
    "Animal",
    "City",
    "Color",
    "Country",
    "Currency name",
    "Date",
    "Definition of something",
    "Description of a person",
    "Description of something",
    "Disease and medicine",
    "Distance, linear measure",
    "Element and substance",
    "Equivalent term",
    "Event",
    "Expression abbreviated",
    "Food",
    "Group or organization of person",
    "Individual",
    "Invention, book and other creative piece",
    "Language",
    "Lasting time of somethin",
    "Letter like a-z",
    "Manner of an action",
    "Mountain",
    "Musical instrument",
    "Number of something",
    "Order, rank",
    "Organ of body",
    "Other entity",
    "Other location",
    "Other number",
    "Percent, fraction",
    "Plant",
    "Postcode or other code",
    "Price",
    "Product",
    "Reason",
    "Religion",
    "Size, area and volume",
    "Speed",
    "Sport",
    "State",
    "Symbols and sign",
    "Techniques and method",
    "Temperature",
    "Title of a person",
    "Vehicle",
    "Weight",
    "Word with a special property",
)

# The benchmark of questions in a user's own file, whose metric is `evaluation.metric`.
QUESTIONS = "questions"

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def score(benchmark: str, task: str, response: str, answers: Sequence[str], classes: Sequence[str] = ()) -> dict[str, float]:
    """Computes a response's metrics by name, each in [0, 1]; the first is the task's main metric.

    Args:
        classes: names that a task of classes chooses from; empty for those of `TREC_CLASSES`.

    Raises:
        UserError: if the benchmark or task has no metric or there are no answers.
    """
    check_task(benchmark, task)
    if isinstance(answers, str) or not all(isinstance(answer, str) for answer in answers):
        raise UserError(f"answers of {benchmark}/{task} must be a list of strings, found {answers!r:.80}")
    if not answers:
        raise UserError(f"{benchmark}/{task}: no answers to compare the response with")
    if benchmark == "longbench":
        name, compare, head = LONGBENCH_METRICS[task]
        if compare is class_match and classes:
            compare = partial(class_match, classes=classes)
        text = head(response)
        return {name: max(compare(text, answer) for answer in answers)}
    references = [answer.lower() for answer in answers if answer.strip()]
    if not references:
        raise UserError(f"{benchmark}/{task}: every answer is blank")
    if benchmark == "ruler_qa":
        line = first_line(response).lower()
        return {"any_reference": float(any(r in line for r in references)), "reference_fraction": reference_fraction(response, references)}
    found = reference_fraction(response, references)
    return {"reference_fraction": found, "all_references": float(found == 1.0)}


def check_task(benchmark: str, task: str) -> None:
    """Raises UserError, which suggests the nearest known name, unless responses of the task can be scored."""
    benchmarks = ["ruler", "ruler_qa", "longbench"]
    if benchmark not in benchmarks:
        raise UserError(f"benchmark {benchmark!r} has no metric{did_you_mean(benchmark, benchmarks)}; known: {', '.join(benchmarks)}")
    if benchmark == "ruler_qa":
        if not RULER_QA_NAMES.fullmatch(task):
            raise UserError(
                f"task {task!r} is not one of ruler_qa{did_you_mean(task, list(RULER_QA_EXAMPLES))}; allowed: names like "
                f"{', '.join(RULER_QA_EXAMPLES)}, qa_1, qa_2"
            )
        return
    if benchmark == "ruler" and RULER_FILE_NAMES.fullmatch(task):
        return
    tasks = list(RULER_TASKS if benchmark == "ruler" else LONGBENCH_METRICS)
    if task not in tasks:
        raise UserError(f"task {task!r} is not one of {benchmark}{did_you_mean(task, tasks)}; known: {', '.join(tasks)}")


def reference_fraction(response: str, references: Sequence[str]) -> float:
    """Share of the lower-case references that the response contains."""
    text = response.lower()
    return sum(reference in text for reference in references) / len(references)


def first_line(response: str) -> str:
    """Text before the first newline; empty if the response begins with a newline."""
    return response.split("\n")[0]


def first_nonempty_line(response: str) -> str:
    """Text up to the first newline, after any newlines at the response's beginning."""
    return response.lstrip("\n").split("\n")[0]


def whole_response(response: str) -> str:
    """The response itself."""
    return response


def token_f1(response: str, answer: str) -> float:
    """F1 of the words that both have, ignoring case, punctuation and articles (SQuAD's normalisation)."""
    response_words, answer_words = _words(response), _words(answer)
    common = (Counter(response_words) & Counter(answer_words)).total()
    if common == 0:
        return 0.0
    precision, recall = common / len(response_words), common / len(answer_words)
    return 2 * precision * recall / (precision + recall)


def rouge_l(response: str, answer: str) -> float:
    """Summary-level ROUGE-L f of the package `rouge`; 0 if either text has no words, which the package refuses."""
    if not response.replace(".", "").strip() or not answer.replace(".", "").strip():
        return 0.0
    # The package recurses once a word and would hit Python's limit; LongBench's script scores such a response 0.
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(limit + len(response.split()) + len(answer.split()))
    try:
        return rouge.Rouge(metrics=["rouge-l"]).get_scores([response], [answer], avg=True)["rouge-l"]["f"]
    finally:
        sys.setrecursionlimit(limit)


def class_match(response: str, answer: str, classes: Sequence[str] = TREC_CLASSES) -> float:
    """1 / n if the response names n classes and the right one is among them, else 0.

    A class whose name is part of the right class's name is not counted.
    """
    named = [name for name in classes if name in response and (name == answer or name not in answer)]
    return 1.0 / len(named) if answer in named else 0.0


def edit_similarity(response: str, answer: str) -> float:
    """Indel ratio, rounded to a percent, of the first line without a backtick, `#` or `//`; of the whole response if every line has one."""
    lines = response.lstrip("\n").split("\n")
    code = next((line for line in lines if "`" not in line and "#" not in line and "//" not in line), response)
    return round(fuzz.ratio(code, answer)) / 100


def right_number_fraction(response: str, answer: str) -> float:
    """Share of the response's numbers that equal the answer's number."""
    numbers = re.findall(r"\d+", response)
    right = re.search(r"\d+", answer)
    return sum(number == right.group() for number in numbers) / len(numbers) if numbers and right else 0.0


_QA = ("token_f1", token_f1, first_line)
_SUMMARY = ("rouge_l", rouge_l, whole_response)
_CODE = ("edit_similarity", edit_similarity, whole_response)
_NUMBER = ("right_number_fraction", right_number_fraction, whole_response)

# Task -> name of the metric, the metric, and the function that cuts out the part of the response that is scored.
LONGBENCH_METRICS: dict[str, tuple[str, Callable[[str, str], float], Callable[[str], str]]] = {
    "narrativeqa": _QA,
    "qasper": _QA,
    "multifieldqa_en": _QA,
    "hotpotqa": _QA,
    "2wikimqa": _QA,
    "musique": _QA,
    "gov_report": _SUMMARY,
    "qmsum": _SUMMARY,
    "multi_news": _SUMMARY,
    "trec": ("class_match", class_match, first_nonempty_line),
    "triviaqa": ("token_f1", token_f1, first_nonempty_line),
    "samsum": ("rouge_l", rouge_l, first_nonempty_line),
    "passage_count": _NUMBER,
    "passage_retrieval_en": _NUMBER,
    "lcc": _CODE,
    "repobench-p": _CODE,
}


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()
