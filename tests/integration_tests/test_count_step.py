"""Counts of a step against what is known by hand, and against the page that publishes them."""

import subprocess
import sys
from dataclasses import replace

import pytest

from refine_titan.estimation.operations import DEVICES, count_operations
from refine_titan.models.sizes import resolve_flavor
from refine_titan.validation import load_config
from tests.integration_tests.runs import REPOSITORY

PAGE = REPOSITORY / "docs" / "performance.md"


def test_forward_of_a_small_model_is_its_products():
    config = load_config(["--job.config_file", str(REPOSITORY / "train_configs" / "debug_midtrain.toml"), "--training.seq_len", "1024"])
    args = replace(resolve_flavor("delta_net", "debug"), n_layers=3)
    stages = count_operations(config, args)
    parameters_of_a_layer = 4 * args.dim**2 + args.dim * args.n_heads + 3 * args.dim * args.mlp_dim
    # The head forms the gradients of its input and weight with the loss.
    per_token = 2 * 3 * parameters_of_a_layer + 3 * args.mixer_flops_per_token() + 3 * 2 * args.dim * args.vocab_size
    assert stages["score"].flops == 1024 * per_token
    # Twice every forward that it goes through, but for the head, whose gradients exist.
    forwards = 1024 * (per_token - 3 * 2 * args.dim * args.vocab_size)
    assert stages["backward"].flops == pytest.approx(2 * (forwards + stages["replay"].flops + stages["rescore"].flops), rel=0.1)
    assert stages["decode"].needed > config.refine.rollout_length * args.vocab_size * args.dim * 2
    for stage in stages.values():
        assert stage.floor_seconds(DEVICES["H100 SXM"]) >= stage.floor_seconds(DEVICES["H200"]) > 0
        assert stage.memory_seconds(DEVICES["H200"]) >= stage.moved / DEVICES["H200"].bandwidth


PRESET = ["--model.hf_assets_path", "", "--checkpoint.no-initial_load_in_hf"]  # without the folder of the weights


@pytest.mark.slow
@pytest.mark.parametrize(
    "file, settings, forward, head",
    [
        ("debug_midtrain", ["--model.flavor", "1.3B", "--training.seq_len", "16384"], 42.58 + 0.62, 2 * 2.15),
        ("debug_lact", ["--model.flavor", "760M_muon", "--training.seq_len", "16384"], 36.4 - 0.31, 2 * 1.61),
        ("midtrain_qwen3_5_0.8B", PRESET, 24.65 + 0.54 + 6.60, 2 * 8.33),
        ("midtrain_qwen3_5_4B", PRESET, 137.8 + 1.44 + 17.6, 2 * 20.83),
    ],
)
def test_published_counts_are_those_of_the_code(file, settings, forward, head):
    """Forward by hand, plus the head's gradients. DeltaNet's is its linear layers and the recurrence as defined; the chunked form
    spends 0.5 more inside chunks, 43.7 in all. The first of LaCT's windows are short. Qwen3.5's are its linear layers, the recurrence, and
    attention to all tokens before."""
    command = [sys.executable, "tools/count_step.py", f"train_configs/{file}.toml", *settings]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout in PAGE.read_text()
    score = next(line for line in result.stdout.splitlines() if line.startswith("| score"))
    assert float(score.split("|")[2]) == pytest.approx(forward + head, rel=0.01)
