"""Settings: what is refused, with which words; documentation and files that must stay current."""

import re
import subprocess
from pathlib import Path

import pytest

from refine_titan.config.bounds import check_bounds
from refine_titan.config.reading import PATHS, read_config
from refine_titan.config.sections import JobConfig, Refine
from refine_titan.config.user_paths import user_path
from refine_titan.errors import UserError
from refine_titan.validation import load_config
from tools.generate_configuration_docs import render

REPOSITORY = Path(__file__).parents[3]


def load(tmp_path, toml="", *overrides):
    path = tmp_path / "run.toml"
    path.write_text(toml)
    return load_config(["--job.config_file", str(path), *overrides])


def test_command_line_beats_toml_beats_defaults(tmp_path):
    config = load(tmp_path, "[refine]\nnum_chunks = 4\nrollout_length = 3\n", "--refine.num_chunks", "2")
    assert (config.refine.num_chunks, config.refine.rollout_length, config.refine.reward) == (2, 3, "cosine")
    assert config.optimizer.lr == 1e-6 and config.optimizer.beta2 == 0.999


@pytest.mark.parametrize(
    "toml, message",
    [
        ("[refine]\nnum_chunk = 4", "unknown key 'refine.num_chunk'; did you mean 'refine.num_chunks'"),
        ("[refin]\nnum_chunks = 4", "unknown key 'refin'; did you mean 'refine'"),
        ("[training.dataloader]\nnum_worker = 1", "did you mean 'training.dataloader.num_workers'"),
        ("[refine]\nreward = 'cosin'", "refine.reward is 'cosin'; allowed: 'cosine', 'binary', 'hybrid' (built in"),
        ("[refine]\nselection = 'entropic'", "did you mean 'entropy'"),
        ("[refine]\nnum_chunks = '8'", "refine.num_chunks is '8'; allowed: a whole number"),
        ("[refine]\nnum_chunks = true", "refine.num_chunks is true; allowed: a whole number"),
        ("[data]\nfolder_suffixes = 'txt'", "data.folder_suffixes is 'txt'; allowed: a list of strings"),
        ("refine = 3", "refine is 3, but it is a section: "),
        ("[refine]\nrollout_length = 0", "refine.rollout_length is 0; allowed: at least 1"),
        ("[refine]\nrollout_length = 21", "refine.rollout_length is 21"),
        ("[refine]\nnum_chunks = 100\n[training]\nseq_len = 2048", "refine.num_chunks is 100"),
        ("[refine]\nnum_chunks = 4096\n[training]\nseq_len = 2048", "allowed: at most 49"),
        ("[refine]\nnum_chunks = 1", "compares every rollout with itself only"),
        ("[refine]\nadvantage_group = 'position'", "compares every rollout with itself only"),
        ("[refine]\ntemperature = -1.0", "refine.temperature is -1.0"),
        (
            "[refine]\ntemperature = 0.0\nrollouts_per_position = 3",
            "refine.temperature is 0 with refine.rollouts_per_position = 3 and refine.advantage_group = 'auto'",
        ),
        ("[refine]\nselection_temperature = 0.0", "refine.selection_temperature is 0.0; allowed: above 0"),
        ("[refine]\nclip_low = 1.5", "refine.clip_low"),
        ("[refine]\nscoring_pass = 'training'", "refine.num_mini_batches is 4; allowed with refine.scoring_pass = 'training': 1"),
        (
            "[refine]\nphase = 'ttt'\nscoring_pass = 'training'\nnum_mini_batches = 1\n[ttt]\nbatch_size = 8",
            "ttt.batch_size is 8; allowed with refine.scoring_pass = 'training': at most ttt.mini_batch_size = 4",
        ),
        ("[refine]\nphase = 'pretrain'", "refine.phase is 'pretrain'; allowed: 'midtrain', 'posttrain', 'ttt'"),
        (
            "[refine]\nphase = 'posttrain'\n[posttrain]\nanswer_tokens = 16384",
            "posttrain.answer_tokens is 16384; allowed: below training.seq_len = 16384",
        ),
        ("[refine]\nphase = 'posttrain'\n[posttrain]\nouter = 'reward'\nsamples = 1", "posttrain.samples is 1; allowed: at least 2"),
        (
            "[refine]\nphase = 'posttrain'\n[posttrain]\nouter = 'reward'\ntask = 'hotpotqa'",
            "posttrain.task is 'hotpotqa'; allowed: benchmark/task",
        ),
        ("[refine]\nphase = 'posttrain'\nnum_chunks = 16\n[training]\nseq_len = 670", "refine.num_chunks is 16"),
        ("[refine]\nphase = 'posttrain'\n[data]\nprompt_column = ''", "data.prompt_column is ''; allowed: the name of a column"),
        (
            "[refine]\nphase = 'posttrain'\n[data]\nmin_document_tokens = 16384",
            "allowed: at most training.seq_len - posttrain.answer_tokens = 16352",
        ),
        ("[refine]\nphase = 'ttt'\n[ttt]\nsteps = 0", "ttt.steps is 0; allowed: at least 1"),
        ("[rollout]\nengine = 'sglang'", "rollout.engine is 'sglang'; allowed: 'native', 'vllm'"),
        ("[data]\nmin_document_tokens = 10", "data.min_document_tokens is 10"),
        ("[model]\nname = 'deltanet'", "did you mean 'delta_net'"),
        ("[model]\nflavor = '1.3b'", "did you mean '1.3B'"),
        ("[model]\nhf_assets_path = 'nowhere'", "holds no tokenizer.json"),
        (
            "[parallelism]\npipeline_parallel_degree = 2",
            "degree is 2; allowed: 1 (pipeline parallelism is not supported)",
        ),
        ("[parallelism]\ncontext_parallel_load_balancer = 'headtail'", "context_parallel_load_balancer is 'headtail'; allowed: not set"),
        (
            "[training]\nseq_len = 1000\n[parallelism]\ncontext_parallel_degree = 3",
            "1000 tokens (training.local_batch_size * seq_len), of which a rank needs an equal part of at least 5; allowed: 1, 2, 4, 5, 8",
        ),
        (
            "[model]\nname = 'lact'\nflavor = '760M'\n[training]\nseq_len = 8192\n[parallelism]\ncontext_parallel_degree = 8",
            "at least 2047; allowed: 1, 2, 4",
        ),
        ("[data]\nnum_streams = -1", "data.num_streams is -1; allowed: at least 0"),
        ("[parallelism]\ntensor_parallel_degree = 3", "is 3, but delta_net has heads = 4, MLP channels = 512; allowed: 1, 2, 4"),
        (
            "[model]\nname = 'lact'\nflavor = '760M'\n[parallelism]\ntensor_parallel_degree = 3",
            "but lact has fast-weight heads = 4, vocab_size = 32000, MLP channels = 4096; allowed: 1, 2, 4",
        ),
        ("[model]\nname = 'gated_delta_product'\nflavor = 'debug'\n[parallelism]\ntensor_parallel_degree = 2", "supports 1 only"),
        ("[compile]\nenable = true\ncomponents = ['model', 'loss']", "which leaves no loss function to compile"),
        ("[compile]\nenable = true\nbackend = 'nvcc'", "compile.backend is 'nvcc'; allowed: "),
        (
            "[compile]\nenable = true\n[activation_checkpoint]\nselective_ac_option = 'op'",
            "selective_ac_option is 'op', which cannot see the operators that compile.enable = true compiles",
        ),
        ("[activation_checkpoint]\nselective_ac_option = 'ops'", "selective_ac_option is 'ops'; allowed: 'op', or n for"),
        ("[activation_checkpoint]\nselective_ac_option = '0'", "selective_ac_option is '0'; allowed: 'op', or n for"),
        ("[activation_checkpoint]\nmode = 'memory_budget'", "mode is 'memory_budget'; allowed: 'auto', 'selective', 'full', 'none'"),
        ("[model]\nconverters = ['quantize.linear.mx']", "an interface that torchao 0.18.0 does not have"),
        ("[model]\nconverters = ['quantize.grouped_mm.float8']", "allowed: 'quantize.linear.float8'"),
        ("[training]\ndataset = 'c4'", "training.dataset is 'c4'; allowed: 'c4_test' (use data.source)"),
        ("[checkpoint]\nkeep_latest_k = 1", "checkpoint.keep_latest_k is 1; allowed: 0 or at least 2"),
        (
            "[checkpoint]\nexclude_from_loading = ['optimiser']",
            "['optimiser']; allowed: each 'optimizer', 'lr_scheduler' or 'dataloader'",
        ),
        (
            "[training]\nepochs = 2\n[checkpoint]\nexclude_from_loading = ['optimizer', 'dataloader']",
            "checkpoint.exclude_from_loading has 'dataloader' and training.epochs is 2, whose steps count from the beginning of the data",
        ),
        ("[checkpoint]\nlast_save_in_hf = true", "checkpoint.last_save_model_only is false with checkpoint.last_save_in_hf = true"),
        ("[training]\nsteps = 0", "training.steps is 0; allowed: at least 1"),
        ("[training]\nmax_norm = nan", "training.max_norm is nan; allowed: a finite number"),
        ("[training]\nglobal_batch_size = 0", "training.global_batch_size is 0; allowed: -1 or at least 1"),
        ("[training.dataloader]\nnum_workers = 2", "training.dataloader.num_workers is 2; allowed: 0 (data.batches_ahead has data"),
        ("[lr_scheduler]\ntotal_steps = 50", "lr_scheduler.total_steps is 50; allowed: at least training.steps = 100, or not set"),
        ("[lr_scheduler]\ndecay_ratio = 1.5", "lr_scheduler.decay_ratio is 1.5; allowed: at least 0 and at most 1"),
        ("[comm]\nmode = 'fake_backend'", "comm.mode is 'fake_backend'; allowed: 'default' (ranks have to exchange data)"),
        ("[optimizer]\nbeta2 = 1.0", "optimizer.beta2 is 1.0; allowed: at least 0 and below 1"),
        ("[evaluation]\nlengths = [64, 0]", "evaluation.lengths is [64, 0]; allowed: each at least 1"),
        ("[validation]\nsteps = 0", "validation.steps is 0; allowed: -1 ([evaluation] says what is evaluated)"),
        ("[parallelism]\ncontext_parallel_load_balancer = ''", "context_parallel_load_balancer is ''; allowed: not set"),
        ("[debug]\nseed = -1", "debug.seed is -1; allowed: at least 0"),
        ("[training", "is not valid TOML"),
    ],
)
def test_wrong_setting_is_named_with_what_is_allowed(tmp_path, toml, message):
    with pytest.raises(UserError, match=re.escape(message)):
        load(tmp_path, toml)


def test_missing_file_is_named():
    with pytest.raises(UserError, match="nowhere.toml is not a file"):
        load_config(["--job.config_file", "nowhere.toml"])
    with pytest.raises(UserError, match="--job.config_file is empty; allowed: the path of a TOML file"):
        load_config(["--job.config_file="])


def test_wrong_value_on_the_command_line_is_named_too(tmp_path):
    with pytest.raises(UserError, match="refine.num_chunks is 0; allowed: at least 1"):
        load(tmp_path, "", "--refine.num_chunks", "0")


def test_last_config_file_counts(tmp_path):
    (tmp_path / "first.toml").write_text("[refine]\nnum_chunks = 2")
    assert load(tmp_path, "[refine]\nnum_chunks = 4").refine.num_chunks == 4
    arguments = ["--job.config_file", str(tmp_path / "first.toml"), f"--job.config-file={tmp_path / 'run.toml'}"]
    assert load_config(arguments).refine.num_chunks == 4


def test_defaults_are_within_their_bounds():
    check_bounds(JobConfig())


def test_automatic_advantage_group_follows_the_rollouts_per_position():
    assert Refine().resolved_advantage_group == "sequence"
    assert Refine(rollouts_per_position=2).resolved_advantage_group == "position"
    assert Refine(rollouts_per_position=2, advantage_group="sequence").resolved_advantage_group == "sequence"


def test_groups_of_one_can_be_allowed(tmp_path):
    assert load(tmp_path, "[refine]\nnum_chunks = 1\nallow_groups_of_one = true").refine.allow_groups_of_one


def test_temperature_0_is_allowed_where_different_positions_are_compared(tmp_path):
    assert load(tmp_path, "[refine]\ntemperature = 0.0").refine.temperature == 0
    load(tmp_path, "[refine]\ntemperature = 0.0\nrollouts_per_position = 3\nadvantage_group = 'sequence'")


@pytest.mark.parametrize("toml", ["[ttt]\nbatch_size = 4", "[ttt]\nbatch_size = 8\nsteps = 1"])
def test_scoring_in_the_training_pass_is_judged_by_the_mini_batches_of_test_time(tmp_path, toml):
    load(tmp_path, f"[refine]\nphase = 'ttt'\nscoring_pass = 'training'\n{toml}")


OUTER_STEP_ALONE = "[posttrain]\ninner = false\nouter = 'reward'\n"


@pytest.mark.parametrize(
    "toml, warning",
    [
        ("[refine]\nkl_coef = 0.1\nnum_mini_batches = 1", "refine.kl_coef has no effect with one optimizer step on a batch's rollouts"),
        ("[refine]\nkl_coef = 0.1\nphase = 'ttt'", "refine.kl_coef has no effect with one optimizer step on a batch's rollouts (ttt.steps"),
        (f"{OUTER_STEP_ALONE}[refine]\nkl_coef = 0.1\nphase = 'posttrain'", "refine.kl_coef has no effect with posttrain.inner = false"),
        (f"{OUTER_STEP_ALONE}[refine]\nentropy_coef = 0.1\nphase = 'posttrain'", "refine.entropy_coef has no effect with posttrain.inner"),
        ("[refine]\nkl_coef = 0.1\nentropy_coef = 0.1", None),
        ("[refine]\nkl_coef = 0.1\nphase = 'ttt'\n[ttt]\nbatch_size = 8", None),
        ("[refine]\nentropy_coef = 0.1\nnum_mini_batches = 1", None),
        ("[refine]\nphase = 'ttt'\nnum_mini_batches = 2\n[lr_scheduler]\nwarmup_steps = 2", None),  # of the training's own file
    ],
)
def test_settings_without_effect_are_warned_of(tmp_path, caplog, toml, warning):
    load(tmp_path, toml)
    assert "has no effect" not in caplog.text if warning is None else warning in caplog.text


def test_configuration_page_is_current():
    page = (REPOSITORY / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == render(), "run python tools/generate_configuration_docs.py"


def test_product_names_no_machine_of_its_makers():
    tracked = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    for name in tracked.stdout.split():
        if not name.startswith("tests/"):
            assert "../shared" not in (REPOSITORY / name).read_text(encoding="utf-8"), name


@pytest.mark.parametrize("section, name", PATHS)
def test_home_folder_in_every_setting_that_names_a_place(tmp_path, monkeypatch, section, name):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = read_config([f"--{section}.{name}", "~/place"])
    assert getattr(getattr(config, section), name) == f"{tmp_path}/place"


@pytest.mark.parametrize("tool", ["compare", "convert", "evaluate", "prepare", "report", "reproduce"])
def test_home_folder_on_the_command_lines_of_the_tools(tmp_path, monkeypatch, tool):
    """No shell replaces `~` in `--output=~/x`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert (
        user_path("~/a b") == tmp_path / "a b" and user_path("a~") == Path("a~") and user_path("~no-such-user/x") == Path("~no-such-user/x")
    )
    text = (REPOSITORY / "refine_titan" / "commands" / f"{tool}.py").read_text(encoding="utf-8")
    assert "type=user_path" in text and "type=Path" not in text


def test_home_folder_before_the_config_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my file.toml").write_text("[debug]\nseed = 7\n")
    assert read_config(["--job.config_file=~/my file.toml"]).debug.seed == 7
