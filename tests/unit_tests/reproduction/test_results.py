"""The numbers and pages of an experiment whose stages have written known results."""

import json
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest

from refine_titan.errors import UserError
from refine_titan.report.svg_files import svg_file
from refine_titan.reproduction import measures, page, results
from refine_titan.reproduction.arms import Comparison
from refine_titan.reproduction.charts import difference_over_forks, main_chart, training_charts
from refine_titan.reproduction.experiment import Experiment
from refine_titan.reproduction.results import answer, experiment_results
from tests.unit_tests.reproduction.experiments import ARMS, experiment_folder, finish, write_measures

# By seed: what ReFINE gains on next-token training at step 200 and loses at step 600.
GAINS = (0.01, 0.02, 0.03, 0.02, 0.02)


def primary(fork: int, arm: str, seed: int) -> float:
    base = 0.4 + 0.01 * seed
    if arm == "fork":
        return base
    gained = 0.2 if fork == 200 else 0.05
    return base + gained + {"plain": 0.0, "refine": GAINS[seed - 1] * (1 if fork == 200 else -1), "longer": 0.001 * (-1) ** seed}[arm]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Experiment:
    folder = tmp_path_factory.mktemp("finished")
    experiment = Experiment.read(experiment_folder(folder), folder / "out")
    finish(experiment, primary)
    return experiment


@pytest.fixture(autouse=True)
def plain_results(monkeypatch):
    monkeypatch.setattr(measures, "read_results", lambda path: json.loads(path.read_text()))


@pytest.fixture
def found(finished) -> dict:
    return experiment_results(finished)


def pair(found: dict, fork: int, arm: str) -> dict:
    return next(pair for pair in found["comparisons"] if (pair["fork"], pair["arm"]) == (fork, arm))


def test_differences_are_taken_seed_by_seed_and_corrected_for_all_comparisons(found):
    assert found["measures"] == ["text/reward_cosine", "ruler/niah_single_1 512", "ruler/mean", "text/loss"]
    test = pair(found, 200, "refine")["differences"]["text/reward_cosine"]
    error = np.std(GAINS, ddof=1) / np.sqrt(5)
    assert test["mean"] == pytest.approx(0.02) and test["half_width"] == pytest.approx(2.7764 * error, rel=1e-4)
    assert test["p_value"] == pytest.approx(0.003198, rel=1e-3)  # t = 0.02 / error = 6.325 with 4 degrees of freedom
    corrected = pair(found, 200, "refine")["corrected"]
    assert corrected["number"] == 4 and corrected["half_width"] == pytest.approx(4.3147 * error, rel=1e-4)  # t at 1 - 0.05 / 8
    # Holm: the two equal smallest of the four p values, times 4 and not below it.
    assert [round(pair(found, fork, "refine")["corrected"]["p_value"], 5) for fork in (200, 600)] == [0.01279, 0.01279]
    assert pair(found, 200, "refine")["differences"]["text/loss"]["mean"] == pytest.approx(-0.02)


def test_answers_follow_the_corrected_interval(found):
    answers = {(pair["fork"], pair["arm"]): pair["answer"] for pair in found["comparisons"]}
    assert answers == {(200, "refine"): "yes", (200, "longer"): "undecided", (600, "refine"): "no", (600, "longer"): "undecided"}


@pytest.mark.parametrize(
    "difference, half_width, measure, seeds, expected",
    [
        (0.02, 0.01, "text/reward_cosine", 5, "yes"),
        (0.02, 0.03, "text/reward_cosine", 5, "undecided"),
        (-0.02, 0.01, "text/reward_cosine", 5, "no"),
        (-0.02, 0.01, "text/loss_2048", 5, "yes"),
        (0.02, 0.01, "text/loss_2048", 5, "no"),
        (0.02, 0.01, "perplexity/books 4K", 5, "no"),
        (0.02, 0.01, "ruler/mean", 4, "undecided"),
        (0.02, None, "ruler/mean", 1, "undecided"),
        (0.02, 0.02, "ruler/mean", 9, "undecided"),
        (0.02, 0.0, "ruler/mean", 5, "undecided"),
    ],
)
def test_answer(difference, half_width, measure, seeds, expected):
    assert answer(difference, half_width, measure, seeds) == expected


def test_costs_and_what_two_trainings_have_equal(found):
    costs = found["costs"][200]
    assert costs["plain"] == {"steps": 100, "tokens": 100 * 4 * 512, "seconds": 100.0}
    assert costs["longer"]["steps"] == 150 and costs["refine"]["seconds"] == 200.0 and costs["fork"]["steps"] == 0
    same = {arm: [pair(found, 200, arm)[f"same_{what}"] for what in ("steps", "tokens", "compute")] for arm in ("refine", "longer")}
    assert same == {"refine": [True, True, False], "longer": [False, False, False]}
    assert found["training"][200]["plain"] == {
        "refine/ntp_loss": pytest.approx(5 - np.mean(np.arange(81, 101)) / 100),
        "rollout/match_mean": 0.5,
    }


def test_gain_is_what_the_baseline_still_gains_on_the_checkpoint(found):
    assert [round(found["gains"][fork]["text/reward_cosine"]["mean"], 6) for fork in (200, 600)] == [0.2, 0.05]


def test_cost_of_an_arm_counts_those_that_it_goes_on_from(tmp_path):
    more = '[arms.second]\nafter = "refine"\nsettings = { training.steps = 30 }\n'
    experiment = Experiment.read(experiment_folder(tmp_path, ARMS + more), tmp_path / "out")
    experiment = replace(experiment, plan=experiment.plan.chosen(["second"], [200], [1]))
    finish(experiment, lambda fork, arm, seed: 0.5)
    cost = measures.cost_of(experiment, 200, "second", 1)
    assert cost == measures.Cost(130, 130 * 4 * 512, 100 * 2.0 + 30 * 1.0)


def test_tables_say_of_how_many_samples_a_measure_is_the_mean_and_what_one_took(finished):
    by_needles = replace(finished, plan=replace(finished.plan, primary="ruler/mean"))
    found = experiment_results(by_needles)
    assert found["samplings"][600]["refine"] == {"terms": 40, "seconds": 1.75}
    assert found["samplings"][600]["plain"] == {"terms": 40, "seconds": 0.5}


def test_samples_of_other_tasks_and_lengths_do_not_count(tmp_path):
    experiment = Experiment.read(experiment_folder(tmp_path), tmp_path / "out")
    finish(experiment, lambda fork, arm, seed: 0.5)
    path = experiment.measure_folder(200, "plain", 1, "ruler") / "results.json"
    [row] = json.loads(path.read_text())["tasks"]
    longer = row | {"length": 1024, "num_samples": 10, "seconds_per_sample": 2.0}
    other = row | {"benchmark": "perplexity", "task": "text", "num_samples": 7}
    path.write_text(json.dumps({"tasks": [row, longer, other]}))
    for primary, terms, seconds in (("ruler/niah_single_1 512", 40, 0.5), ("ruler/niah_single_1 1K", 10, 2.0), ("ruler/mean", 50, 0.8)):
        chosen = replace(experiment, plan=replace(experiment.plan, primary=primary))
        assert measures.sampling_of(chosen, 200, "plain", 1) == measures.Sampling(terms, pytest.approx(seconds))


def test_markdown_and_latex_say_what_came_out(found):
    text = page.markdown_page([found])
    assert (
        "Is “+ ReFINE” better than “+ next-token training” by text/reward_cosine? From step 200: yes (+0.0200 ±0.0136); "
        "from step 600: no (-0.0200 ±0.0136); 5 seeds, corrected for 4 comparisons.\n" in text
    )
    assert (
        "| + ReFINE − + next-token training | 200 | yes | +0.0200 | +0.0112 to +0.0288 | +0.0064 to +0.0336 | 0.003 | 0.013 "
        "| steps, tokens, seconds ×2.00 | 200 |" in text
    )
    assert "| + next-token training | 0.6300 ±0.0196 | 63.0 ±2.0 | 63.0 ±2.0 | 1.3700 ±0.0196 | 100 | 204,800 | 100 | 128 | – |" in text
    assert "| the checkpoint | 0.4300 ±0.0196 | 43.0 ±2.0 | 43.0 ±2.0 | 1.5700 ±0.0196 | – | – | – | 128 | – |" in text
    # Wide tables have a column for each arm.
    assert r"ruler/mean & 43.0 $\pm$2.0 & 63.0 $\pm$2.0 & 65.0 $\pm$" in page.latex([found])


def test_page_has_the_charts(finished, found):
    html = page.html([finished], [found])
    for text in (
        "Differences over the start&#x27;s steps",
        "next-token loss over steps",
        "next-token loss over seconds",
        "refine.objective",
    ):
        assert text in html
    assert len(training_charts(finished, 200)) == 4  # loss and match over steps and over seconds; no arm has a reward
    longer = next(chart for chart in training_charts(finished, 200) if chart.title == "next-token loss over seconds")
    assert longer.header == ["seconds", "+ next-token training", "+ ReFINE", "+ more steps"]


def test_figure_shows_differences_as_bars_or_over_many_forks_as_lines(finished, found):
    bars = main_chart(found)
    assert [row[0] for row in bars.rows] == [f"{arm}, from step {fork}" for fork in (200, 600) for arm in ("+ ReFINE", "+ more steps")]
    assert bars.rows[0][-1] == "yes" and bars.rows[2][-1] == "no"
    assert ElementTree.fromstring(svg_file(bars)).tag.endswith("svg")
    one = experiment_results(replace(finished, plan=finished.plan.chosen(None, [600], None)))
    assert [row[0] for row in main_chart(one).rows] == ["+ ReFINE", "+ more steps"]
    assert page.html([replace(finished, plan=finished.plan.chosen(None, [600], None))], [one])
    lines = difference_over_forks(found, found["primary"], "title", corrected=True)
    assert lines.series == ["+ ReFINE", "+ more steps"]
    assert lines.rows == [["200", "0.02 ±0.01", "-0.000 ±0.002"], ["600", "-0.02 ±0.01", "-0.000 ±0.002"]]


def test_two_comparisons_of_one_arm_differ_in_colour(finished):
    pairs = tuple(Comparison("refine", against) for against in ("plain", "longer"))
    found = experiment_results(replace(finished, plan=replace(finished.plan, comparisons=pairs)))
    lines = difference_over_forks(found, found["primary"], "title")
    assert lines.series == ["+ ReFINE", "+ ReFINE − + more steps"]
    drawn = ElementTree.fromstring(svg_file(lines))
    curves = {path[0].text: path.get("class") for path in drawn.iter() if path.tag.endswith("path") and len(path)}
    assert curves == {"+ ReFINE": "curve stroke0", "+ ReFINE − + more steps": "curve stroke1"}


def test_one_seed_has_no_interval_and_decides_nothing(finished):
    single = replace(finished, plan=finished.plan.chosen(["refine"], [200], [1]))
    found = experiment_results(single)
    assert pair(found, 200, "refine")["answer"] == "undecided" and pair(found, 200, "refine")["corrected"]["p_value"] is None
    assert "yes" not in page.headlines(found)[0] and "Fewer than 5 seeds decide nothing." in page.markdown_page([found])
    assert (
        "| + ReFINE − + next-token training | 200 | undecided | +0.0100 | – | – | – | – "
        "| steps, tokens, seconds ×2.00 | 200 |" in page.markdown_page([found])
    )
    assert page.html([single], [found])


def test_a_part_that_is_chosen_is_corrected_for_all_of_the_file(finished, found):
    part = experiment_results(replace(finished, plan=finished.plan.chosen(["refine"], [200], None)))
    assert len(part["comparisons"]) == 1 and pair(part, 200, "refine")["corrected"]["number"] == 4
    assert pair(part, 200, "refine")["corrected"]["half_width"] == pair(found, 200, "refine")["corrected"]["half_width"]
    alone = pair(part, 200, "refine")["differences"]["text/reward_cosine"]["p_value"]
    assert pair(part, 200, "refine")["corrected"]["p_value"] == pytest.approx(4 * alone)


def test_nothing_is_decided_while_a_seed_is_missing(finished):
    partial = experiment_results(replace(finished, plan=replace(finished.plan, missing=(6, 9))))
    assert partial["missing_seeds"] == [6, 9] and {pair["answer"] for pair in partial["comparisons"]} == {"undecided"}
    assert "Not finished: seeds 6, 9 of 7. Nothing is decided before." in page.markdown_page([partial])


def test_a_comparison_that_is_not_matched_in_compute_is_said_to_be(finished):
    pairs = (replace(finished.plan.comparisons[0], matched="compute"),)
    text = page.markdown_page([experiment_results(replace(finished, plan=replace(finished.plan, comparisons=pairs)))])
    assert "Not matched in compute, from step 200: + ReFINE − + next-token training; the first took 2.00 times as long." in text


def test_stages_of_several_revisions_are_named(finished, found):
    assert found["commits"] == []
    training, _ = finished.training(600, "refine", 2)
    files = (training.folder / "versions.json", finished.measure_folder(200, "plain", 1, "text") / "measures.json")
    kept = files[1].read_text()
    try:
        files[0].write_text('{"git_commit": "aaaaaaaaaaaaaa"}')
        files[1].write_text(json.dumps(json.loads(kept) | {"versions": {"git_commit": "bbbbbbbbbbbbbb"}}))
        text = page.markdown_page([experiment_results(finished)])
        assert "The stages ran at different revisions of this program (aaaaaaaaa, bbbbbbbbb); another --output runs them all again." in text
    finally:
        files[0].unlink()
        files[1].write_text(kept)


def test_page_names_the_baseline_wherever_it_stands_in_the_file(finished):
    turned = replace(finished.plan, arms=dict(reversed(finished.plan.arms.items())))
    experiment = replace(finished, plan=turned)
    assert "The baseline is + next-token training." in page.html([experiment], [experiment_results(experiment)])


def test_a_primary_measure_that_no_checkpoint_has_is_named_with_those_it_has(finished):
    wrong = replace(finished, plan=replace(finished.plan, primary="text/reward_cosin"))
    with pytest.raises(UserError, match="'text/reward_cosin'; did you mean 'text/reward_cosine'.; the checkpoints have ruler/"):
        experiment_results(wrong)


def test_measures_that_not_all_checkpoints_have_are_left_out(tmp_path):
    experiment = Experiment.read(experiment_folder(tmp_path), tmp_path / "out")
    experiment = replace(experiment, plan=experiment.plan.chosen(["refine"], [200], [1, 2]))
    finish(experiment, lambda fork, arm, seed: 0.5)
    path = experiment.measure_folder(200, "refine", 2, "text") / "measures.json"
    path.write_text('{"measures": {"reward_cosine": 0.5}, "terms": {"reward_cosine": 128}}')
    assert experiment_results(experiment)["measures"] == ["text/reward_cosine", "ruler/niah_single_1 512", "ruler/mean"]
    path.write_text('{"measures": {"reward_cosine": 0.5}}')
    with pytest.raises(UserError, match="measures.json does not say of how many terms reward_cosine is the mean"):
        experiment_results(experiment)
    path.write_text('{"measures": {"reward_cosine": "high"}}')
    with pytest.raises(UserError, match="measures.json holds no measures"):
        experiment_results(experiment)
    write_measures(experiment, 200, "refine", 2, 0.5)
    assert results.is_loss("text/loss") and "text/loss" in experiment_results(experiment)["measures"]


def test_many_comparisons_are_summed_up_first(finished, found):
    pairs = [
        Comparison(arm, against) for arm, against in (("refine", "plain"), ("longer", "plain"), ("refine", "longer"), ("plain", "fork"))
    ]
    first, *others = page.headlines(experiment_results(replace(finished, plan=replace(finished.plan, comparisons=tuple(pairs)))))
    # Over the checkpoint all seeds gain the same, which says nothing of the spread.
    assert first == "8 comparisons by text/reward_cosine, corrected for 8: 2 yes, 2 no, 4 undecided." and len(others) == 4
    assert len(page.headlines(found)) == 2


def test_many_measures_have_a_row_each():
    header, rows = page._turned(["", *(f"m{i}" for i in range(11))], [["arm", *map(str, range(11))], ["other", *map(str, range(11, 22))]])
    assert header == ["measure", "arm", "other"] and rows[0] == ("m0", "0", "11") and len(rows) == 11
    assert page._turned(["", "m0"], [["arm", "0"]]) == (["", "m0"], [["arm", "0"]])


def test_a_comparison_may_have_a_name_of_its_own(finished):
    pairs = (replace(finished.plan.comparisons[0], label="mid-training"), *finished.plan.comparisons[1:])
    found = experiment_results(replace(finished, plan=replace(finished.plan, comparisons=pairs)))
    assert "| mid-training: + ReFINE − + next-token training | 200 | yes | +0.0200 |" in page.markdown_page([found])
    assert [row[0] for row in main_chart(found).rows][:2] == ["mid-training, from step 200", "+ more steps, from step 200"]
