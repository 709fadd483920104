"""Whole runs in processes of their own: files, determinism, resuming after SIGKILL, equal forms, several ranks."""

import itertools
import json
import shutil
import signal
import tomllib
from pathlib import Path

import pytest
from safetensors.torch import load_file

from refine_titan.models import FAMILIES
from refine_titan.models.sizes import resolve_flavor
from tests.checkpoints import write_full_size_start
from tests.here import train_here
from tests.integration_tests.runs import REPOSITORY, assert_finished, losses, train, train_side_by_side

SLOW = pytest.mark.slow
# `arms.toml` and its like are no runs: they say what an experiment changes in one.
CONFIGS = sorted(path for path in (REPOSITORY / "train_configs").rglob("*.toml") if not path.name.startswith("arms"))


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "Läufe mit 漢字, 'Nr. 1'"  # a name that people give
    assert_finished(train(folder))
    return folder


def test_run_writes_what_a_researcher_reads(finished_run):
    records = [json.loads(line) for line in (finished_run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 7))
    for record in records:
        assert record["rollout/reward_std"] > 0 and record["timing/tokens_per_second"] > 0 and 0 <= record["rollout/match_mean"] <= 1
        assert record["rollout/logprob_gap_max"] < 1e-4
        assert {f"timing/{stage}" for stage in ("score", "select", "rollout", "rescore", "reward", "update", "total")} <= record.keys()
        assert record["loss_metrics/global_avg_loss"] == pytest.approx(record["refine/ntp_loss"] + 0.2 * record["refine/pg_loss"], abs=1e-9)
    assert records[-1]["refine/ntp_loss"] < records[0]["refine/ntp_loss"]
    rollouts = [json.loads(line) for line in (finished_run / "rollouts.jsonl").read_text().splitlines()]
    assert len(rollouts) == 6 * 8
    for rollout in rollouts:
        assert len(rollout["rollout_tokens"]) == len(rollout["truth_tokens"]) == 3
        assert rollout["prefix_tail"] and rollout["position"] >= 20
    assert json.loads((finished_run / "config.json").read_text())["refine"]["num_chunks"] == 4
    versions = json.loads((finished_run / "versions.json").read_text())
    assert versions["packages"]["torch"].startswith("2.13.0") and versions["git_commit"]
    assert (finished_run / "checkpoint" / "step-6" / ".metadata").is_file()


def test_another_seed_gives_another_run(finished_run, tmp_path):
    """The same seed gives the same bits: `test_killed_run_goes_on_bitwise`, whose second process begins at step 1."""
    assert_finished(train(tmp_path, "--debug.seed", "7", "--training.steps", "1"))
    assert losses(tmp_path)[0] != losses(finished_run)[0]


@pytest.mark.parametrize(
    "fault, last_checkpoint", [pytest.param("update:5", 4, marks=SLOW), pytest.param("checkpoint:4", 2, marks=SLOW), ("checkpoint:2", None)]
)
def test_killed_run_goes_on_bitwise(finished_run, tmp_path, fault, last_checkpoint):
    killed = train(tmp_path, fault=fault)
    assert killed.returncode == -signal.SIGKILL
    complete = [path.parent.name for path in (tmp_path / "checkpoint").glob("step-*/.metadata")]
    assert (f"step-{last_checkpoint}" in complete) if last_checkpoint else not complete
    if fault.startswith("checkpoint"):
        half_written = tmp_path / "checkpoint" / f"step-{fault.split(':')[1]}"
        assert half_written.is_dir() and not (half_written / ".metadata").exists()
    resumed = train(tmp_path)
    assert_finished(resumed)
    assert f"Training starts at step {(last_checkpoint or 0) + 1}" in resumed.stdout
    assert losses(tmp_path) == losses(finished_run)
    assert (tmp_path / "rollouts.jsonl").read_text() == (finished_run / "rollouts.jsonl").read_text()


def test_run_stopped_by_a_signal_goes_on_bitwise(finished_run, tmp_path):
    """The first part of the run has its data from a worker process, the second from its own."""
    stopped = train(tmp_path, "--data.batches_ahead", "2", fault="stop:3")
    assert stopped.returncode == 75, stopped.stderr
    assert "SIGTERM: the run has stopped after step 3 of 6. The same command goes on." in stopped.stdout
    assert (tmp_path / "checkpoint" / "step-3" / ".metadata").is_file()  # not one of checkpoint.interval
    resumed = train(tmp_path)
    assert_finished(resumed)
    assert "Training starts at step 4" in resumed.stdout
    assert losses(tmp_path) == losses(finished_run)


@pytest.mark.slow
def test_run_whose_folder_disappears_goes_on_in_a_new_one(finished_run, tmp_path):
    folder = tmp_path / "run"
    result = train(folder, fault="vanish:4")
    assert_finished(result)
    assert (
        "metrics.jsonl has been removed or moved while it was written: what follows goes into a new file there"
        in result.stdout + result.stderr
    )
    assert losses(folder) == losses(finished_run)[3:6]
    resumed = train(folder, "--training.steps", "7")
    assert_finished(resumed)
    assert "Training starts at step 7" in resumed.stdout and [record["step"] for record in losses(folder)] == [4, 5, 6, 7]


@pytest.mark.slow
def test_clock_that_goes_backwards_changes_nothing(finished_run, tmp_path):
    assert_finished(train(tmp_path, "--metrics.enable_tensorboard", "--training.steps", "4", fault="clock:2"))
    assert_finished(train(tmp_path, "--metrics.enable_tensorboard", fault="clock:5"))
    assert losses(tmp_path) == losses(finished_run)[:6]
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(record["timing/total"] > 0 and record["timing/tokens_per_second"] > 0 for record in records)


@pytest.mark.slow
def test_signal_to_a_run_without_checkpoints_is_an_error(tmp_path):
    stopped = train(tmp_path, "--checkpoint.no-enable", fault="stop:1")
    assert_refused(stopped, "SIGTERM: the run has stopped after step 1 of 6, and cannot go on: checkpoint.enable is False")


@pytest.mark.slow
def test_data_begin_anew_once_however_often_the_same_command_is_started(tmp_path):
    whole, parts, anew = tmp_path / "whole", tmp_path / "parts", ["--checkpoint.exclude_from_loading", "dataloader"]
    assert_finished(train(whole, "--training.steps", "2"))
    shutil.copytree(whole, parts)
    assert_finished(train(whole, *anew))
    assert train(parts, *anew, fault="update:4").returncode == -signal.SIGKILL  # after its first step, before its first checkpoint
    assert train(parts, *anew, fault="stop:4").returncode == 75
    resumed = train(parts, *anew)
    assert_finished(resumed)
    assert "Goes on with the data as begun anew at step 3" in resumed.stdout + resumed.stderr
    assert losses(parts) == losses(whole) and [record["step"] for record in losses(whole)] == list(range(1, 7))


def test_finished_run_says_that_nothing_was_trained_and_can_be_extended(finished_run):
    again = train_here(finished_run)
    assert_finished(again)
    assert "Nothing was trained" in again.stdout
    assert len(losses(finished_run)) == 6
    before = losses(finished_run)
    assert_finished(train(finished_run, "--training.steps", "7"))
    after = losses(finished_run)
    assert after[:6] == before and [record["step"] for record in after] == list(range(1, 8))


@SLOW
def test_initial_checkpoint_is_loaded_even_after_a_kill_in_the_first_write(tmp_path):
    start = tmp_path / "start"
    assert_finished(train(start, "--training.steps", "2"))
    load = ["--checkpoint.initial_load_path", str(start / "checkpoint" / "step-2")]
    assert_finished(train(tmp_path / "expected", *load))
    assert train(tmp_path / "killed", *load, fault="checkpoint:2").returncode == -signal.SIGKILL
    assert_finished(train(tmp_path / "killed", *load))
    assert losses(tmp_path / "killed") == losses(tmp_path / "expected")
    assert losses(tmp_path / "expected")[0]["refine/ntp_loss"] < losses(start)[0]["refine/ntp_loss"] - 0.1


@pytest.mark.slow
def test_scoring_pass_as_training_forward_gives_the_same_training(tmp_path):
    one_update = ["--refine.num_mini_batches", "1", "--training.steps", "3"]
    assert_finished(train(tmp_path / "separate", *one_update, "--refine.scoring_pass", "separate"))
    assert_finished(train(tmp_path / "training", *one_update, "--refine.scoring_pass", "training"))
    for a, b in zip(losses(tmp_path / "separate"), losses(tmp_path / "training")):
        assert a["rollout/match_mean"] == b["rollout/match_mean"]
        # the two forms sum in another order; three AdamW steps amplify float32 rounding
        assert a["loss_metrics/global_avg_loss"] == pytest.approx(b["loss_metrics/global_avg_loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_ntp_objective_takes_the_same_steps_on_the_same_batches(finished_run, tmp_path):
    assert_finished(train(tmp_path, "--refine.objective", "ntp"))
    baseline, refine = losses(tmp_path), losses(finished_run)
    assert len(baseline) == 6
    assert baseline[0]["refine/pg_loss"] is None and baseline[0]["rollout/reward_mean"] is None
    # The first mini-batch has the same weights and data; rollouts do not enter its next-token loss.
    assert baseline[0]["refine/ntp_loss"] == pytest.approx(refine[0]["refine/ntp_loss"], rel=1e-2)
    assert baseline[-1]["refine/ntp_loss"] < baseline[0]["refine/ntp_loss"]


OPTIONS = {
    "positions and samples": ["--refine.rollouts_per_position", "3", "--refine.reward", "hybrid"],
    "sequence groups of samples": ["--refine.rollouts_per_position", "2", "--refine.advantage_group", "sequence"],
    "greedy argmax": ["--refine.selection", "argmax", "--refine.temperature", "0", "--refine.reward", "binary"],
    "penalties": ["--refine.kl_coef", "0.1", "--refine.entropy_coef", "0.01", "--refine.selection", "uniform"],
    "checkpointed activations": ["--activation_checkpoint.mode", "full"],
    "every second block checkpointed": ["--activation_checkpoint.mode", "selective", "--refine.num_mini_batches", "1"],
    "selected operators checkpointed": ["--activation_checkpoint.mode", "selective", "--activation_checkpoint.selective_ac_option", "op"],
    "bfloat16": ["--training.mixed_precision_param", "bfloat16"],
    "packed short documents": ["--data.source", "python-stdlib", "--data.min_document_tokens", "100", "--data.long_documents", "split"],
    "fast weights, checkpointed activations": ["--model.name", "lact", "--activation_checkpoint.mode", "full"],
    "fast weights, checkpointed and continued": [
        "--model.name",
        "lact",
        "--activation_checkpoint.mode",
        "full",
        "--refine.num_mini_batches",
        "1",
    ],
    "fast weights, short documents in bfloat16": [
        "--model.name",
        "lact",
        "--training.mixed_precision_param",
        "bfloat16",
        "--data.source",
        "python-stdlib",
        "--data.min_document_tokens",
        "100",
        "--data.long_documents",
        "split",
    ],
    "raw advantages": ["--refine.no-divide_advantage_by_std", "--refine.selection", "argmin"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_options_train(tmp_path, name):
    assert_finished(train(tmp_path, *OPTIONS[name], "--training.steps", "3"))
    records = losses(tmp_path)
    assert len(records) == 3 and records[-1]["refine/ntp_loss"] < records[0]["refine/ntp_loss"]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_run_that_chooses_activation_checkpointing_trains_as_with_its_choice(tmp_path, ranks):
    steps = ["--training.steps", "2", "--refine.num_mini_batches", "1"]
    result = train(tmp_path / "auto", *steps, "--activation_checkpoint.mode", "auto", ranks=ranks, threads=1)
    assert_finished(result)
    assert "Activation checkpointing: none (the first that fits: a rank's peak is none" in result.stdout + result.stderr
    assert json.loads((tmp_path / "auto" / "config.json").read_text())["activation_checkpoint"]["mode"] == "none"
    assert_finished(train(tmp_path / "none", *steps, ranks=ranks, threads=1))
    assert losses(tmp_path / "auto") == losses(tmp_path / "none")


def test_step_without_a_finite_gradient_is_skipped_counted_and_reported(tmp_path):
    result = train(tmp_path, "--refine.ntp_coef", "1e38", "--training.steps", "2")
    assert_finished(result)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["refine/skipped_updates"] for record in records] == [2, 2]
    assert records[0]["grad_norm"] is None and records[0]["refine/weight_version"] == records[1]["refine/weight_version"] == 0
    assert "optimizer steps skipped:    4" in result.stdout and "this optimizer step is skipped" in result.stdout


@SLOW
def test_hugging_face_checkpoint_out_and_in(tmp_path):
    """torchtitan's own HF saving and loading through the family's adapter: a run starts where the exported one ended."""
    weights_only = ["--checkpoint.last_save_in_hf", "--checkpoint.last_save_model_only", "--training.steps", "2"]
    assert_finished(train(tmp_path / "first", *weights_only))
    exported = tmp_path / "first" / "checkpoint" / "step-2"
    names = set(load_file(next(exported.glob("*.safetensors"))))
    assert {"lm_head.weight", "model.embeddings.weight", "model.layers.3.attn.q_conv1d.weight"} <= names
    config = {"model_type": "delta_net", "vocab_size": 288, "hidden_size": 256, "num_hidden_layers": 4, "num_heads": 4, "hidden_ratio": 3}
    (exported / "config.json").write_text(json.dumps(config))
    start = ["--checkpoint.initial_load_in_hf", "--checkpoint.initial_load_path", str(exported), "--optimizer.lr", "0"]
    assert_finished(train(tmp_path / "second", *start, "--training.steps", "1"))
    assert_finished(train(tmp_path / "third", "--training.steps", "3"))
    # Same weights; the third run's third batch is another one, so losses are near, and far from an untrained model's.
    assert losses(tmp_path / "second")[0]["refine/ntp_loss"] < losses(tmp_path / "third")[0]["refine/ntp_loss"] - 0.5


@pytest.mark.parametrize(
    "family, scoring_pass",
    [
        pytest.param(*case, marks=[] if case in (("delta_net", "training"),) else SLOW)
        for case in itertools.product(FAMILIES, ("training", "separate"))
    ],
)
def test_two_ranks_give_the_losses_of_one(tmp_path, family, scoring_pass):
    greedy = [
        "--refine.selection",
        "argmax",
        "--refine.temperature",
        "0",
        "--refine.num_mini_batches",
        "1",
        "--data.shuffle_buffer",
        "1",
        "--training.steps",
        "3",
        "--refine.scoring_pass",
        scoring_pass,
        "--model.name",
        family,
        *(["--model.options", "newton_schulz_dtype=float32"] if family == "lact" else []),
    ]
    assert_finished(train(tmp_path / "one", *greedy))
    assert_finished(train(tmp_path / "two", *greedy, ranks=2))
    for one, two in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        for name in ("loss_metrics/global_avg_loss", "refine/ntp_loss", "rollout/reward_mean", "rollout/match_mean", "grad_norm"):
            assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name


@SLOW
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_on_two_ranks_stays_near_float32(tmp_path, family):
    """FSDP2's mixed precision, with the modules that stay float32."""
    common = ["--training.steps", "2", "--model.name", family, "--refine.num_mini_batches", "1"]
    assert_finished(train(tmp_path / "float32", *common, ranks=2))
    assert_finished(train(tmp_path / "bfloat16", *common, "--training.mixed_precision_param", "bfloat16", ranks=2))
    checkpointed = ["--training.mixed_precision_param", "bfloat16", "--activation_checkpoint.mode", "full"]
    assert_finished(train(tmp_path / "checkpointed", *common, *checkpointed, ranks=2))
    assert losses(tmp_path / "checkpointed") == losses(tmp_path / "bfloat16")
    for exact, low in zip(losses(tmp_path / "float32"), losses(tmp_path / "bfloat16"), strict=True):
        # eight bits: losses near 5 within one percent
        assert low["refine/ntp_loss"] == pytest.approx(exact["refine/ntp_loss"], rel=1e-2)


@pytest.mark.parametrize("family", ["lact", *(pytest.param(name, marks=SLOW) for name in FAMILIES if name not in ("delta_net", "lact"))])
def test_every_family_trains_and_resumes(tmp_path, family):
    options = ["--model.name", family]
    whole, first = ((tmp_path / name, *options, "--training.steps", steps) for name, steps in (("whole", "3"), ("parts", "2")))
    for result in train_side_by_side(whole, first):
        assert_finished(result)
    assert_finished(train(tmp_path / "parts", *options, "--training.steps", "3", threads=1))
    records = losses(tmp_path / "whole")
    assert records[-1]["refine/ntp_loss"] < records[0]["refine/ntp_loss"] - 0.3
    assert losses(tmp_path / "parts") == records


def assert_refused(result, message: str) -> None:
    output = result.stdout + result.stderr
    assert result.returncode == 1 and "error: " in result.stderr and message in output, output[-3000:]
    assert "Traceback" not in output


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["--training.global_batch_size", "0"], "training.global_batch_size is 0; allowed: -1 or at least 1"),
        (["--training.global_batch_size", "3", "--training.local_batch_size", "2"], "must be a multiple of"),
        (["--refine.num_mini_batches", "4"], "refine.num_mini_batches is 4, but a batch has 2 microbatch(es)"),
        (["--parallelism.data_parallel_shard_degree", "3"], "must be the number of processes, 1"),
        (["--data.source", "nowhere.jsonl"], "no such file or folder"),
        (["--data.min_document_tokens", "2000"], "data.min_document_tokens is 2000"),
        (["--checkpoint.initial_load_path", "nowhere"], "checkpoint.initial_load_path is 'nowhere'"),
        (["--checkpoint.no-enable", "--checkpoint.load_step", "2"], "checkpoint.load_step is 2, but checkpoint.enable is false"),
        (["--model.flavor", "2B"], "model.flavor is '2B'; delta_net has: debug, 340M, 1.3B"),
        (["--optimizer.lr", "inf"], "optimizer.lr is inf; allowed: a finite number"),
    ],
)
def test_wrong_run_is_refused_by_the_run_and_by_the_dry_run(tmp_path, monkeypatch, overrides, message):
    monkeypatch.setenv("NGPU", "1")  # a dry run would take the parallel degrees for the processes that are meant
    for mode in (["--dry-run"], []):
        assert_refused(train_here(tmp_path / "run", *overrides, *mode), message)


def test_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for mode in (["--dry-run"], []):
        assert_refused(train_here(tmp_path / "file" / "run", *mode), "error: job.dump_folder")


def test_second_process_in_a_folder_is_refused(tmp_path):
    from refine_titan.monitoring.run_folder import FolderLock

    lock = FolderLock(tmp_path)
    assert_refused(train(tmp_path), "is already training in")
    lock.release()


def test_resuming_refuses_what_it_cannot_continue(tmp_path):
    """One finished run, and every way in which it cannot go on; nothing of it may be lost."""
    assert_finished(train(tmp_path, "--training.steps", "4", "--checkpoint.keep_latest_k", "0"))
    notes = tmp_path / "checkpoint" / "step-4-notes"
    notes.mkdir()
    (notes / "read.me").write_text("mine")
    (tmp_path / "checkpoint" / "step-log.txt").write_text("mine")
    before = losses(tmp_path)
    config = (tmp_path / "config.json").read_text()
    more = ["--training.steps", "6"]
    assert_refused(train_here(tmp_path, *more, "--debug.seed", "7"), "debug.seed is 7; allowed: 42, with which the run in")
    assert_refused(train_here(tmp_path, *more, "--model.flavor", "340M"), "step-4 is another delta_net: vocab_size 288 (flavor: 32000)")
    assert_refused(train_here(tmp_path, *more, "--data.source", "python-stdlib"), "data.source has other files")
    assert_refused(train_here(tmp_path, *more, "--checkpoint.load_step", "2"), "goes on to step 4")
    assert_refused(train_here(tmp_path, *more, "--checkpoint.load_step", "3"), "has the steps [2, 4]")
    assert_refused(train_here(tmp_path, *more, "--checkpoint.no-enable"), "holds the records of a run without")
    data_file = tmp_path / "checkpoint" / "step-4" / "__0_0.distcp"
    content = data_file.read_bytes()
    data_file.write_bytes(content[:1000])
    assert_refused(train_here(tmp_path, *more), "step-4 is damaged: __0_0.distcp is truncated: it has 1,000 bytes, the metadata says")
    data_file.write_bytes(content)
    two_ranks = train(tmp_path, *more, "--refine.num_mini_batches", "1", ranks=2)
    assert two_ranks.returncode != 0 and "data position of 1 stream(s), this run has 2" in two_ranks.stderr
    assert losses(tmp_path) == before and (tmp_path / "config.json").read_text() == config
    assert (notes / "read.me").read_text() == "mine"
    resumed = train(tmp_path, *more, "--optimizer.lr", "5e-4", "--metrics.log_freq", "2")
    assert_finished(resumed)
    output = resumed.stdout + resumed.stderr
    assert "Changed settings apply from step 5 on: optimizer.lr: 0.001 -> 0.0005; training.steps: 4 -> 6" in output
    assert "The learning-rate schedule of the changed settings takes over at step 5" in output
    assert losses(tmp_path)[:4] == before and len(losses(tmp_path)) == 6
    learning_rates = [json.loads(line)["lr"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert learning_rates == 4 * [1e-3] + 2 * [5e-4]


def test_finished_run_of_weights_only_is_refused_with_the_way_out(tmp_path):
    assert_finished(train(tmp_path, "--training.steps", "1", "--checkpoint.last_save_model_only"))
    assert_refused(train_here(tmp_path, "--training.steps", "2"), "holds weights only and cannot be resumed")


def test_hugging_face_start_of_another_size_is_refused(oracles, tmp_path):
    start = ["--checkpoint.initial_load_in_hf", "--checkpoint.initial_load_path", str(oracles / "delta_net")]
    assert_refused(train_here(tmp_path, *start), "is not a delta_net debug: vocab_size 128 (flavor: 288)")


def test_dry_run_describes_and_writes_nothing(tmp_path):
    result = train_here(tmp_path / "run", "--dry-run", "--data.batches_ahead", "1")
    assert_finished(result)
    assert "synthetic, the batches of 1 step(s) made in advance by a process beside each rank" in result.stdout
    assert "2,787,840 parameters" in result.stdout and "1,024 tokens per step" in result.stdout
    assert "synthetic:" in result.stdout and not (tmp_path / "run").exists()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_resolves(config, tmp_path):
    """As it is; where a file leaves the folder of weights and tokenizer to its user, with one of the model's full size."""
    from refine_titan.validation import load_config

    model = tomllib.loads(config.read_text())["model"]
    provided = []
    if "hf_assets_path" in model:
        start = write_full_size_start(tmp_path / "start", resolve_flavor(model["name"], model["flavor"]))
        provided = ["--model.hf_assets_path", str(start)]
    assert load_config(["--job.config_file", str(config), *provided]).job.dump_folder


@pytest.mark.slow
def test_epochs_go_on_to_the_bit(tmp_path):
    """One epoch, then a second in the same folder, train as two at once."""
    source = tmp_path / "words.jsonl"
    source.write_text("".join(json.dumps({"text": f"{i} " + "some words " * (40 + i % 30)}) + "\n" for i in range(30)))
    data = ["--data.source", str(source), "--data.min_document_tokens", "200"]
    for epochs, name in (("1", "parts"), ("2", "parts"), ("2", "whole")):
        assert_finished(train(tmp_path / name, *data, "--training.epochs", epochs))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    settings = json.loads((tmp_path / "whole" / "config.json").read_text())["training"]
    assert settings["epochs"] == 2 and settings["steps"] == losses(tmp_path / "whole")[-1]["step"] > 10
