"""The reproduction's files, the stages of an experiment, and which of them run again after a change."""

import copy
import functools
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from refine_titan.config.sections import JobConfig
from refine_titan.errors import UserError
from refine_titan.models.sizes import resolve_flavor
from refine_titan.reproduction import trainings as trainings_module
from refine_titan.reproduction.experiment import Experiment
from refine_titan.reproduction.settings import merged
from refine_titan.reproduction.stages import Stage
from refine_titan.reproduction.tokenizer import retrieval_tokenizer
from refine_titan.validation import load_config
from tests.unit_tests.reproduction.experiments import ARMS, experiment_folder, finish

CONFIGS = Path(__file__).parents[3] / "train_configs" / "reproduction"
FOLDERS = sorted(path.parent for path in CONFIGS.glob("*/start.toml"))


@pytest.fixture(autouse=True)
def at_the_repository(monkeypatch):
    monkeypatch.chdir(CONFIGS.parents[1])  # paths in the files are relative to it


def test_committed_tokenizer_is_the_one_that_is_made():
    assert (CONFIGS / "tokenizer" / "tokenizer.json").read_text() == retrieval_tokenizer().to_str(pretty=True) + "\n"


def test_tokenizer_keeps_texts_and_has_a_token_a_digit():
    tokenizer, text = retrieval_tokenizer(), "The number for old-zebra is 1029384.\n\tÜ"
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text and sum(tokenizer.id_to_token(i).isdigit() for i in ids) == 7


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_files_of_an_experiment_train_the_same_model(folder):
    experiment = Experiment.read(folder, Path("out"))
    model = experiment.continue_config.model
    starts = experiment.start.configs
    assert all(vars(config.model) == vars(model) for config in (*starts, *experiment.arm_configs.values()))
    assert all(config.refine.objective == "ntp" for config in starts)
    resolve_flavor(model.name, model.flavor)
    experiment.check()
    trained = [name for name, arm in experiment.plan.arms.items() if arm.train]
    at_forks = [(fork, name) for fork in experiment.forks for name in experiment.checkpoints(fork)]
    assert len(experiment.start_stages()) == len(experiment.start.trainings)
    assert len(experiment.arm_stages()) == len(experiment.plan.seeds) * (
        sum(name in trained for _, name in at_forks) + len(experiment.plan.measures) * len(at_forks)
    )


@pytest.fixture(autouse=True)
def settings_are_read_once(monkeypatch):
    """The same settings take half a second each time."""
    monkeypatch.setattr(trainings_module, "load_config", lambda args, values: copy.deepcopy(loaded(json.dumps(values))))


@functools.cache
def loaded(values: str) -> JobConfig:
    return load_config([], values=json.loads(values))


def read(folder: Path, arms: str = ARMS, **chosen) -> Experiment:
    experiment = Experiment.read(experiment_folder(folder, arms), folder / "out")
    return replace(experiment, plan=experiment.plan.chosen(chosen.get("arms"), chosen.get("forks"), chosen.get("seeds")))


def all_stages(experiment: Experiment) -> list[Stage]:
    return [*experiment.start_stages(), *experiment.arm_stages()]


def folders(experiment: Experiment) -> dict[str, Path]:
    stages = all_stages(experiment)
    found = {stage.name: stage.folder for stage in stages}
    assert len(found) == len(stages) == len(set(found.values()))
    return found


def changed(before: dict[str, Path], after: dict[str, Path]) -> set[str]:
    return {name for name in before.keys() & after.keys() if before[name] != after[name]}


def test_arms_differ_in_their_settings_and_nothing_else(tmp_path):
    experiment = read(tmp_path)
    plain, refine = (experiment.training(600, arm, 2)[0] for arm in ("plain", "refine"))
    start = str(experiment.start.trainings[0].checkpoint(600))
    assert plain.values["checkpoint"]["initial_load_path"] == start and plain.values["debug"] == {"seed": 2}
    assert merged(plain.values, {"refine": {"objective": "refine"}}) == refine.values
    stages = {stage.name: stage for stage in all_stages(experiment)}
    stage = stages[f"{experiment.name}/fork_600/refine_seed_2"]
    stage.prepare()
    assert stage.needs == (f"{experiment.name}/start",) and f"{stage.folder}.toml" in stage.command
    config = load_config(["--job.config_file", f"{stage.folder}.toml", "--checkpoint.initial_load_path", ""])
    assert config.refine.objective == "refine" and config.debug.seed == 2 and config.training.steps == 100
    measure = stages[f"{experiment.name}/fork_600/refine_seed_2.text"]
    assert measure.needs == (stage.name,) and measure.command[3:5] == ("evaluate", "text")
    assert measure.command[measure.command.index("--checkpoint") + 1] == str(stage.folder / "checkpoint" / "step-100")
    assert measure.command[measure.command.index("--seed") + 1] == "2"


def test_another_arm_seed_fork_or_measure_reruns_nothing(tmp_path):
    small = ARMS.replace("[200, 600]", "[600]").replace("[1, 2, 3, 4, 5]", "[1]").replace('"ruler", ', "")
    before = folders(read(tmp_path, small[: small.index("[arms.longer]")]))
    after = folders(read(tmp_path))
    assert before.items() <= after.items() and len(after) == 1 + 5 * 2 * (3 + 2 * 4)


def test_one_changed_arm_reruns_that_arm(tmp_path):
    before = folders(read(tmp_path))
    after = folders(read(tmp_path, ARMS.replace("training.steps = 150", "training.steps = 160")))
    assert changed(before, after) == {name for name in before if "longer" in name}


@pytest.mark.parametrize(
    "file, old, new, which",
    [
        ("start.toml", "lr = 3e-3", "lr = 4e-3", ""),
        ("start.toml", "steps = 900", "steps = 1000", None),
        ("start.toml", 'description = "', 'description = "other ', None),
        ("continue.toml", "lr = 5e-4", "lr = 6e-4", "plain refine longer"),
        ("continue.toml", "num_samples = 40", "num_samples = 50", ".ruler .text"),
        ("continue.toml", "steps = 100", "steps = 110", "plain refine"),
        ("continue.toml", "# What", "# This is what", None),
    ],
)
def test_a_changed_file_reruns_what_depends_on_it(tmp_path, file, old, new, which):
    before = folders(read(tmp_path))
    path = tmp_path / file
    assert path.read_text().count(old) == 1
    path.write_text(path.read_text().replace(old, new))
    after = folders(Experiment.read(tmp_path, tmp_path / "out"))
    expected = set() if which is None else {name for name in before if any(part in name for part in which.split(" "))}
    assert changed(before, after) == expected


def test_the_content_of_a_named_file_counts_and_not_its_time(tmp_path, monkeypatch):
    text = tmp_path / "text"
    text.mkdir()
    (text / "a.py").write_text("print(1)\n" * 2000)
    folder = experiment_folder(tmp_path / "e")
    path = folder / "continue.toml"
    path.write_text(path.read_text().replace('source = "synthetic"\nsynthetic_needles = 1', f'source = "{text}"'))
    before = folders(Experiment.read(folder, tmp_path / "out"))
    os.utime(text / "a.py", (1, 1))
    assert folders(Experiment.read(folder, tmp_path / "out")) == before
    (text / "a.py").write_text("print(2)\n" * 2000)
    # The samples of a measure may come from the file too.
    assert changed(before, folders(Experiment.read(folder, tmp_path / "out"))) == {name for name in before if "/fork_" in name}


def test_a_start_with_a_constant_learning_rate_ends_with_the_last_fork_and_goes_on_later(tmp_path):
    short, long = read(tmp_path, forks=[200]), read(tmp_path)
    [start], [longer] = short.start.trainings, long.start.trainings
    assert start.values["training"]["steps"] == 200 and start.steps == (200,)
    assert longer.values["training"]["steps"] == 600 and longer.steps == (200, 600)
    assert start.folder == longer.folder and folders(short).items() <= folders(long).items()
    text = (tmp_path / "start.toml").read_text()
    (tmp_path / "start.toml").write_text(text.replace("warmup_steps = 50", "warmup_steps = 50\ndecay_ratio = 0.5"))
    [decaying] = replace(long, plan=long.plan.chosen(None, [200], None)).start.trainings
    assert decaying.steps == (200, 900) and decaying.folder != longer.folder


def second_stage(folder: Path) -> None:
    text = (folder / "start.toml").read_text()
    (folder / "start_2.toml").write_text(text.replace("seq_len = 144", "seq_len = 512").replace("steps = 900", "steps = 400"))


def test_a_start_may_have_further_stages_whose_forks_count_all_steps(tmp_path):
    arms = ARMS.replace("[200, 600]", "[600, 900, 1100, 1300]")
    alone = read(tmp_path)
    second_stage(tmp_path)
    experiment = read(tmp_path, arms)
    first, second = experiment.start.trainings
    assert first.steps == (600, 900) and second.steps == (200, 400) and second.origin == (first, 900)
    assert first.folder == alone.start.trainings[0].folder  # a further stage reruns nothing
    assert second.values["checkpoint"]["initial_load_path"] == str(first.checkpoint(900))
    assert [experiment.start.checkpoint_of(fork) for fork in experiment.forks] == [(first, 600), (first, 900), (second, 200), (second, 400)]
    stages = {stage.name: stage for stage in all_stages(experiment)}
    assert stages[f"{experiment.name}/start_2"].needs == (f"{experiment.name}/start",)
    assert stages[f"{experiment.name}/fork_900/refine_seed_1"].needs == (f"{experiment.name}/start",)
    refine, _ = experiment.training(1300, "refine", 1)
    assert refine.origin == (second, 400) and refine.since_start() == [refine] and refine.line() == [refine, second, first]
    with pytest.raises(UserError, match="forks holds 1000, .*start_2.toml keeps 1100, 1300 .*, after 900 steps of earlier stages"):
        _ = read(tmp_path, ARMS.replace("[200, 600]", "[1000]")).forks


def test_arms_may_run_from_some_forks_only(tmp_path):
    some = ARMS.replace('label = "+ more steps"', 'label = "+ more steps"\nforks = [600]')
    experiment = read(tmp_path, some)
    assert "longer" not in experiment.checkpoints(200) and "longer" in experiment.checkpoints(600)
    assert folders(experiment) == {name: path for name, path in folders(read(tmp_path)).items() if "fork_200/longer" not in name}
    assert list(read(tmp_path, some, forks=[200]).plan.arms) == ["plain", "refine"]


def test_a_fork_whose_checkpoint_is_not_kept_is_refused(tmp_path):
    with pytest.raises(UserError, match="forks holds 300, whose checkpoint is not kept; start.toml keeps 200, 400, 600, 800, 900"):
        _ = read(tmp_path, ARMS.replace("[200, 600]", "[200, 300]")).forks
    path = experiment_folder(tmp_path) / "start.toml"
    path.write_text(path.read_text().replace("interval = 200", "interval = 200\nkeep_latest_k = 2"))
    with pytest.raises(UserError, match="forks holds 200, whose checkpoint is not kept; start.toml keeps 800, 900"):
        _ = Experiment.read(tmp_path, tmp_path).forks
    assert read(tmp_path, ARMS.replace("forks = [200, 600]", "")).forks == (900,)


def test_an_arm_may_go_on_after_another_or_only_be_measured_otherwise(tmp_path):
    more = """
[arms.second]
after = "refine"
settings = { refine.objective = "ntp", training.steps = 30 }
[arms.adapted]
train = false
measured_with = { refine.phase = "ttt" }
"""
    experiment = read(tmp_path, ARMS + more, seeds=[1], forks=[600])
    second, step = experiment.training(600, "second", 1)
    assert second.origin == experiment.training(600, "refine", 1) and step == 30
    assert second.values["checkpoint"]["initial_load_path"].endswith("step-100")
    assert experiment.training(600, "adapted", 1) == experiment.start.checkpoint_of(600)
    stages = {stage.name: stage for stage in all_stages(experiment)}
    assert f"{experiment.name}/fork_600/adapted_seed_1" not in stages
    assert stages[f"{experiment.name}/fork_600/second_seed_1"].needs == (f"{experiment.name}/fork_600/refine_seed_1",)
    measure = stages[f"{experiment.name}/fork_600/adapted_seed_1.ruler"]
    measure.prepare()
    assert 'phase = "ttt"' in Path(f"{measure.folder}.toml").read_text()


def test_trainings_that_are_not_matched_as_the_file_says_are_refused(tmp_path):
    pair = '[[comparisons]]\narm = "longer"\nagainst = "plain"\nmatched = "tokens"\n'
    with pytest.raises(UserError, match="comparison 1 is matched in tokens, but 'longer' has 307,200 and 'plain' has 204,800"):
        read(tmp_path, ARMS + pair).check()


def test_folder_without_its_files_is_named(tmp_path):
    (tmp_path / "start.toml").touch()
    with pytest.raises(UserError, match=f"{tmp_path} holds no continue.toml and no arms.toml; an experiment is a folder with"):
        Experiment.read(tmp_path, tmp_path / "out")


def test_a_wrong_setting_names_the_file_or_the_arm(tmp_path):
    experiment = read(tmp_path, ARMS.replace('"refine.objective" = "refine"', '"refine.objective" = "refine", refine.num_chunks = 400'))
    with pytest.raises(UserError, match=r"arms.toml: \[arms.refine\] settings: refine.num_chunks is 400"):
        experiment.arm_stages()


def test_options_of_the_text_measure_are_on_its_command_line_and_change_it_alone(tmp_path):
    before = folders(read(tmp_path))
    experiment = read(tmp_path, ARMS + "[text]\nsequences = 16\nlength = 1024\n")
    assert changed(before, folders(experiment)) == {name for name in before if name.endswith(".text")}
    stages = {stage.name: stage for stage in all_stages(experiment)}
    assert stages[f"{experiment.name}/fork_600/plain_seed_1.text"].command[-4:] == ("--sequences", "16", "--length", "1024")
    assert "--sequences" not in stages[f"{experiment.name}/fork_600/plain_seed_1.ruler"].command
    with pytest.raises(UserError, match=r"\[text\]: unknown key 'sequence'; did you mean 'sequences'"):
        read(tmp_path, ARMS + "[text]\nsequence = 16\n")


def test_a_training_on_documents_that_others_hold_out_is_refused(tmp_path):
    folder = experiment_folder(tmp_path)
    path = folder / "continue.toml"
    path.write_text(path.read_text().replace("[data]", "[data]\nholdout_percent = 5"))
    with pytest.raises(UserError, match="data.holdout_percent is 0 and 5 in trainings on the same data.source"):
        Experiment.read(folder, tmp_path / "out").check()
    (folder / "start.toml").write_text((folder / "start.toml").read_text().replace("[data]", "[data]\nholdout_percent = 5"))
    Experiment.read(folder, tmp_path / "out").check()


@pytest.mark.parametrize(
    "file, old, new, message",
    [
        ("start.toml", "[model]", "[debug]\nseed = 3\n\n[model]", "seeds holds 3, which is debug.seed of .*start.toml; allowed: others"),
        (
            "continue.toml",
            'source = "synthetic"',
            'source = "python-stdlib"',
            "continue.toml: data.holdout_percent is 0, so that the measure",
        ),
        ("arms.toml", "[arms.longer]", "[text]\nsequences = 0\n[arms.longer]", "--sequences is 0; allowed: at least 1"),
        (
            "arms.toml",
            'label = "+ ReFINE"',
            'measured_with = { refine.phase = "ttt" }',
            r"\[arms.refine\] is measured with refine.phase = 'ttt', but the measure 'text' adapts no weights",
        ),
    ],
)
def test_what_would_spoil_a_comparison_is_refused_before_anything_runs(tmp_path, file, old, new, message):
    path = experiment_folder(tmp_path) / file
    assert path.read_text().count(old) == 1
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(UserError, match=message):
        Experiment.read(tmp_path, tmp_path / "out").check()


def test_an_interrupted_start_keeps_its_earlier_forks(tmp_path):
    [start] = read(tmp_path).start.trainings
    assert start.steps == (200, 600) and start.values["checkpoint"]["keep_latest_k"] == 0
    [single] = read(tmp_path, forks=[200]).start.trainings
    assert "keep_latest_k" not in single.values["checkpoint"] and single.folder == start.folder


def test_seeds_of_which_everything_is_done(tmp_path):
    experiment = read(tmp_path, seeds=[1, 2, 3])
    assert experiment.finished_seeds() == ()
    finish(experiment, lambda fork, arm, seed: 0.5)
    assert experiment.finished_seeds() == (1, 2, 3)
    (experiment.measure_folder(600, "refine", 2, "text") / "measures.json").unlink()
    assert experiment.finished_seeds() == (1, 3)


def test_another_file_of_arms_shares_the_stages_that_it_has_in_common(tmp_path):
    folder = experiment_folder(tmp_path)
    (folder / "other.toml").write_text(ARMS.replace("[1, 2, 3, 4, 5]", "[5, 101]").replace("+ ReFINE", "next sequences"))
    other = Experiment.read(folder / "other.toml", tmp_path / "out")
    before, after = folders(read(tmp_path)), folders(other)
    assert other.name == folder.name and not changed(before, after)
    assert {name.rpartition("seed_")[2].partition(".")[0] for name in after.keys() - before.keys()} == {"101"}
    with pytest.raises(UserError, match=r"other.toml: \[arms.refine\]"):
        (folder / "other.toml").write_text(ARMS.replace('"refine.objective" = "refine"', 'optimizer.lr = "high"'))
        Experiment.read(folder / "other.toml", tmp_path / "out")
