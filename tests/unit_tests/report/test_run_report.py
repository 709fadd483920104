"""The page of a training run: curves, evaluations on the way, settings, and rollouts as data that its script reads."""

import json
import re

import pytest

from refine_titan.errors import UserError
from refine_titan.report import rollout_browser as browser
from refine_titan.report.escaping import clean
from refine_titan.report.run_report import write_run_report
from tests.evaluation_runs import HOSTILE
from tests.training_runs import rollout_line, write_training_run
from tests.unit_tests.report.test_report import Page, read


def data_of(page: Page) -> list[dict]:
    """The rollouts in a page, each with its fields."""
    (text,) = [text for text in page.texts["script"] if text.startswith('{"rows":')]
    found = json.loads(text)
    rows = [dict(zip(found["fields"], row)) for row in found["rows"]]
    return [row | {"document": found["documents"][row["document"]]} for row in rows]


@pytest.fixture
def run(tmp_path):
    return write_training_run(tmp_path / "run", steps=80, rollouts_per_step=2)


def test_page_has_curves_evaluations_settings_and_every_rollout(run):
    lines = [
        {"step": step, "validation_metrics/loss": 6 - step / 40, "validation_metrics/ruler/vt/1024": None if step == 1 else 0.5}
        for step in (1, 40, 80)
    ]
    (run / "validation.jsonl").write_text("".join(json.dumps(line | {"timing/validation": 1.0}) + "\n" for line in lines))
    (run / "config.json").write_text(json.dumps({"optimizer": {"lr": 2e-3, "name": "AdamW"}, "refine": {"a": {"b": [1]}}}))
    (run / "versions.json").write_text(json.dumps({"packages": {"torch": "2.13.0"}, "git_commit": "abc"}))
    assert write_run_report(run) == run / "report.html"
    page = read(run)
    assert page.texts["h2"] == ["Training", "Evaluations during training", "Rollouts", "Settings", "Versions"]
    titles = page.texts["figcaption"]
    assert titles[:4] == ["next-token loss", "reward", "rollout tokens that match", "gradient norm"] and "learning rate" in titles
    assert titles[-2:] == ["loss", "ruler/vt/1024"]
    assert {"lr", "name", "a.b", "packages.torch"} <= set(page.texts["dt"]) and {"0.002", "AdamW", "[1]", "2.13.0"} <= set(page.texts["dd"])
    rows = data_of(page)
    assert len(rows) == 160 and any("All 160, from step 1 to 80." in text for text in page.texts["p"])
    first = rollout_line(1, 0)
    assert rows[0]["document"] == first["document"] and rows[0]["prefix"] == first["prefix_tail"]
    assert rows[0]["tokens"] == [first["rollout_tokens"], first["truth_tokens"]]
    assert rows[0]["pieces"] == [first["rollout_texts"], first["truth_texts"]] and rows[0]["match"] == [round(5 * first["reward"]), 5]


def test_a_long_run_shows_rollouts_that_are_evenly_chosen(run, monkeypatch):
    monkeypatch.setattr(browser, "SHOWN_ROLLOUTS", 20)
    write_run_report(run)
    page = read(run)
    assert any("20 of 160, evenly chosen, from step 1 to 80." in text for text in page.texts["p"])
    assert [row["step"] for row in data_of(page)] == list(range(1, 81, 4))
    monkeypatch.setattr(browser, "SHOWN_BYTES", (run / "rollouts.jsonl").stat().st_size // 16)
    write_run_report(run)
    assert len(data_of(read(run))) == 10


def test_rollouts_without_texts_or_tokens_and_answers_are_kept(run):
    lines = [rollout_line(1, i) for i in range(3)]
    for name in ("rollout_texts", "truth_texts"):
        del lines[0][name]
    for name in ("rollout_texts", "truth_texts", "rollout_tokens", "truth_tokens"):
        del lines[1][name]
    lines[2] |= {"outer": True, "answers": ["one", "two"], "reward": None}
    del lines[2]["truth_tokens"], lines[2]["truth_texts"]
    (run / "rollouts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_run_report(run)
    page = read(run)
    ids_only, text_only, answer = data_of(page)
    assert ids_only["tokens"][0] == lines[0]["rollout_tokens"] and ids_only["pieces"] == [[], []]
    assert text_only["match"] == [0, 0] and text_only["tokens"] == [[], []] and text_only["sampled"] == lines[1]["rollout"]
    assert answer["outer"] and answer["truth"] == "one\ntwo" and answer["reward"] is None and answer["match"] == [0, 0]
    # There is something to choose from.
    assert ("select", "name", "kind") in page.attributes


def test_what_a_run_says_is_text_and_its_amount_bounded(run):
    lines = [rollout_line(1, i) for i in range(len(HOSTILE))]
    for line, text in zip(lines, HOSTILE):
        line |= {"document": text, "prefix_tail": text * 5000, "rollout_texts": [text] * 5}
    lines[0] |= {"rollout_tokens": [1] * 5000, "truth_tokens": [1] * 5000}
    (run / "rollouts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "config.json").write_text(json.dumps({HOSTILE[0]: {HOSTILE[1]: "x" * 10_000}}))
    (run / "versions.json").write_text('{"a":' * 700 + "1" + "}" * 700)
    write_run_report(run)
    page = read(run)
    rows = data_of(page)
    assert [row["document"] for row in rows] == [clean(text) for text in HOSTILE]
    assert all(len(row["prefix"]) <= browser.SHOWN_CHARACTERS for row in rows)
    assert len(rows[0]["tokens"][0]) == browser.SHOWN_TOKENS and rows[0]["match"] == [5000, 5000]
    assert HOSTILE[0] in page.texts["summary"] and HOSTILE[1] in page.texts["dt"]
    assert "x" * 500 + "…" in page.texts["dd"] and any(re.fullmatch(r"a(\.a){699}", name) for name in page.texts["dt"])


def test_damaged_files_of_a_run_are_said_on_its_page(run):
    (run / "config.json").write_text("[1]")
    (run / "versions.json").write_text("{")
    write_run_report(run)
    warnings = [text for text in read(run).texts["p"] if "cannot be read" in text]
    assert len(warnings) == 2 and "config.json cannot be read: it holds a JSON list" in warnings[0]
    (run / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="no folder of a training run"):
        write_run_report(run)
