"""The mode of activation checkpointing that fits a device by the memory estimate."""

from dataclasses import replace

import pytest

from refine_titan.errors import UserError
from refine_titan.estimation.checkpointing_choice import choose_checkpointing, choose_within, usable_memory
from refine_titan.estimation.memory import estimate_memory
from refine_titan.registration import register_models
from refine_titan.rollout.byte_sizes import GIB
from refine_titan.validation import load_config

SMALL = (
    "--training.seq_len=256",
    "--refine.num_chunks=2",
    "--model.options=n_layers=2",
    "--refine.objective=ntp",
    "--activation_checkpoint.mode=auto",
)


def config_of(*settings: str):
    register_models()
    return load_config([*SMALL, *settings])


@pytest.fixture(scope="module")
def peaks() -> dict[str, int]:
    found = {}
    for mode in ("none", "selective", "full"):
        config = config_of(f"--activation_checkpoint.mode={mode}")
        found[mode] = estimate_memory(config, 1, gpu=True).peak
    return found


def test_cheapest_mode_that_fits_is_chosen(peaks):
    assert peaks["none"] > peaks["selective"] > peaks["full"]
    for mode, peak in peaks.items():
        choice = choose_within(config_of(), 1, True, peak, "the device is small")
        assert choice.config.activation_checkpoint.mode == mode
        assert choice.words.startswith(f"{mode} (the first that fits: a rank's peak is none ") and "the device is small" in choice.words
    words = choose_within(config_of(), 1, True, peaks["full"] - 1, "").words
    assert words.startswith("full (the least, although it does not fit by the estimate: a rank's peak is none")


def test_a_mode_that_the_settings_name_stays():
    config = config_of("--activation_checkpoint.mode=selective")
    assert choose_checkpointing(config, 1).config is config and choose_checkpointing(config, 1).words == ""


@pytest.mark.slow
def test_this_machine_decides_without_a_gpu():
    choice = choose_checkpointing(config_of(), 1)
    assert choice.config.activation_checkpoint.mode == "none" and "this machine has" in choice.words


def test_estimate_leaves_a_margin():
    assert usable_memory(80 * GIB, gpu=True) == 68 * GIB and usable_memory(10 * GIB, gpu=False) == 8 * GIB


def test_what_is_not_estimated_is_checkpointed_in_full_or_refused():
    adapting = config_of("--refine.phase=ttt")
    choice = choose_checkpointing(adapting, 1)
    assert choice.config.activation_checkpoint.mode == "full" and "prompts longer than training.seq_len" in choice.words
    offloading = replace(config_of(), training=replace(config_of().training, enable_cpu_offload=True))
    with pytest.raises(UserError, match="^activation_checkpoint.mode is 'auto' and training.enable_cpu_offload is set"):
        choose_checkpointing(offloading, 1)
