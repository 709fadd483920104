"""Layouts of several ranks give the training of one process: from one seed checkpoint, argmax positions, greedy rollouts."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from refine_titan.conversion.dcp_weights import DCPWeights
from refine_titan.models import FAMILIES
from refine_titan.models.sizes import resolve_flavor
from refine_titan.models.stored_tensors import same_bits
from tests.integration_tests.runs import assert_finished, losses, train

SLOW = pytest.mark.slow
# Tokens that no degree divides: sequence parallelism has to pad.
COMMON = [
    "--refine.temperature",
    "0",
    "--refine.selection",
    "argmax",
    "--refine.num_mini_batches",
    "1",
    "--training.steps",
    "5",
    "--training.seq_len",
    "511",
    "--optimizer.lr",
    "1e-4",
    "--data.shuffle_buffer",
    "1",
    "--data.num_streams",
    "2",
]
TENSOR_2 = ["--parallelism.tensor_parallel_degree", "2"]
# Documents of many lengths, so that some cross the borders of shards, in sequences that the ranks can share.
CONTEXT = ["--training.seq_len", "512", "--data.min_document_tokens", "50"]
CONTEXT_2 = ["--parallelism.context_parallel_degree", "2"]
CONTEXT_4 = ["--parallelism.context_parallel_degree", "4"]
VLLM = ["--rollout.engine", "vllm"]
ATTENTION = {"attn": {"layers": [1, 3], "num_heads": 4, "num_kv_heads": 2}}
SHORT = ["--training.steps", "3"]


def model_of(family: str, folder: Path, **options: Any) -> list[str]:
    """The family's debug model, with heads that two ranks can share, in float32 throughout."""
    if family == "gated_delta_net":
        options = {"n_heads": 2, "n_v_heads": 4} | options
    args = replace(resolve_flavor(family, "debug"), **options)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(args.to_hf_config()))
    settings = ["--model.options", "newton_schulz_dtype=float32"] if family == "lact" else []
    return ["--model.name", family, "--model.flavor", str(folder), *settings]


def assert_same_training(found: Path, expected: Path) -> None:
    for ours, theirs in zip(losses(found), losses(expected), strict=True):
        for name, tolerance in (
            ("loss_metrics/global_avg_loss", 1e-5),
            ("rollout/reward_mean", 1e-5),
            ("rollout/reward_hybrid_mean", 1e-5),
            ("rollout/match_mean", 0),
            ("grad_norm", 1e-4),
        ):
            assert ours[name] == pytest.approx(theirs[name], rel=tolerance, abs=tolerance), (ours["step"], name)


def run_layouts(folder: Path, family: str, layouts: dict[str, tuple[int, list[str]]], fault: str = "", **options: Any) -> None:
    """Runs each layout (ranks, settings) from one seed checkpoint; the first one is what the others are compared with. `options` of the
    model; `fault` as in `fault_injection.py`."""
    common = [*COMMON, *model_of(family, folder / "model", **options)]
    assert_finished(train(folder / "seed", *common, "--checkpoint.create_seed_checkpoint"))
    common += ["--checkpoint.initial_load_path", str(folder / "seed" / "checkpoint" / "step-0")]
    for name, (ranks, settings) in layouts.items():
        assert_finished(train(folder / name, *common, *settings, ranks=ranks, fault=fault))
    first, *others = layouts
    for name in others:
        assert_same_training(folder / name, folder / first)


@SLOW
def test_tied_embeddings_under_fsdp_and_tensor_parallelism_are_one_process(tmp_path):
    layouts = {"one": (1, SHORT), "fsdp": (2, SHORT)}
    layouts |= {"tp": (2, [*SHORT, *TENSOR_2]), "fsdp_tp_vllm": (4, [*SHORT, *TENSOR_2, *VLLM])}
    run_layouts(tmp_path, "delta_net", layouts, tie_word_embeddings=True)


@SLOW
def test_tensor_parallel_alone_computes_in_the_precision_of_one_process(tmp_path):
    """Rounding differs with the layout. In float32 the engine and the trainer would differ by less than 1e-4."""
    common = [*COMMON, *SHORT, *model_of("delta_net", tmp_path / "model"), "--training.mixed_precision_param", "bfloat16"]
    assert_finished(train(tmp_path / "seed", *common, "--checkpoint.create_seed_checkpoint"))
    common += ["--checkpoint.initial_load_path", str(tmp_path / "seed" / "checkpoint" / "step-0")]
    for name, ranks, settings in (("one", 1, []), ("tp", 2, TENSOR_2), ("tp_vllm", 2, [*TENSOR_2, *VLLM])):
        assert_finished(train(tmp_path / name, *common, *settings, ranks=ranks))
    for name in ("tp", "tp_vllm"):
        for ours, theirs in zip(losses(tmp_path / name), losses(tmp_path / "one"), strict=True):
            assert ours["loss_metrics/global_avg_loss"] == pytest.approx(theirs["loss_metrics/global_avg_loss"], rel=2e-3) and ours[
                "grad_norm"
            ] == pytest.approx(theirs["grad_norm"], rel=0.05)
            assert 1e-5 < ours["rollout/logprob_gap"]


@pytest.mark.parametrize("family", ["delta_net", pytest.param("kda", marks=SLOW)])
def test_tensor_parallel_is_one_process(tmp_path, family):
    run_layouts(tmp_path, family, {"one": (1, SHORT), "tp": (2, [*SHORT, *TENSOR_2])})


@SLOW
@pytest.mark.parametrize("family", ["delta_net", "gated_delta_net", "lact"])
def test_tensor_parallel_with_and_without_vllm_is_one_process(tmp_path, family):
    run_layouts(tmp_path, family, {"one": (1, []), "tp": (2, TENSOR_2), "tp_vllm": (2, [*TENSOR_2, *VLLM])})
    records = [json.loads(line) for line in (tmp_path / "tp_vllm" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < record["rollout/logprob_gap_max"] < 1e-4 for record in records)


@SLOW
@pytest.mark.parametrize("family", ["delta_net", "gated_delta_net", "lact"])
def test_data_parallel_layouts_are_one_process(tmp_path, family):
    layouts = {"one": (1, []), "fsdp": (2, []), "fsdp_tp": (4, TENSOR_2), "fsdp_tp_vllm": (4, [*TENSOR_2, *VLLM])}
    run_layouts(tmp_path / "two", family, layouts)
    hsdp = ["--parallelism.data_parallel_replicate_degree", "2", "--parallelism.data_parallel_shard_degree", "2"]
    four = ["--training.global_batch_size", "4", "--data.num_streams", "4"]
    run_layouts(tmp_path / "four", family, {"one": (1, four), "hsdp": (4, [*four, *hsdp])})


def test_context_parallel_is_one_process(tmp_path):
    run_layouts(tmp_path, "delta_net", {"one": (1, [*CONTEXT, *SHORT]), "cp": (2, [*CONTEXT, *SHORT, *CONTEXT_2])})


@SLOW
@pytest.mark.parametrize("family", ["delta_net", "gated_delta_net", "lact"])
def test_context_parallel_with_others_is_one_process(tmp_path, family):
    layouts = {"cp": (2, CONTEXT_2), "cp4": (4, CONTEXT_4), "tp_cp": (4, [*TENSOR_2, *CONTEXT_2])}
    layouts |= {"fsdp_cp": (4, CONTEXT_2), "cp_vllm": (2, [*CONTEXT_2, *VLLM])}
    run_layouts(tmp_path, family, {"one": (1, CONTEXT)} | {name: (n, [*CONTEXT, *more]) for name, (n, more) in layouts.items()})


@SLOW
@pytest.mark.parametrize(
    "family, attention",
    [("qwen3_5", {}), ("olmo_hybrid", {}), ("delta_net", ATTENTION), ("gated_delta_net", ATTENTION), ("kda", ATTENTION)],
)
def test_layouts_of_hybrids_are_one_process(tmp_path, family, attention):
    """With attention in even shares, which sequences this short have only if they are made to."""
    layouts = {"one": (1, []), "tp": (2, TENSOR_2), "cp": (2, CONTEXT_2), "fsdp_tp": (4, TENSOR_2), "fsdp_cp": (4, CONTEXT_2)}
    layouts |= {"tp_cp": (4, [*TENSOR_2, *CONTEXT_2])}
    layouts = {name: (ranks, [*CONTEXT, *SHORT, *more]) for name, (ranks, more) in layouts.items()}
    run_layouts(tmp_path, family, layouts, fault="moved:0", **attention)


@SLOW
@pytest.mark.parametrize("family", ["qwen3_5", "olmo_hybrid"])
def test_layouts_of_hybrids_with_vllm_are_one_process(tmp_path, family):
    layouts = {"fsdp": (2, VLLM), "tp": (2, [*TENSOR_2, *VLLM]), "cp": (2, [*CONTEXT_2, *VLLM])}
    run_layouts(tmp_path, family, {"one": (1, CONTEXT)} | {name: (n, [*CONTEXT, *more]) for name, (n, more) in layouts.items()})
    for name in layouts:
        records = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert all(0 < record["rollout/logprob_gap_max"] < 1e-4 for record in records)


@SLOW
@pytest.mark.parametrize("family", ["gated_delta_net", "lact"])
def test_context_parallel_is_one_process_with_several_updates_a_batch(tmp_path, family):
    """The form with one flat stream; a rank of a shard without rollouts, as there are more ranks than chunks."""
    several = [
        *CONTEXT,
        "--refine.num_mini_batches",
        "2",
        "--training.global_batch_size",
        "2",
        "--refine.num_chunks",
        "2",
        "--refine.rollouts_per_position",
        "2",
        "--training.local_batch_size",
        "1",
    ]
    run_layouts(tmp_path, family, {"one": (1, several), "cp4": (4, [*several, *CONTEXT_4])})


@SLOW
def test_checkpoint_of_one_layout_resumes_under_another(tmp_path):
    """Weights, optimizer and data position go over: a run that changes its layout at every checkpoint is one process."""
    common = [*COMMON, *model_of("lact", tmp_path / "model"), *CONTEXT, "--checkpoint.interval", "1"]
    assert_finished(train(tmp_path / "one", *common))
    moved = tmp_path / "moved"
    for step, (ranks, layout) in enumerate([(2, []), (1, []), (2, TENSOR_2), (4, CONTEXT_2), (1, [])], start=1):
        assert_finished(train(moved, *common, *layout, "--training.steps", str(step), ranks=ranks))
    assert_same_training(moved, tmp_path / "one")


@SLOW
def test_weights_are_the_same_bits_under_another_layout(tmp_path):
    """A step that changes nothing, after a change of the layout."""
    common = [*COMMON, *model_of("gated_delta_net", tmp_path / "model"), *CONTEXT, "--optimizer.lr", "0"]
    for step, (ranks, layout) in enumerate([(1, []), (2, []), (2, TENSOR_2), (4, CONTEXT_2), (1, [])], start=1):
        assert_finished(train(tmp_path, *common, *layout, "--training.steps", str(step), ranks=ranks))
    first, *others = (DCPWeights(tmp_path / "checkpoint" / f"step-{step}") for step in range(1, 6))
    for weights in others:
        assert weights.tensors.keys() == first.tensors.keys()
        assert all(same_bits(weights.read(name), first.read(name)) for name in first.tensors)


def test_families_that_tensor_parallelism_leaves_out_are_the_ones_documented():
    assert [name for name in FAMILIES if not resolve_flavor(name, "debug").tensor_parallel_sizes()] == ["gated_delta_product"]
