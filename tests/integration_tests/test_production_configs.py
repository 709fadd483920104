"""The production files at their full size: they resolve, build on the meshes they are meant for and on far larger ones, and are
refused with a word about what a user has to provide."""

import re
import tomllib
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor
from torchtitan.protocols.train_spec import get_train_spec

from refine_titan.distributed.shards import parameter_bytes
from refine_titan.errors import UserError
from refine_titan.estimation.virtual_ranks import build_model, ranks_of, virtual_ranks
from refine_titan.models import build_decoder
from refine_titan.models.sizes import resolve_args, resolve_flavor
from refine_titan.registration import register_models
from refine_titan.validation import load_config
from tests.checkpoints import write_full_size_start
from tests.integration_tests.runs import REPOSITORY, assert_finished, train

FILES = sorted((REPOSITORY / "train_configs").glob("midtrain_*.toml"))
ONE_NODE = [path for path in FILES if path.stem in ("midtrain_delta_net_1.3B", "midtrain_gated_delta_net_1.3B", "midtrain_lact_760M")]


def name_of(value) -> str | None:
    return value.stem if isinstance(value, Path) else None


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """The folder that a file's `model.hf_assets_path` stands for, at full size; made once a model."""
    folder, made = tmp_path_factory.mktemp("starts"), {}

    def make(path: Path) -> Path:
        model = tomllib.loads(path.read_text())["model"]
        key = (model["name"], model["flavor"])
        if key not in made:
            made[key] = write_full_size_start(folder / "-".join(key), resolve_flavor(*key))
        return made[key]

    return make


def load(path: Path, start, *overrides: str):
    files = ["--job.config_file", str(path), "--model.hf_assets_path", str(start(path))]
    return load_config([*files, "--activation_checkpoint.mode", "full", *overrides])  # what a rank holds is the same with every mode


def on_ranks(path: Path, start, num_ranks: int):
    """The file with as many copies of its shards as give `num_ranks` ranks, and a batch of one microbatch a mini-batch, dealt
    from one stream a rank."""
    config = load(path, start)
    parallelism = config.parallelism
    copies = parallelism.data_parallel_replicate_degree * num_ranks // ranks_of(config)
    sequences = num_ranks // (parallelism.tensor_parallel_degree * parallelism.context_parallel_degree)
    sequences *= config.training.local_batch_size * config.refine.num_mini_batches
    overrides = {"parallelism.data_parallel_replicate_degree": copies, "training.global_batch_size": sequences, "data.num_streams": 0}
    return load(path, start, *(f"--{name}={value}" for name, value in overrides.items()))


def check_build(config, num_ranks: int) -> None:
    """Builds the model with the run's parallelism and its optimizer, as rank 0 of `num_ranks`, and compares what that rank holds
    with what the estimate counts without meshes."""
    register_models()
    args = resolve_args(config.model)
    replicas = config.parallelism.data_parallel_replicate_degree
    with virtual_ranks(config, num_ranks) as parallel_dims:
        model = build_model(config, args, parallel_dims)
        parameters = list(model.parameters())
        spec = get_train_spec(config.model.name)
        optimizers = spec.build_optimizers_fn([model], config.optimizer, parallel_dims)
        assert sum(len(group["params"]) for o in optimizers for group in o.param_groups) == len(parameters)
        assert all(isinstance(p, DTensor) and p.device_mesh.size() == num_ranks for p in parameters)
        assert {p.device_mesh.mesh_dim_names for p in parameters} == {("dp_replicate", "fsdp") if replicas > 1 else ("fsdp",)}
        assert {p.to_local().dtype for p in parameters} == {torch.float32}
        assert sum(p.to_local().nbytes for p in parameters) == parameter_bytes(config, args, num_ranks).weights
        with torch.device("meta"):
            assert sum(p.numel() for p in parameters) == sum(p.numel() for p in build_decoder(args).parameters())


@pytest.mark.parametrize("path", [p if p in ONE_NODE else pytest.param(p, marks=pytest.mark.slow) for p in FILES], ids=name_of)
def test_file_builds_at_full_size_on_its_own_ranks(path, start):
    config = load(path, start)
    check_build(config, ranks_of(config))


@pytest.mark.parametrize("num_ranks", [512, 4096])
@pytest.mark.parametrize("path", [p if p in ONE_NODE else pytest.param(p, marks=pytest.mark.slow) for p in FILES], ids=name_of)
def test_file_builds_at_full_size_on_many_ranks(path, num_ranks, start):
    check_build(on_ranks(path, start, num_ranks), num_ranks)


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_file_says_what_its_user_has_to_provide(path, start, tmp_path):
    with pytest.raises(UserError, match="model.hf_assets_path is './assets/.*', which holds no tokenizer.json; allowed: a folder"):
        load_config(["--job.config_file", str(path)])
    result = train(tmp_path, "--dry-run", "--model.hf_assets_path", str(start(path)), config=path)
    assert result.returncode == 1 and result.stderr.count("error:") == 1
    assert "data.source is './data/long_documents': no such file or folder" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_dry_run_of_a_file_describes_the_whole_run(path, start, tmp_path):
    result = train(tmp_path, "--dry-run", "--model.hf_assets_path", str(start(path)), "--data.source", "synthetic", config=path)
    assert_finished(result)
    assert (
        re.search(r"128 sequence\(s\) of 16384 tokens|16 sequence\(s\) of 131072 tokens", result.stdout)
        and "built:      at full size" in result.stdout
    )
    engine = "native" if "qwen3_5" in path.stem else "vllm"  # which does not run layers of attention
    assert "4 optimizer step(s) per batch, 100 steps" in result.stdout and f"engine {engine}" in result.stdout
