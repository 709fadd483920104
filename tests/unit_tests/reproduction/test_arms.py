"""What `arms.toml` may say, and what is said about a wrong one."""

import re
import tomllib
from pathlib import Path

import pytest

from refine_titan.errors import UserError
from refine_titan.reproduction.arms import Comparison, read_plan
from refine_titan.reproduction.settings import as_words, merged, nested, toml_text
from tests.unit_tests.reproduction.experiments import ARMS


def plan_of(folder: Path, text: str):
    (folder / "arms.toml").write_text(text)
    return read_plan(folder / "arms.toml")


def test_every_arm_is_compared_with_the_baseline_unless_the_file_says_otherwise(tmp_path):
    plan = plan_of(tmp_path, ARMS)
    assert plan.forks == (200, 600) and plan.seeds == (1, 2, 3, 4, 5) and list(plan.arms) == ["plain", "refine", "longer"]
    assert plan.comparisons == (Comparison("refine", "plain"), Comparison("longer", "plain"))
    own = '[[comparisons]]\narm = "refine"\nagainst = "longer"\nmatched = "compute"\n[[comparisons]]\narm = "plain"\nagainst = "fork"\n'
    assert plan_of(tmp_path, ARMS + own).comparisons == (Comparison("refine", "longer", "compute"), Comparison("plain", "fork"))


def test_settings_with_dots_in_quotes_without_and_as_tables_are_the_same(tmp_path):
    plan = plan_of(tmp_path, ARMS)
    assert plan.arms["refine"].settings == {"refine": {"objective": "refine"}}
    assert plan.arms["longer"].settings == {"refine": {"objective": "ntp"}, "training": {"steps": 150}}
    assert as_words(plan.arms["longer"].settings) == "refine.objective = 'ntp', training.steps = 150"


def test_chosen_arms_come_with_the_baseline_and_those_they_go_on_from(tmp_path):
    plan = plan_of(tmp_path, ARMS + '[arms.answers]\nafter = "longer"\nsettings = { refine.phase = "posttrain" }\n')
    chosen = plan.chosen(["answers"], [600], [7])
    assert list(chosen.arms) == ["plain", "longer", "answers"] and chosen.forks == (600,) and chosen.seeds == (7,)
    assert chosen.comparisons == (Comparison("longer", "plain"), Comparison("answers", "plain"))
    assert plan.chosen(None, None, None) == plan


def test_chosen_arms_come_with_their_rivals_and_are_corrected_for_all_of_the_file(tmp_path):
    own = '[[comparisons]]\narm = "refine"\nagainst = "longer"\n[[comparisons]]\narm = "refine"\nagainst = "fork"\n'
    plan = plan_of(tmp_path, ARMS + own)
    chosen = plan.chosen(["refine"], [200], None)
    assert list(chosen.arms) == ["plain", "refine", "longer"] and chosen.comparisons == plan.comparisons
    assert plan.num_comparisons == 4 and (chosen.num_comparisons, chosen.left_out) == (2, 2)
    assert plan.chosen(["longer"], None, None).comparisons == ()
    assert plan_of(tmp_path, ARMS.replace("forks = [200, 600]", "")).num_comparisons == 2


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("baseline = ", "basline = ", "arms.toml: unknown key 'basline'; did you mean 'baseline'?"),
        ('baseline = "plain"', 'baseline = "plane"', "baseline is 'plane'; did you mean 'plain'?; allowed: plain, refine, longer"),
        ('"ruler", "text"', '"ruller"', "measures holds 'ruller'; did you mean 'ruler'?"),
        ('"+ more steps"', '"+ more steps"\nforks = [300]', "[arms.longer] forks is [300]; allowed: some of forks = [200, 600]"),
        ('"+ next-token training"', '"+ next-token training"\nforks = [600]', "[arms.plain] forks is [600], but it is the baseline"),
        (
            'settings = { "refine.objective" = "refine" }',
            'forks = [200]\nsettings = { "refine.objective" = "refine" }\n[arms.second]\nafter = "refine"\n',
            "[arms.second] runs from all forks, but 'refine', which it goes on after, has forks = [200]",
        ),
        (
            "settings = { refine = {",
            'forks = [600]\n[arms.early]\nforks = [200]\n[[comparisons]]\narm = "early"\nagainst = "longer"\n'
            "[arms.other]\nsettings = { refine = {",
            "comparison 1: 'early' and 'longer' have no fork in common",
        ),
        ("[200, 600]", "[600, 200]", "forks is [600, 200]; allowed: rising numbers from 1"),
        ("[1, 2, 3, 4, 5]", "[0, 1]", "seeds is [0, 1]; allowed: different numbers from 1"),
        ("training.steps", "training.stpes", "[arms.longer] settings: unknown key 'training.stpes'; did you mean 'training.steps'?"),
        ("steps = 150", 'steps = "many"', "[arms.longer] settings: training.steps is 'many'; allowed: a whole number"),
        ('label = "+ ReFINE"', 'lable = "x"', "[arms.refine]: unknown key 'lable'; did you mean 'label'?"),
        ('label = "+ ReFINE"', 'after = "longest"', "[arms.refine] after is 'longest'; did you mean 'longer'?"),
        ('label = "+ ReFINE"', 'after = "refine"', "[arms.refine] goes on after itself"),
        ('label = "+ ReFINE"', "train = false", "[arms.refine] has train = false and settings"),
        ("[arms.refine]", "[arms.fork]", "an arm's name has letters, digits, - and _, and is not 'fork'"),
        ("training.steps = 150", "debug.seed = 4", "debug.seed and checkpoint.initial_load_path come from the seed and the fork"),
        ('primary = "text/reward_cosine"', "", "arms.toml: primary is missing"),
        ('"ruler", "text"', '"ruler"', "primary is 'text/reward_cosine', which the measure 'text' gives; measures is ['ruler']"),
        (
            "training.steps = 150",
            "evaluation.num_samples = 80",
            "[arms.longer] settings has 'evaluation', which its training does not read",
        ),
        (
            'label = "+ ReFINE"',
            "measured_with = { evaluation.num_samples = 80 }",
            "[arms.refine] measured_with has 'evaluation.num_samples', but all arms are measured on the same samples",
        ),
        ('label = "+ ReFINE"', 'measured_with = { data.source = "x" }', "[arms.refine] measured_with has 'data.source', but all"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, old, new, message):
    assert old in ARMS
    with pytest.raises(UserError, match=re.escape(message)):
        plan_of(tmp_path, ARMS.replace(old, new, 1))


@pytest.mark.parametrize(
    "pair, message",
    [
        ('arm = "refin"\nagainst = "plain"', "comparison 1: arm is 'refin'; did you mean 'refine'?"),
        ('arm = "plain"\nagainst = "plain"', "comparison 1 has arm = against = 'plain'"),
        ('arm = "refine"\nagainst = "plain"\nmatched = "time"', "matched is 'time'; allowed: 'steps', 'tokens', 'compute'"),
        ('arm = "refine"', "comparison 1: against is missing"),
    ],
)
def test_a_wrong_comparison_is_named(tmp_path, pair, message):
    with pytest.raises(UserError, match=re.escape(message)):
        plan_of(tmp_path, f"{ARMS}[[comparisons]]\n{pair}\n")


def test_choice_of_what_the_file_does_not_have_is_refused(tmp_path):
    plan = plan_of(tmp_path, ARMS)
    with pytest.raises(UserError, match=re.escape("--arms names 'refin'; did you mean 'refine'?; arms.toml has plain, refine, longer")):
        plan.chosen(["refin"], None, None)
    with pytest.raises(UserError, match=re.escape("--forks names 300; arms.toml has forks = [200, 600]")):
        plan.chosen(None, [300], None)


def test_settings_are_written_as_toml_that_reads_the_same(tmp_path):
    settings = {
        "model": {"options": ["a=1", 'quote " and \\ and \x7f'], "name": "ü"},
        "quantize": {"linear": {"float8": {"recipe": "row"}}},
        "checkpoint": {"enable": True, "interval": 5},
        "optimizer": {"lr": 1e-05, "eps": 1e-8},
    }
    assert tomllib.loads(toml_text(settings)) == settings
    assert merged({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}, {"d": {"e": 4}}) == {"a": {"b": 3, "c": 2}, "d": {"e": 4}}
    with pytest.raises(UserError, match="here: 'a.b' is there twice"):
        nested({"a": {"b": 1}, "a.b": 2}, "here")
