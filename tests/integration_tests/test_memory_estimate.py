"""The estimate of a rank's memory: exact where it says so, near what real steps allocate, and a way out where it does not fit."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from refine_titan.config.batch_plan import RoundSizes
from refine_titan.distributed.shards import parameter_bytes
from refine_titan.estimation.rehearsal import rehearse, rehearse_layers
from refine_titan.estimation.rounds import largest_round, plan_rounds
from refine_titan.estimation.virtual_ranks import build_model, virtual_ranks
from refine_titan.models.sizes import resolve_args
from refine_titan.registration import register_models
from refine_titan.rollout.engine_memory import memory_needs
from refine_titan.validation import load_config
from tests.integration_tests.runs import REPOSITORY

# Estimate over measurement. Above 1: replays are taken as long as they can be, and gradients as held all along.
LOWEST, HIGHEST = 0.95, 1.25
FAMILIES = {"delta_net": "debug_midtrain", "gated_delta_net": "debug_gated_delta_net", "lact": "debug_lact"}


def file_of(family: str) -> str:
    return str(REPOSITORY / "train_configs" / f"{FAMILIES[family]}.toml")


def estimate(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/estimate_memory.py", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)


def measured_peak(family: str, ranks: int, *overrides: str) -> int:
    """Of a real step, in bytes beyond weights and optimizer."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--rdzv_backend=c10d"]
        launcher += ["--rdzv_endpoint=localhost:0", "--local-ranks-filter=0"]
    command = [*launcher, "-m", "tests.integration_tests.peak_memory", "--job.config_file", file_of(family), *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(next(line for line in result.stdout.splitlines() if line.startswith('{"peak"')))["peak"]


LONG = ("--training.seq_len", "8192", "--refine.scoring_pass", "separate", "--activation_checkpoint.mode", "full")
ONE_ROUND = ("--training.global_batch_size", "3", "--rollout.microbatches_per_round", "3")


@pytest.mark.slow
@pytest.mark.parametrize(
    "family, ranks, overrides",
    [
        ("delta_net", 1, ()),
        ("gated_delta_net", 1, ()),
        ("lact", 1, ()),
        ("delta_net", 1, LONG),
        ("gated_delta_net", 1, LONG),
        ("lact", 1, LONG),
        ("delta_net", 1, ONE_ROUND),
        ("lact", 1, (*ONE_ROUND, "--refine.scoring_pass", "separate")),
        ("delta_net", 2, ("--training.global_batch_size", "2", "--activation_checkpoint.mode", "full")),
        ("lact", 2, ("--training.global_batch_size", "2", "--training.mixed_precision_param", "bfloat16")),
    ],
)
def test_estimate_is_near_what_a_real_step_allocates(family, ranks, overrides):
    overrides = ("--data.source", "synthetic", *overrides)
    result = estimate(file_of(family), "--ranks", str(ranks), "--device", "cpu", "--json", *overrides)
    assert result.returncode == 0, result.stderr[-2000:]
    counted = json.loads(result.stdout)
    expected = counted["peak"] - counted["needs"]["weights"] - counted["needs"]["optimizer"]
    assert LOWEST < expected / measured_peak(family, ranks, *overrides) < HIGHEST


@pytest.mark.slow
def test_deeper_model_is_told_by_two_shallow_ones():
    config = load_config(["--job.config_file", file_of("delta_net"), "--training.seq_len", "1024", "--refine.scoring_pass", "separate"])
    args = resolve_args(config.model)
    assert args.n_layers == 4
    told, counted = rehearse(config, 1, gpu=True), rehearse_layers(config, args, 1, gpu=True)
    assert told == counted and told.stages.keys() == {"score", "roll out", "update"}


def test_checkpointing_keeps_block_inputs_only():
    def kept(mode: str) -> int:
        overrides = ["--training.seq_len", "1024", "--activation_checkpoint.mode", mode, "--refine.objective", "ntp"]
        config = load_config(["--job.config_file", file_of("delta_net"), *overrides])
        return rehearse(config, 1, gpu=True).parts["kept for backward"]

    hidden, layers = 1024 * 256 * 4, 4
    # Block inputs and the final norm's, the hidden state twice (float32), the head's gradients.
    assert layers * hidden < kept("full") < (layers + 5) * hidden
    assert kept("none") > 5 * kept("full")


@pytest.mark.parametrize("family", ["delta_net", pytest.param("lact", marks=pytest.mark.slow)])
def test_ranks_that_share_a_sequence_keep_their_part_of_it(family):
    def kept(seq_len: int, degree: int) -> int:
        overrides = [
            "--training.seq_len",
            str(seq_len),
            "--parallelism.context_parallel_degree",
            str(degree),
            "--refine.num_chunks",
            str(8 * degree),
        ]
        config = load_config(["--job.config_file", file_of(family), *overrides])
        return rehearse(config, degree, gpu=True).parts["kept for backward"]

    # The same rows, besides what arrives from the rank before.
    assert 0.9 * kept(1024, 1) < kept(4096, 4) < 1.35 * kept(1024, 1)


def test_rehearsal_leaves_real_tensors_alone():
    from refine_kernels.delta_rule import delta_rule

    q = torch.randn(96, 2, 8)
    before = delta_rule(q, q, q, q[..., 0].sigmoid(), (0, 96))[0]
    rehearse(load_config(["--job.config_file", file_of("delta_net"), "--training.seq_len", "1024"]), 1, gpu=True)
    assert torch.equal(delta_rule(q, q, q, q[..., 0].sigmoid(), (0, 96))[0], before)


@pytest.mark.parametrize(
    "family, flavor, degree",
    [
        ("delta_net", "1.3B", 4),
        ("lact", "760M_muon", 2),
        ("gated_delta_net", "1.3B", 2),
        ("kda", "debug", 2),
        ("qwen3_5", "debug", 2),
        ("olmo_hybrid", "debug", 2),
        ("gated_delta_product", "debug", 1),
    ],
)
def test_shards_are_those_of_the_real_meshes(family, flavor, degree):
    """Tensor parallelism where the family has it, and shards that do not divide the parameters' rows."""
    overrides = {"parallelism.tensor_parallel_degree": degree, "training.global_batch_size": 48, "refine.num_mini_batches": 1}
    config = load_config([f"--model.name={family}", f"--model.flavor={flavor}", *(f"--{k}={v}" for k, v in overrides.items())])
    register_models()
    ranks = 12 * degree
    with virtual_ranks(config, ranks) as parallel_dims:
        model = build_model(config, resolve_args(config.model), parallel_dims)
        held = sum(p.to_local().untyped_storage().nbytes() for p in model.parameters())
        assert parameter_bytes(config, resolve_args(config.model), ranks).weights == held
    needs = memory_needs(config, resolve_args(config.model), ranks, gpu=True)
    assert (needs.weights, needs.gradients, needs.optimizer) == (held, held, 2 * held)


def test_rounds_are_as_large_as_memory_allows(monkeypatch):
    def config(*overrides: str):
        batch = ["--training.seq_len", "1024", "--training.global_batch_size", "8", *overrides]
        return load_config(["--job.config_file", file_of("delta_net"), *batch])

    def largest(gib: float, *overrides: str) -> int:
        return largest_round(config(*overrides), 1, gpu=True, limit=int(gib * 2**30))

    separate = "--refine.scoring_pass", "separate"
    assert largest(0.0) == 1 < largest(0.3) < largest(0.5) < largest(100.0) == 8
    assert largest(0.3, *separate) == 8  # states take less than graphs

    assert plan_rounds(config(), 1) == plan_rounds(config(*separate), 1) == RoundSizes(scored=8, trained=1)
    assert plan_rounds(config("--rollout.microbatches_per_round", "3"), 1) == RoundSizes(3, 3, 3)
    # As on a GPU; the estimate itself runs in a process of its own.
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("refine_titan.estimation.rounds.device_memory", lambda num_ranks: SimpleNamespace(size=10 * 2**30))
    # The estimate does not cover sampled answers.
    rewarded = "--refine.phase", "posttrain", "--posttrain.outer", "reward"
    assert plan_rounds(config(*rewarded), 1) == RoundSizes(scored=1, trained=8, answers=1)
    assert plan_rounds(config(*rewarded, "--rollout.microbatches_per_round", "3"), 1) == RoundSizes(3, 3, 3)


@pytest.mark.slow
def test_what_does_not_fit_is_refused_with_a_setting_that_does():
    file = file_of("delta_net")
    assert estimate(file, "--training.seq_len", "1024", "--device-memory", "8").returncode == 0
    result = estimate(file, "--training.seq_len", "2048", "--device-memory", "0.15", "--reserve", "0")
    assert result.returncode == 1
    assert "the run does not fit: a rank needs" in result.stderr
    assert "activation_checkpoint.mode = 'full' needs" in result.stderr
    again = estimate(
        file, "--training.seq_len", "2048", "--device-memory", "0.15", "--reserve", "0", "--activation_checkpoint.mode", "full"
    )
    assert again.returncode == 0, again.stdout + again.stderr


@pytest.mark.slow
def test_wrong_settings_of_the_tool_are_named():
    result = estimate(file_of("delta_net"), "--ranks", "0")
    assert result.returncode == 1 and "--ranks is 0; allowed: above 0" in result.stderr
    result = estimate(file_of("delta_net"), "--ranks", "3", "--parallelism.tensor_parallel_degree", "2")
    assert result.returncode == 1 and "must be the number of processes, 3" in result.stderr
