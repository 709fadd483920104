"""The HTML report is well formed and self-contained, and shows what a model answers only as text."""

import json
import math
import re
import shutil
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest

from refine_titan.errors import UserError
from refine_titan.report.axes import Axis, axis_of, axis_over, step_axis, ticks_within
from refine_titan.report.charts import NARROW, Bar, Line, bar_chart, heat_map, line_chart
from refine_titan.report.escaping import escape
from refine_titan.report.evaluation_report import SHOWN_SAMPLES, write_report
from tests.evaluation_runs import HOSTILE, paper_tasks, sample_lines, write_run

VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Checks nesting; collects tags, attributes, ids and text."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.ids, self.links, self.attributes = [], [], [], [], []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ids += [value for name, value in attrs if name == "id"]
        self.links += [value for name, value in attrs if name == "href"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)


def read(folder) -> Page:
    """Reads the page of a report and checks what every page must satisfy."""
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert sorted(page.ids) == sorted(set(page.ids))
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert not {name for _, name, _ in page.attributes} & {"src", "srcset", "action", "data", "poster", "background"}
    assert not any(name.startswith("on") for _, name, _ in page.attributes)
    # One script, and perhaps data that is none.
    kinds = [value for tag, name, value in page.attributes if (tag, name) == ("script", "type")]
    assert page.tags.count("script") - len(kinds) == page.tags.count("style") == 1 and set(kinds) <= {"application/json"}
    assert not {"iframe", "object", "embed", "img", "link", "base", "form"} & set(page.tags)
    # Nothing is fetched: no address in an attribute or a style, and the page forbids it besides.
    assert not any("http" in value for _, name, value in page.attributes)
    assert not re.search(r"url\(|@import", "".join(page.texts["style"]))
    assert any(name == "content" and value.startswith("default-src 'none'") for _, name, value in page.attributes)
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(svg)
        assert "nan" not in re.sub(r"<title>.*?</title>|<text.*?</text>", "", svg).lower()
    return page


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    """A training run's folder."""
    folder = tmp_path_factory.mktemp("training")
    steps = [
        {
            "step": s,
            "refine/ntp_loss": 2 + 4 * math.exp(-s / 60),
            "rollout/reward_mean": 0.5,
            "rollout/match_mean": s / 400 if s % 3 else None,
            "grad_norm": None if s % 50 == 0 else 40.0 if s == 2 else 1.0,
        }
        for s in range(1, 401)
    ]
    rollouts = [
        {
            "step": s,
            "document": f"a<b>.py:{s}",
            "position": 397,
            "prefix_tail": "x\n  ",
            "rollout": " <i>\ud800\n",
            "truth": " #",
            "reward": 0.5,
            "advantage": None if s == 1 else -0.2,
        }
        for s in range(1, 401, 10)
        for _ in range(6)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(rollout) + "\n" for rollout in rollouts))
    return folder


def test_report_of_everything_is_well_formed_and_holds_every_part(tmp_path, training):
    folder = write_run(
        tmp_path / "run",
        sample_lines(paper_tasks(20), depths=40),
        checkpoint="/a/" + "long/" * 60,
        name="<b>run</b>\u202e",
        tasks=["longbench/passage_count"],
    )
    write_report(folder, training)
    page = read(folder)
    headings = page.texts["h2"]
    assert headings == [
        "What was measured",
        "Averages",
        "Score by task",
        "Score by length",
        "Needle by depth and length",
        "Perplexity by position",
        "Training",
        "Rollouts",
        "All tasks",
        "Answers",
    ]
    assert page.texts["h1"] == ["<b>run</b>\u202e"]
    tips = page.texts["title"]
    assert any(re.fullmatch(r"niah_single_2: \d.*; 60 samples of 4K, 8K, 16K", tip) for tip in tips)
    # 20 samples have 20 of the 40 depths: too few for a column each.
    assert [tip for tip in tips if re.fullmatch(r"niah_single_3, 16K, depth \d+–\d+ %: .* of \d samples|.* no samples", tip)]
    assert "no samples" in page.texts["text"]
    assert {"results.json", "results.md", "report.html"} <= {path.name for path in folder.iterdir()}
    assert not [path for path in folder.iterdir() if path.name.endswith(".tmp")]


def test_what_a_model_answers_is_shown_as_text(tmp_path):
    folder = write_run(tmp_path / "run", sample_lines({("longbench", "hotpotqa", None): (SHOWN_SAMPLES + 5, 0.5)}))
    write_report(folder)
    page = read(folder)
    shown = page.texts["pre"]
    for text in HOSTILE[:3] + HOSTILE[5:6]:
        assert text in shown
    (control,) = [text for text in shown if "lone surrogate" in text]
    assert control == "\ufffd\ufffd\ufffd[31mred\ufffd[0m \u202eright to left\u202c \ufffd lone surrogate \ufffd"
    assert page.tags.count("article") == SHOWN_SAMPLES
    kinds = {value for tag, name, value in page.attributes if (tag, name) == ("article", "data-kind")}
    assert kinds <= {"right", "wrong", "partly"} and len(kinds) > 1


def test_report_leaves_out_sections_without_content(tmp_path):
    one = write_run(tmp_path / "one", sample_lines({("ruler", "vt", 4096): (1, 0.5)}))
    write_report(one)
    headings = read(one).texts["h2"]
    assert "Score by length" not in headings and "Score by task" in headings
    empty = write_run(tmp_path / "empty", [])
    write_report(empty)
    page = read(empty)
    assert page.texts["h2"] == ["What was measured"] and "No sample was finished." in page.texts["p"]


def test_heat_map_has_a_column_for_each_depth_of_a_full_grid_and_bins_otherwise(tmp_path):
    def tips(name, lines):
        write_report(write_run(tmp_path / name, lines))
        found = [tip for tip in read(tmp_path / name).texts["title"] if "depth" in tip]
        # The drawing for a narrow screen is the second one.
        assert found[: len(found) // 2] == found[len(found) // 2 :]
        return found[: len(found) // 2]

    tasks = {("ruler", "niah_single_1", length): (40, 0.5) for length in (4096, 8192)}
    grid = tips("grid", sample_lines(tasks, depths=40))
    assert len(grid) == 80 and all(tip.endswith("of 1 sample") for tip in grid) and "4K, depth 3 %:" in grid[1]
    few = tips("few", sample_lines({cell: (7, 0.5) for cell in tasks}, depths=40))
    assert len(few) == 20 and "4K, depth 0–10 %:" in few[0]
    assert few[0].endswith("of 4 samples") and few[2].endswith("no samples")
    assert len(tips("finer", sample_lines(tasks, depths=41))) == 20


def test_long_responses_and_many_answers_are_cut_and_say_so(tmp_path):
    lines = sample_lines({("longbench", "hotpotqa", None): (1, 0.5)})
    lines[0] |= {"response": "x" * 5000, "answers": [f"answer {i}" for i in range(120)]}
    folder = write_run(tmp_path / "run", lines)
    write_report(folder)
    response, answers = read(folder).texts["pre"]
    assert response == "x" * 2000 + " … (3,000 more characters)"
    assert answers.splitlines()[-1] == "… and 112 more"


def test_foreign_training_folder_is_refused_and_one_without_steps_accepted(tmp_path, training):
    folder = write_run(tmp_path / "run", sample_lines({("ruler", "vt", 4096): (3, 0.5)}))
    with pytest.raises(UserError, match="no folder of a training run"):
        write_report(folder, tmp_path / "typo")
    other = tmp_path / "other"
    other.mkdir()
    (other / "metrics.jsonl").write_text('{"loss_metrics/global_avg_loss": 1}\n')
    with pytest.raises(UserError, match="holds no steps of a training run"):
        write_report(folder, other)
    (other / "metrics.jsonl").write_text('{"step": 1, "refine/ntp_loss": 2.0}\n')
    (other / "rollouts.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(UserError, match="holds no rollouts of a training run; line 1: .*`document`"):
        write_report(folder, other)
    (other / "metrics.jsonl").write_text("")
    (other / "rollouts.jsonl").unlink()
    write_report(folder, other)
    assert "Training" in read(folder).texts["h2"]


def test_damaged_lines_of_a_training_run_are_left_out_and_said(tmp_path, training, caplog):
    folder = write_run(tmp_path / "run", sample_lines({("ruler", "vt", 4096): (3, 0.5)}))
    other = shutil.copytree(training, tmp_path / "training")
    for name, numbers in (("metrics.jsonl", [1, 7, 400]), ("rollouts.jsonl", [3])):
        lines = (other / name).read_text().splitlines()
        for number in numbers:
            lines[number - 1] = lines[number - 1][:20] if number != 7 else lines[6].replace("2", "zwei", 1)
        (other / name).write_text("\n".join(lines) + "\n")
    write_report(folder, other)
    said = ["metrics.jsonl: lines 1, 7, 400 are damaged", "rollouts.jsonl: line 3 is damaged"]
    paragraphs = read(folder).texts["p"]
    for text in said:
        assert text in caplog.text and any(text in paragraph for paragraph in paragraphs)
    assert any("All 239, from step 1 to 391" in paragraph for paragraph in paragraphs)


def test_charts_of_unusual_values_are_xml_and_stay_on_their_canvas():
    bars = [Bar("a" * 80, 100.0, (95.0, 100.0)), Bar("a" * 80, None, series=1), Bar("<&>", 0.0), Bar("x", -3.0, (-5.0, 120.0))]
    charts = [
        bar_chart("t", bars, axis_over((-5, 100))),
        bar_chart("none", [], axis_over([])),
        line_chart("t", [Line("n", [(4096, 50.0)], [None])], Axis(0, 100, [0, 50, 100]), axis_of([4096]), ("%", "tokens")),
        line_chart("t", [Line("n", [(i, 1.0) for i in range(500)])], axis_over([1.0]), step_axis(0, 499), ("y", "x")),
        heat_map("t", ["4K"], [f"{i} %" for i in range(40)], [[(i / 39, 1) if i % 5 else None for i in range(40)]]),
    ]
    for chart, pixels in [(drawn, pixels) for drawn in charts for pixels in (drawn.width, NARROW)]:
        svg = ElementTree.fromstring(chart.draw(pixels))
        width, height = map(float, svg.get("viewBox").split()[2:])
        assert width == pixels
        for element in svg.iter():
            for name, limit in (("x", width), ("x1", width), ("x2", width), ("cx", width), ("y", height), ("cy", height)):
                assert 0 <= float(element.get(name, 0)) <= limit, ElementTree.tostring(element)


def test_charts_hold_the_numbers_that_they_draw():
    bars = [Bar("vt", 46.2, (43.0, 49.4), "60 samples"), Bar("vt", None, series=1)]
    chart = bar_chart("t", bars, axis_over([0, 49.4]), "%", ["a", "b"])
    assert chart.header == ["task", "run", "%", "95 % interval", "note"]
    assert chart.rows == [["vt", "a", "46.2", "43 to 49.4", "60 samples"], ["vt", "b", "–", "–", "no samples"]]
    lines = [Line("a", [(1, 2.0), (3, 4.0)], [(1.9, 2.1), None]), Line("b", [(3, 12345.6)]), Line("a", [(2, 9.0)], faint=True)]
    chart = line_chart("t", lines, axis_over([0, 1]), step_axis(1, 3), ("loss", "step"))
    assert (chart.header, chart.rows) == (["step", "a", "b"], [["1", "2.0 ±0.1", "–"], ["3", "4", "12,346"]])
    long = line_chart("t", [Line("a", [(i, 0.1) for i in range(1000)])], axis_over([0, 1]), step_axis(0, 999), ("loss", "step"))
    assert 20 <= len(long.rows) <= 40 and long.rows[0] == ["0", "0.1"]


def test_axes_end_at_the_data_and_their_ticks_are_round_and_within():
    assert ticks_within(0, 100) == [0, 25, 50, 75, 100]
    assert ticks_within(0.013, 0.021) == [0.014, 0.016, 0.018, 0.02]
    assert ticks_within(1, 410, whole=True) == [100, 200, 300, 400] and ticks_within(1, 3, whole=True) == [1, 2, 3]
    for low, high in ((-7.3, 41.0), (2.0, 2.0), (0.0, 1e-9), (1e5, 3e7), (0.0, 0.0), (-1e-20, 3e-20)):
        axis = axis_over((low, high))
        assert axis.low <= low <= high <= axis.high and (low == high or (axis.low, axis.high) == (low, high))
        assert 2 <= len(axis.ticks) <= 12 and axis.low <= axis.ticks[0] and axis.ticks[-1] <= axis.high
    axis = step_axis(1, 1250)
    assert (axis.low, axis.high, axis.ticks[-1]) == (1, 1250, 1250) and [axis.share(x) for x in (-5, 1, 1250, 9999)] == [0, 0, 1, 1]
    assert step_axis(7, 7).ticks == [7] and step_axis(7, 7).share(7) == 0.5
    assert [axis_of([4096, 8192, 16384]).share(x) for x in (4096, 8192, 16384)] == [0, 0.5, 1]


def test_escape_leaves_no_markup_and_nothing_that_utf8_cannot_write():
    for text in HOSTILE:
        escaped = escape(text)
        escaped.encode("utf-8")
        assert not set("<>\"'") & set(escaped) and "\x00" not in escaped
