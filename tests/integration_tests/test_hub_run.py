"""Runs that name model, tokenizer and data of the Hub: two ranks download once, runs resume at their commits, a mistake is one line."""

import io
import json

import datasets
import pytest

from refine_titan.config.sections import JobConfig
from refine_titan.conversion.byte_tokenizer import byte_tokenizer_files
from refine_titan.models.sizes import resolve_args
from tests.checkpoints import random_weights, write_hf_folder
from tests.hub_server import environment, serving
from tests.integration_tests.runs import assert_finished, losses, train

MODEL, DATA = "owner/model", "owner/words"
NAMES = ["--model.flavor", MODEL, "--model.hf_assets_path", MODEL, "--checkpoint.initial_load_path", MODEL, "--data.source", DATA]
NAMES += ["--data.min_document_tokens", "200", "--refine.num_mini_batches", "1"]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with serving() as server:
        for name, value in environment(server, tmp_path / "cache").items():
            monkeypatch.setenv(name, value)
        yield server


def publish(hub, folder, seed: int) -> tuple[str, str]:
    """Publishes a model and a data set; returns their commits."""
    args = resolve_args(JobConfig().model)
    write_hf_folder(folder, args, random_weights(args, seed=seed))
    for name, content in byte_tokenizer_files().items():
        (folder / name).write_bytes(content)
    content = io.BytesIO()
    texts = [f"{seed} {i} " + "some words " * (30 + i % 30) for i in range(60)]
    datasets.Dataset.from_dict({"text": texts}).to_parquet(content)
    return hub.put(MODEL, folder), hub.put(DATA, {"train.parquet": content.getvalue()}, "datasets")


@pytest.mark.slow
def test_two_ranks_start_from_names_and_resume_at_their_commits(hub, tmp_path):
    model, data = publish(hub, tmp_path / "published", seed=1)
    assert_finished(train(tmp_path / "parts", *NAMES, "--training.steps", "2", ranks=2))
    assert hub.requests.count("GET /api/models/owner/model") == 1  # rank 0 alone finds the commit
    weights = len((tmp_path / "published" / "model.safetensors").read_bytes())
    assert hub.served["model.safetensors"] == weights and hub.served["tokenizer.json"] > 0
    settings = json.loads((tmp_path / "parts" / "config.json").read_text())
    assert settings["model"]["hf_assets_path"] == settings["checkpoint"]["initial_load_path"] == f"{MODEL}@{model}"
    assert settings["data"]["source"] == f"datasets:{DATA}@{data}"

    publish(hub, tmp_path / "published", seed=2)  # both branches move
    assert_finished(train(tmp_path / "parts", *NAMES, "--training.steps", "4", ranks=2))
    pinned = [f"{value}@{data if value == DATA else model}" if value in (MODEL, DATA) else value for value in NAMES]
    assert_finished(train(tmp_path / "whole", *pinned, "--training.steps", "4", ranks=2))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert hub.served["model.safetensors"] == weights  # nothing of the new commit was downloaded


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_name_that_does_not_exist_is_one_line(hub, tmp_path, ranks):
    result = train(tmp_path / "run", "--model.hf_assets_path", "owner/modle", ranks=ranks)
    assert result.returncode == 1 and "HTTP Request" not in result.stderr + result.stdout
    assert ranks == 2 or "Traceback" not in result.stderr + result.stdout  # torchrun, which starts two here, prints its own
    message = f"model.hf_assets_path is 'owner/modle': no such file or folder here, and {hub.url} shows no model of this name. Is the name"
    assert any(line.startswith("error") and message in line for line in result.stderr.splitlines()), result.stderr
