"""Makes the part of a page in which one reads a run's rollouts: all of them, or as many as a page can hold, as rows of JSON.

The page's script (`page_script.py`) filters and sorts them and shows a page of cards at a time.
"""

import operator
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from refine_titan.errors import UserError
from refine_titan.files.json_lines import DamagedLines, Decoder, StepNumber, read_records
from refine_titan.report.escaping import clean, escape, json_data
from refine_titan.report.page import select

# Most rollouts in a page, most bytes of their lines, and how much of a line's length counts.
SHOWN_ROLLOUTS, SHOWN_BYTES, LINE_BYTES = 10_000, 32 << 20, 16 << 10
# Characters of a text, and tokens of a rollout, that a page holds.
SHOWN_CHARACTERS, SHOWN_TOKENS = 2_000, 256
# What a row of the page's JSON has; `match` is the number of equal tokens and of those compared.
FIELDS = ("step", "document", "position", "prefix", "sampled", "truth", "reward", "advantage", "match", "tokens", "pieces", "outer")


class _Rollout(msgspec.Struct):
    """What a page shows of a line of `rollouts.jsonl`. Fields with a default may be absent."""

    step: StepNumber
    document: str
    position: int
    prefix_tail: str
    rollout: str
    truth: str
    reward: float | None  # a value that was not finite is null in the file
    advantage: float | None
    rollout_tokens: list[int] = []
    truth_tokens: list[int] = []
    rollout_texts: list[str] = []
    truth_texts: list[str] = []
    outer: bool = False
    answers: list[str] = []


def rollout_browser(path: Path) -> str:
    """Makes the browser of the rollouts in a file; nothing if there are none. Damaged lines are left out, which the page and a warning say.

    Raises:
        UserError: if no line holds a rollout.
    """
    damaged, places, steps, nbytes = DamagedLines(path), array("q"), array("q"), 0
    for line, record in read_records(path, _Rollout, damaged):
        places.append(line.begin)
        steps.append(record.step)
        nbytes += min(line.end - line.begin, LINE_BYTES)
    if not places:
        if damaged:
            raise UserError(f"{path} holds no rollouts of a training run; line {damaged.numbers[0]}: {damaged.first_reason}")
        return ""
    damaged.warn()
    total = len(places)
    count = min(total, SHOWN_ROLLOUTS, max(1, total * SHOWN_BYTES // nbytes))
    data, has_both = _data(path, [places[i * total // count] for i in range(count)])
    shown = f"All {total:,}" if count == total else f"{count:,} of {total:,}, evenly chosen"
    note = (
        f"{shown}, from step {min(steps):,} to {max(steps):,}. · is a space, ↵ a line break; sampled tokens that differ from the true ones "
        "are marked."
    )
    left_out = f"<p>{escape(damaged)}.</p>" if damaged else ""
    return (
        f"<p>{note}</p>{left_out}<noscript><p>The rollouts are in this file; a browser shows them with scripts switched on.</p></noscript>"
        f'<div data-rollouts>{_controls(has_both)}<div class="cards"></div>'
        f'<script type="application/json">{data}</script></div>'
    )


def _data(path: Path, places: Sequence[int]) -> tuple[str, bool]:
    """Reads the rollouts at places (bytes) of a file.

    Returns:
        JSON of `fields`, `rows` with a value for each, and `documents`, which rows name by number; and whether there are both rollouts and
        sampled answers of post-training.
    """
    documents: dict[str, int] = {}
    kinds, decode = set(), Decoder(_Rollout)
    # A row at a time: ten thousand rows as Python's objects take several times the bytes.
    content = bytearray(b'{"rows":[')
    with path.open("rb") as file:
        for i, place in enumerate(places):
            file.seek(place)
            try:
                found = decode(file.readline())
            except ValueError as error:  # it was whole a moment ago: a run that resumes drops lines
                raise UserError(f"{path} changes while it is read") from error
            kinds.add(found.outer)
            document = documents.setdefault(found.document[:SHOWN_CHARACTERS], len(documents))
            content += (b"," if i else b"") + json_data(_row(found, document))
    names = json_data([clean(name) for name in documents])
    content += b'],"fields":' + json_data(FIELDS) + b',"documents":' + names + b"}"
    return content.decode(), len(kinds) > 1


def _row(found: _Rollout, document: int) -> tuple[Any, ...]:
    """The values of FIELDS."""
    truth = "\n".join(found.answers) if found.answers else found.truth
    tokens = (found.rollout_tokens, found.truth_tokens)
    return (
        found.step,
        document,
        found.position,
        clean(found.prefix_tail[-SHOWN_CHARACTERS:]),
        clean(found.rollout[:SHOWN_CHARACTERS]),
        clean(truth[:SHOWN_CHARACTERS]),
        _rounded(found.reward),
        _rounded(found.advantage),
        (sum(map(operator.eq, *tokens)), min(map(len, tokens))),
        [ids[:SHOWN_TOKENS] for ids in tokens] if found.truth_tokens else [[], []],
        [[clean(text[:SHOWN_CHARACTERS]) for text in texts[:SHOWN_TOKENS]] for texts in (found.rollout_texts, found.truth_texts)],
        found.outer,
    )


def _rounded(value: float | None) -> float | None:
    """Four significant digits or more: the page shows three places."""
    return None if value is None else float(f"{value:.6g}")


def _controls(has_both: bool) -> str:
    matches = [("", "any"), ("all", "all tokens"), ("some", "some tokens"), ("none", "no token")]
    orders = [("step", "step"), ("last", "last step first"), ("high", "highest reward first"), ("low", "lowest reward first")]
    parts = [
        _range("step", "1"),
        _range("reward", "any"),
        select("match", "match", matches),
        _search("document"),
        _search("text"),
        select("order", "order", orders),
    ]
    if has_both:
        parts.insert(0, select("kind", "kind", [("", "all"), ("rollouts", "rollouts"), ("answers", "answers")]))
    buttons = [f'<button type="button" name="{name}">{name.capitalize()}</button>' for name in ("first", "back", "next", "last")]
    pager = "".join(buttons[:2]) + '<span class="place"></span>' + "".join(buttons[2:])
    return (
        f'<div class="controls" hidden>{"".join(parts)}</div>'
        f'<p><output class="muted"></output></p><div class="controls pager" hidden>{pager}</div>'
    )


def _range(name: str, step: str) -> str:
    ends = [f'<input type="number" step="{step}" name="{end}-{name}" aria-label="{end} {name}">' for end in ("from", "to")]
    return f"<span>{name} {ends[0]} to {ends[1]}</span>"


def _search(name: str) -> str:
    return f'<label>{name} <input type="search" name="{name}" placeholder="contains"></label>'
