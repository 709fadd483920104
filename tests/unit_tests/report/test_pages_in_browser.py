"""The pages in a real browser: rollouts are filtered without a pause, nothing is wider than a telephone, charts have names."""

import json

import pytest

from refine_titan.report.comparison import compare
from refine_titan.report.comparison_report import html_report
from refine_titan.report.evaluation_report import write_report
from refine_titan.report.rollout_browser import SHOWN_ROLLOUTS
from refine_titan.report.run_report import write_run_report
from tests.browser import Browser, find_browser
from tests.evaluation_runs import HOSTILE, paper_tasks, sample_lines, write_run
from tests.training_runs import WORDS, write_training_run

pytestmark = pytest.mark.slow
# A filter takes 10 to 60 ms, and up to 100 ms while others use every core; a person notices a pause of about this length.
PAUSE_MS = 200
TELEPHONE, SCREEN = 400, 1280

# Sets a control as a person does, and measures until the page is laid out: the best of three, as others use the cores too.
SET = """
((name, value) => {
  const control = document.querySelector(`[data-rollouts] [name="${name}"]`), is_button = control.tagName === "BUTTON", times = [];
  for (let i = 0; i < (is_button ? 1 : 3); i++) {
    const begin = performance.now();
    if (is_button) control.click();
    else { control.value = value; control.dispatchEvent(new Event("input", { bubbles: true })); }
    document.body.offsetHeight;
    times.push(performance.now() - begin);
  }
  return Math.min(...times);
})
"""


@pytest.fixture(scope="module")
def browser():
    program = find_browser()
    if program is None:
        pytest.skip("needs Chromium or Chrome")
    found = Browser(program)
    yield found
    found.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The page of a run with 10,000 rollouts, of an evaluation, and of a comparison."""
    folder = tmp_path_factory.mktemp("pages")
    run = write_training_run(folder / "run", steps=SHOWN_ROLLOUTS // 8)
    lines = [sample_lines(paper_tasks(20), seed=seed, depths=40) for seed in (1, 2)]
    ends = {"prompt_end": "What is the number? " * 25 + HOSTILE[1]}
    runs = [write_run(folder / f"evaluation_{i}", [line | ends for line in found]) for i, found in enumerate(lines)]
    write_report(runs[0])
    (folder / "comparison.html").write_text(html_report(compare(*runs)), encoding="utf-8")
    return {"run": write_run_report(run), "evaluation": runs[0] / "report.html", "comparison": folder / "comparison.html"}


def rollouts(page) -> list[dict]:
    return [json.loads(line) for line in (page.parent / "rollouts.jsonl").read_text().splitlines()]


def test_ten_thousand_rollouts_are_filtered_without_a_pause(browser, pages):
    browser.open(pages["run"])
    lines = rollouts(pages["run"])
    assert len(lines) == SHOWN_ROLLOUTS and browser.problems() == []
    times = {}

    def set_control(name: str, value: object = "") -> None:
        times[name] = max(times.get(name, 0), browser.run(f"{SET}({json.dumps(name)}, {json.dumps(str(value))})"))

    def shown() -> str:
        return browser.run("document.querySelector('[data-rollouts] output').textContent")

    def count(*conditions) -> str:
        return f"{sum(all(condition(line) for condition in conditions) for line in lines):,} of 10,000"

    def matches(line: dict) -> int:
        return sum(a == b for a, b in zip(line["rollout_tokens"], line["truth_tokens"]))

    mean = sum(line["reward"] for line in lines) / len(lines)
    assert shown() == f"10,000 of 10,000; mean reward {mean:.3f}; {100 * mean:.1f} % of tokens match"
    steps = lambda line: 100 <= line["step"] <= 700  # noqa: E731
    set_control("from-step", 100)
    set_control("to-step", 700)
    assert shown().startswith(count(steps) + ";")
    rewards = lambda line: 0.4 <= line["reward"] <= 0.8  # noqa: E731
    set_control("from-reward", 0.4)
    set_control("to-reward", 0.8)
    assert shown().startswith(count(steps, rewards) + ";")
    document = lambda line: "module_12" in line["document"]  # noqa: E731
    set_control("document", "MODULE_12")
    assert shown().startswith(count(steps, rewards, document) + ";")
    for name in ("from-step", "to-step", "from-reward", "to-reward", "document"):
        set_control(name)
    for value, wanted in (("all", lambda n: n == 5), ("none", lambda n: n == 0), ("some", lambda n: 0 < n < 5)):
        set_control("match", value)
        assert shown().startswith(count(lambda line, wanted=wanted: wanted(matches(line))) + ";")
    set_control("match")
    text = lambda line: any("日本 state" in line[name] for name in ("prefix_tail", "rollout", "truth"))  # noqa: E731
    set_control("text", "日本 STATE")
    assert shown().startswith(count(text) + ";")
    set_control("text", "no rollout has this")
    assert shown() == "0 of 10,000" and browser.run("document.querySelectorAll('.cards article').length") == 0
    set_control("text")
    set_control("order", "high")
    assert "reward 1.000" in browser.run("document.querySelector('.cards header').textContent")
    place = "document.querySelector('.place').textContent"
    for name, expected in (("next", "page 2 of 500"), ("last", "page 500 of 500"), ("back", "page 499 of 500"), ("first", "page 1 of 500")):
        set_control(name)
        assert browser.run(place) == expected
    assert browser.run("document.querySelectorAll('.cards article').length") == 20
    print("ms:", {name: round(value, 1) for name, value in times.items()})
    assert max(times.values()) < PAUSE_MS and browser.problems() == []


def test_sampled_and_true_tokens_stand_above_each_other_and_differences_are_marked(browser, pages):
    browser.open(pages["run"])
    cells = """[...document.querySelector('.tokens').querySelectorAll('tr')].map(
        row => [...row.querySelectorAll('td')].map(cell => [cell.textContent, cell.classList.contains('differs')]))"""
    sampled, truth = browser.run(cells)
    first = rollouts(pages["run"])[0]
    show = lambda i: WORDS[i].replace(" ", "·").replace("\n", "↵") or f"#{i}"  # noqa: E731
    differs = [a != b for a, b in zip(first["rollout_tokens"], first["truth_tokens"])]
    assert sampled == [[show(i), d] for i, d in zip(first["rollout_tokens"], differs)] and True in differs and False in differs
    assert truth == [[show(i), d] for i, d in zip(first["truth_tokens"], differs)]
    lefts = "[...document.querySelector('.tokens').querySelectorAll('tr')].map(row => [...row.cells].map(c => c.getBoundingClientRect().x))"
    above, below = browser.run(lefts)
    assert above == below


def test_what_a_file_says_stays_text_in_the_browser(browser, tmp_path):
    run = write_training_run(tmp_path / "run", steps=1)
    lines = rollouts(run / "report.html")
    texts = [*HOSTILE[:4], "\u202ereversed", "[a](http://evil.example)", "<!-- </script><script>document.title = 'x'</script>"]
    for line, text in zip(lines, texts):
        line |= {"document": text, "prefix_tail": text, "rollout_texts": [text] * 5, "outer": False}
    lines[7] |= {"outer": True, "answers": texts[:3], "rollout": texts[1], "truth_tokens": []}
    (run / "rollouts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "config.json").write_text(json.dumps({texts[0]: {texts[1]: texts[6]}}))
    browser.open(write_run_report(run))
    assert browser.problems() == [] and browser.run("document.title") == "run"
    assert browser.run("document.querySelectorAll('main a:not(nav a), main img, main script:not([type])').length") == 0
    headings = browser.run("[...document.querySelectorAll('.cards header b')].map(b => b.textContent)")
    assert headings[:3] == texts[:3] and headings[4:7] == texts[4:] and "\ufffd[31mred" in headings[3]
    assert texts[6] in browser.run("document.querySelector('#settings').textContent")
    last = browser.run("[...document.querySelectorAll('.cards article')].at(-1).textContent")
    assert "right answers" + "".join(texts[:1]) in last


@pytest.mark.parametrize("name", ["run", "evaluation", "comparison"])
def test_pages_fit_a_telephone_and_a_screen(browser, pages, name):
    wide = "[...document.querySelectorAll('.broad')].filter(e => e.checkVisibility()).length"
    narrow = "[...document.querySelectorAll('.narrow')].filter(e => e.checkVisibility()).length"
    drawings = "[...document.querySelectorAll('figure svg')].filter(e => e.checkVisibility())"
    for width in (TELEPHONE, SCREEN):
        for dark in (False, True):
            browser.open(pages[name], width, dark=dark)
            assert browser.problems() == []
            assert browser.run("[innerWidth, document.documentElement.scrollWidth]") == [width, width]
            assert (browser.run(wide) > 0, browser.run(narrow) > 0) == (width == SCREEN, width == TELEPHONE)
            # No drawing is shrunk: its labels keep their size.
            assert browser.run(f"Math.min(...{drawings}.map(e => e.getBoundingClientRect().width / e.viewBox.baseVal.width))") == 1
            background = browser.run("getComputedStyle(document.body).backgroundColor")
            assert background == ("rgb(20, 23, 27)" if dark else "rgb(252, 252, 251)")
    if name == "run":
        return
    browser.open(pages[name], TELEPHONE)
    fixed = """(() => {
      const box = [...document.querySelectorAll('section > .scroll')].find(e => e.scrollWidth > e.clientWidth + 100);
      const [first, second] = [0, 1].map(i => box.querySelector('tbody tr').cells[i]), x = cell => cell.getBoundingClientRect().x;
      const before = [x(first), x(second)];
      box.scrollLeft = 100;
      return [x(first) - before[0], x(second) - before[1]];
    })()"""
    assert browser.run(fixed) == [0, -100]


@pytest.mark.parametrize("name", ["run", "evaluation", "comparison"])
def test_charts_are_figures_with_a_name_and_a_table(browser, pages, name):
    browser.open(pages[name])
    seen = "[...document.querySelectorAll('figure')].filter(f => f.checkVisibility())"
    captions = browser.run(f"{seen}.map(f => f.querySelector('figcaption').textContent)")
    nodes = [node for node in browser.call("Accessibility.getFullAXTree")["nodes"] if not node["ignored"]]
    roles = [node["role"]["value"] for node in nodes]
    assert [node["name"]["value"] for node in nodes if node["role"]["value"] == "figure"] == captions and len(captions) >= 4
    assert not {"image", "img", "SvgRoot", "graphics-document"} & set(roles)
    assert browser.run("[...document.querySelectorAll('figure')].every(f => f.querySelectorAll('details table tbody tr').length > 0)")


def test_the_end_of_the_prompt_stands_on_the_card(browser, pages):
    browser.open(pages["evaluation"], TELEPHONE)
    text = browser.run("document.querySelector('article:not([hidden]) pre').textContent")
    assert text.startswith("… What is the number?") and text.endswith(HOSTILE[1])
