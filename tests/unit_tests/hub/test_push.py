"""to-hf --push: an export with its card in one commit, and what keeps it from being pushed."""

import json

import pytest
import torch
import yaml

from refine_titan.commands import convert
from refine_titan.config.sections import JobConfig
from refine_titan.conversion.dcp_weights import DCPWeights
from refine_titan.conversion.from_hf import from_hf
from refine_titan.hub.settings import model_folder
from refine_titan.hub.upload import Destination
from refine_titan.monitoring.run_folder import write_run_files
from refine_titan.report.paper_layout import percent_with_interval
from refine_titan.report.results import write_results
from tests.checkpoints import assert_same_bits, read_hf_folder
from tests.evaluation_runs import sample_lines, write_run
from tests.hub_server import READ_TOKEN, TOKEN

NAME, COMMIT = "tester/mine", "0123456789abcdef0123456789abcdef01234567"
LINES = sample_lines({("ruler", "niah_single_1", 4096): (8, 0.5), ("ruler", "vt", 4096): (8, 0.5)})


@pytest.fixture
def to_hf(capsys, monkeypatch):
    """Runs the command with arguments; gives its exit status, output and errors."""
    monkeypatch.setattr("refine_titan.commands.convert.interrupt_on", lambda *_: None)

    def run(*arguments) -> tuple[int, str, str]:
        status = convert.main(["to-hf", *map(str, arguments)])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


@pytest.fixture
def checkpoint(tmp_path, model_files):
    """A run's checkpoint, in the run's folder."""
    source, run = tmp_path / "published", tmp_path / "run"
    source.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (source / name).write_bytes(model_files[name])
    settings = JobConfig().to_dict()
    settings["checkpoint"]["initial_load_path"] = f"fla-hub/delta_net@{COMMIT}"
    settings["data"]["source"] = f"datasets:owner/books@{COMMIT}"
    settings["job"]["dump_folder"] = "/home/somebody/secret"
    run.mkdir()
    write_run_files(run, settings)
    (run / "checkpoint").mkdir()
    from_hf(source, run / "checkpoint" / "step-7")
    return run / "checkpoint" / "step-7"


def test_a_model_is_pushed_with_its_card(hub, checkpoint, tmp_path, to_hf, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    evaluation = tmp_path / "evaluation"
    write_run(evaluation, LINES, weights_sha256=DCPWeights(checkpoint).sha256(torch.float32))
    scores = write_results(evaluation)["tasks"]
    status, out, err = to_hf(checkpoint, tmp_path / "out", "--push", NAME, "--private", "--evaluation", evaluation)
    assert (status, out) == (0, f"pushed to {hub.url}/{NAME}\n{tmp_path / 'out'}\n"), err
    repository = hub.repositories["models", NAME]
    assert repository.private and len(repository.commits) == 2  # the Hub's first one, and one with everything
    files = repository.commits[repository.refs["main"]]
    assert sorted(files) == [".gitattributes", "README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]

    card = files["README.md"].decode()
    head = yaml.safe_load(card.split("---")[1])
    assert head["base_model"] == "fla-hub/delta_net" and head["datasets"] == ["owner/books"] and "delta_net" in head["tags"]
    assert "import fla" in card and f"vllm serve {NAME}" in card and '| refine.reward | "cosine" |' in card and COMMIT in card
    assert card.count("| ruler/") == 2 and f"| {percent_with_interval(scores[0]['score'], scores[0]['ci95'])} | 8 |" in card
    assert "/home/somebody" not in card and str(tmp_path) not in card

    pushed = model_folder(NAME, "--checkpoint", weights=True)
    assert_same_bits(read_hf_folder(pushed), read_hf_folder(tmp_path / "out"))


def test_files_of_an_earlier_export_that_this_one_lacks_go(hub, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    foreign = {"onnx/model.safetensors", "model.fp8.safetensors", "model-card.safetensors", "notes.md"}
    hub.put(NAME, dict.fromkeys(foreign, b"x"))
    repository, destination = hub.repositories["models", NAME], Destination(NAME)
    one = {"config.json", "model.safetensors", "tokenizer.json", "special_tokens_map.json"}
    shards = {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)} | {"config.json", "model.safetensors.index.json", "tokenizer.json"}
    for number, names in enumerate((one, shards, one)):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name in names:
            (folder / name).write_bytes(b"x")
        destination.push(folder, "", private=False, message="a step")
        assert repository.commits[repository.refs["main"]].keys() == names | foreign | {"README.md"}
    assert len(repository.commits) == 4 and f"{NAME} loses the files of an earlier export that this one lacks: model.safe" in caplog.text


def test_a_card_that_somebody_wrote_stays(hub, checkpoint, tmp_path, to_hf, monkeypatch, caplog):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.put(NAME, {"README.md": b"# Mine\n"})
    assert to_hf(checkpoint, tmp_path / "out", "--push", NAME)[0] == 0
    files = hub.repositories["models", NAME].commits[hub.repositories["models", NAME].refs["main"]]
    assert files["README.md"] == b"# Mine\n" and "model.safetensors" in files
    assert "has a README.md that somebody has written: it stays as it is" in caplog.text
    hub.put(NAME, {"README.md": b"<!-- made by refine_titan -->"})
    assert to_hf(checkpoint, tmp_path / "again", "--push", NAME)[0] == 0
    files = hub.repositories["models", NAME].commits[hub.repositories["models", NAME].refs["main"]]
    assert files["README.md"].startswith(b"---\n")


@pytest.mark.parametrize(
    "token, name, message",
    [
        ("", NAME, "--push is 'tester/mine', but nobody is logged in: log in with `hf auth login`, or set HF_TOKEN to a token"),
        ("hf_wrong", NAME, "--push is 'tester/mine': http://127.* refuses (401) to let this token write there; log in with"),
        (TOKEN, "mine", "--push is 'mine'; allowed: owner/name of a repository of the Hugging Face Hub"),
        (TOKEN, f"{NAME}@main", "allowed: owner/name of a repository"),
    ],
)
def test_what_keeps_a_push_is_said_before_anything_is_converted(hub, checkpoint, tmp_path, to_hf, monkeypatch, token, name, message):
    monkeypatch.setenv("HF_TOKEN", token)
    status, _, err = to_hf(checkpoint, tmp_path / "out", "--push", name)
    assert status != 0 and err.count("\n") == 1 and not (tmp_path / "out").exists()
    assert all(part in err for part in message.split("*")), err


def test_a_token_that_only_reads_leaves_the_export(hub, checkpoint, tmp_path, to_hf, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    status, _, err = to_hf(checkpoint, tmp_path / "out", "--push", NAME)
    assert status != 0 and "refuses (403)" in err and "out is complete: `hf upload tester/mine" in err and err.count("\n") == 1
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_scores_of_other_weights_are_refused(hub, checkpoint, tmp_path, to_hf, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    write_run(tmp_path / "evaluation", LINES)
    write_results(tmp_path / "evaluation")
    status, _, err = to_hf(checkpoint, tmp_path / "out", "--push", NAME, "--evaluation", tmp_path / "evaluation")
    assert status != 0 and "is of other weights (outputs/evaluation/checkpoint/step-100)" in err and not (tmp_path / "out").exists()


def test_local_paths_are_no_names(checkpoint, tmp_path):
    from refine_titan.report.model_card import model_card, trained_model

    settings = json.loads((checkpoint.parents[1] / "config.json").read_text())
    settings["checkpoint"]["initial_load_path"], settings["data"]["source"] = "outputs/start", "data/books"
    (checkpoint.parents[1] / "config.json").write_text(json.dumps(settings))
    card = model_card(trained_model(NAME, "lact", checkpoint, [], lambda dtype: ""))
    assert "| started from | a local checkpoint |" in card and "| trained on | local files |" in card and "outputs/start" not in card
    assert "base_model" not in card and "AutoModelForCausalLM" not in card
