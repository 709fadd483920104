"""A run goes on with other settings: which train, which are refused, and what it says."""

import json
import re

import pytest

from refine_titan.config.fates import Fate, fates
from refine_titan.config.sections import JobConfig
from refine_titan.errors import UserError
from refine_titan.models.sizes import resolve_flavor
from refine_titan.monitoring.resumed_settings import BEGUN_ANEW, parts_to_begin_anew, record_new_beginning, resumed_settings
from refine_titan.monitoring.run_folder import write_run_files


@pytest.fixture
def resume(tmp_path):
    """Resumes a run with the default settings after step 5, with some of them changed."""
    config = JobConfig()
    config.job.dump_folder = str(tmp_path)
    write_run_files(tmp_path, config.to_dict())
    checkpoint = tmp_path / "checkpoint" / "step-5"
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.json").write_text(json.dumps(resolve_flavor("delta_net", "debug").to_hf_config()))

    def change(**settings) -> list[str]:
        for name, value in settings.items():
            section, _, key = name.partition("__")
            setattr(getattr(config, section), key, value)
        return resumed_settings(config, 5)

    change.folder, change.config = tmp_path, config
    return change


def test_every_setting_has_a_fate():
    fate = fates(JobConfig)
    assert fate["optimizer.lr"] is Fate.APPLIES and fate["debug.seed"] is Fate.REFUSED
    assert fate["quantize.linear.float8.emulate"] is Fate.APPLIES and "fault_tolerance.enable" not in fate


def test_same_settings_are_not_worth_a_word(resume):
    assert resume() == []


def test_settings_without_effect_are_not_worth_a_word(resume):
    assert resume(metrics__log_freq=7, evaluation__batch_size=2, compile__enable=True, parallelism__context_parallel_degree=2) == []


def test_applied_settings_are_told_with_both_values_and_their_first_step(resume):
    [line] = resume(refine__rl_coef=0.5, refine__temperature=0)
    assert line == "Changed settings apply from step 6 on: refine.temperature: 1.0 -> 0; refine.rl_coef: 0.2 -> 0.5"


@pytest.mark.parametrize("change", [{"optimizer__lr": 1e-3}, {"lr_scheduler__warmup_steps": 9}, {"training__steps": 200}])
def test_changed_schedule_says_at_which_step_it_takes_over(resume, change):
    assert resume(**change)[1:] == ["The learning-rate schedule of the changed settings takes over at step 6"]


def test_what_is_excluded_from_loading_is_told(resume):
    told = resume(checkpoint__exclude_from_loading=["lr_scheduler", "optimizer"], optimizer__lr=1e-3)
    assert told == [
        "Begins anew at step 6: the optimizer's moments, the learning-rate schedule",
        "Changed settings apply from step 6 on: optimizer.lr: 1e-06 -> 0.001",
    ]


def test_settings_of_the_data_apply_where_the_data_begin_anew(resume):
    assert resume(data__shuffle_buffer=2) == []  # the data loader compares the data
    assert resume(checkpoint__exclude_from_loading=["dataloader"]) == [
        "Begins anew at step 6: the data",
        "Changed settings apply from step 6 on: data.shuffle_buffer: 256 -> 2",
    ]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"debug__seed": 7}, "debug.seed is 7; allowed: 42, with which the run in"),
        ({"refine__phase": "posttrain"}, "refine.phase is 'posttrain'; allowed: 'midtrain', with which"),
        ({"training__dtype": "bfloat16"}, "training.dtype is 'bfloat16'; allowed: 'float32', with which"),
        ({"model__flavor": "340M"}, "model.flavor is '340M'; "),
        ({"model__options": ["dim=128"]}, "step-5 is another delta_net: dim 256 (flavor: 128)"),
        ({"model__name": "lact"}, "model.name is 'lact'; allowed: 'delta_net', the family of "),
    ],
)
def test_what_cannot_go_on_is_refused_with_both_values(resume, change, message):
    with pytest.raises(UserError, match=re.escape(message)):
        resume(**change)


def test_same_model_from_another_place_goes_on(resume):
    config = resume.folder / "elsewhere" / "config.json"
    config.parent.mkdir()
    config.write_text(json.dumps(resolve_flavor("delta_net", "debug").to_hf_config()))
    assert resume(model__flavor=str(config)) == [f"Changed settings apply from step 6 on: model.flavor: 'debug' -> '{config}'"]


def test_setting_that_an_older_run_did_not_have_is_not_compared(resume):
    path = resume.folder / "config.json"
    settings = json.loads(path.read_text())
    del settings["refine"]["kl_coef"]
    path.write_text(json.dumps(settings | {"forgotten": {"section": 1}}))
    assert resume(refine__kl_coef=0.5) == []


def test_damaged_record_of_the_settings_is_named(resume):
    (resume.folder / "config.json").write_text('{"refine": ')
    with pytest.raises(UserError, match="config.json is not JSON"):
        resume()


def test_same_command_begins_its_data_anew_once(resume):
    anew = "Begins anew at step 6: the data"
    assert resume(checkpoint__exclude_from_loading=["dataloader"]) == [anew]
    record_new_beginning(resume.folder, 3)
    assert resume() == [anew]  # config.json has still the settings of before
    write_run_files(resume.folder, resume.config.to_dict())
    assert parts_to_begin_anew(resume.config, 3) == ["dataloader"]  # ended before its first checkpoint
    [line] = resume()
    assert line == f"Goes on with the data as begun anew at step 4; remove {resume.folder / BEGUN_ANEW} to begin anew once more"
    assert resume(metrics__log_freq=7) == [line] and parts_to_begin_anew(resume.config, 5) == []
    assert resume(optimizer__lr=1e-3)[0] == anew
    (resume.folder / "config.json").unlink()
    assert resume() == [anew]


@pytest.mark.parametrize("content", ["", "[1]", "{}", '{"step": null}', '{"step": Infinity}'])
def test_damaged_record_of_a_new_beginning_is_named(resume, content):
    (resume.folder / BEGUN_ANEW).write_text(content)
    assert resume() == []
    with pytest.raises(UserError, match="begun_anew.json is damaged .*; remove it to begin anew what checkpoint.exclude_from_loading"):
        resume(checkpoint__exclude_from_loading=["optimizer"])
