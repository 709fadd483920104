"""Settings as people type them, and what they are told about words that mean nothing."""

import pytest

from refine_titan.config.command_line import checked_words
from refine_titan.config.reading import read_config
from refine_titan.errors import UsageError


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my.toml"
    path.write_text("[debug]\nseed = 7\n[checkpoint]\nenable = true\n")
    return str(path)


@pytest.mark.parametrize(
    "words, enabled",
    [
        (["--checkpoint.enable", "false"], False),
        (["--checkpoint.enable=False"], False),
        (["--checkpoint.enable", "no"], False),
        (["--checkpoint.enable", "0"], False),
        (["--checkpoint.no-enable"], False),
        (["--checkpoint.no-enable", "false"], True),
        (["--checkpoint.enable"], True),
        (["--checkpoint.enable", "TRUE"], True),
        (["--checkpoint.enable", "false", "--checkpoint.enable", "on"], True),
    ],
)
def test_settings_that_are_true_or_false_as_people_type_them(file, words, enabled):
    assert read_config([file, *words]).checkpoint.enable is enabled


def test_config_file_stands_first_without_an_option(file):
    assert read_config([file, "--training.steps", "3"]).debug.seed == 7


def test_dashes_equals_signs_lists_and_nothing_are_read_as_before(file):
    config = read_config(
        [file, "--training.global-batch-size=-1", "--evaluation.lengths", "1024", "2048", "--evaluation.tasks", "niah,ruler"]
        + ["--optimizer.lr", "3e-4", "--lr_scheduler.decay_ratio", "None"]
    )
    assert config.training.global_batch_size == -1 and config.evaluation.lengths == [1024, 2048]
    assert config.evaluation.tasks == ["niah", "ruler"] and config.optimizer.lr == 3e-4 and config.lr_scheduler.decay_ratio is None


@pytest.mark.parametrize(
    "words, message",
    [
        (["--training.stpes", "3"], "there is no setting --training.stpes; did you mean '--training.steps'?"),
        (["--steps", "3"], "there is no setting --steps"),
        (["--training.no-steps"], "there is no setting --training.no-steps"),
        (["--training.steps"], "--training.steps has no value; allowed: a whole number"),
        (["--training.steps", "--debug.seed", "1"], "--training.steps has no value; allowed: a whole number"),
        (["--training.steps", "many"], "--training.steps is 'many'; allowed: a whole number"),
        (["--training.steps", "1.5"], "--training.steps is '1.5'; allowed: a whole number"),
        (["--training.steps", "3", "4"], "--training.steps is followed by '3 4', but it has one value: a whole number"),
        (["--evaluation.tasks", "niah", "ruler"], "--evaluation.tasks is followed by 'niah ruler', but values are separated by commas"),
        (["--evaluation.lengths", "1024", "long"], "--evaluation.lengths is 'long'; allowed: a list of whole numbers"),
        (["--refine.phase", "middle"], "--refine.phase is 'middle'; allowed: 'midtrain', 'posttrain', 'ttt'"),
        (["--checkpoint.enable", "maybe"], "--checkpoint.enable is 'maybe'; allowed: true or false, or nothing for true"),
        (["other.toml"], "'other.toml' belongs to no option; a config file stands first, a setting is --section.key value"),
    ],
)
def test_words_that_mean_nothing_are_named(file, words, message):
    with pytest.raises(UsageError) as error:
        read_config([file, *words])
    assert str(error.value).startswith(message)


def test_every_setting_is_read_back_from_its_own_default():
    """So that no type of a setting is refused that torchtitan's reader takes."""
    from refine_titan.config.command_line import settings_by_name
    from refine_titan.config.sections import JobConfig

    config = JobConfig()
    for name, hint in settings_by_name().items():
        value = config
        for part in name.split("."):
            value = getattr(value, part)
        if isinstance(value, list):
            words = [",".join(value)] if hint == list[str] else [str(item) for item in value]
        else:
            words = [str(value)]
        assert checked_words([f"--{name}", *words]), name
