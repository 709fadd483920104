"""Losses by position agree with a plain forward that has all logits."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from refine_titan.benchmarks.samples import TaskSamples
from refine_titan.data.tokenizer import ByteTokenizer
from refine_titan.errors import UserError
from refine_titan.evaluation.held_out import held_out_source
from refine_titan.evaluation.perplexity import bin_losses, load_documents, read_tokens, token_losses
from refine_titan.evaluation.running_means import RunningMeans
from refine_titan.models import FAMILIES, build_decoder
from refine_titan.models.shared_prefix import SharedPrefixLayout
from refine_titan.preparation.run import prepare
from refine_titan.preparation.settings import Settings
from refine_titan.validation import load_config
from tests.unit_tests.data.test_hf_datasets import local_repository, texts_of


@pytest.mark.parametrize("family", ["delta_net", "lact"])
def test_losses_of_pieces_are_those_of_the_whole_document(family):
    torch.manual_seed(0)
    args = replace(FAMILIES[family].flavors["debug"])
    args.compute_in_float32()  # bfloat16 makes 0.01 of the order in which a chunk's tokens are summed
    model = build_decoder(args)
    model.init_weights()
    tokens = torch.randint(0, 256, (600,))
    with torch.no_grad():
        logits = model(tokens, SharedPrefixLayout((0, 600)), logit_rows=torch.arange(599)).logits
    expected = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")
    for pieces in (1000, 600, 256, 100):
        losses, hits = read_tokens(model, tokens, pieces)
        assert torch.equal(losses, token_losses(model, tokens, pieces))
        assert torch.equal(hits, logits.argmax(-1) == tokens[1:])
        assert losses.shape == (599,) and (losses - expected).abs().max() < 1e-4


def test_bins_hold_the_means_of_their_positions():
    losses = torch.arange(1.0, 10.0)  # losses of the positions 1 to 9
    hits = torch.tensor([True, False, False] * 3)
    found = bin_losses(losses, hits, 4)
    assert found.accuracy == pytest.approx(1 / 3)
    assert found.positions == [0, 4, 8] and found.nll_by_position == [2.0, 5.5, 8.5] and found.nll == 5.0
    single = bin_losses(losses, hits, 1)
    assert single.positions == list(range(1, 10)) and single.nll_by_position == losses.tolist()
    exact = bin_losses(losses[:7], hits[:7], 4)  # the last bin is full
    assert exact.positions == [0, 4] and exact.nll_by_position == [2.0, 5.5]


def test_documents_are_long_enough_and_short_ones_counted(tmp_path):
    texts = ["short", "x" * 40, "", "y" * 32, "z" * 100]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts) + "no json\n")
    settings = ["--evaluation.perplexity_source", str(tmp_path / "docs.jsonl"), "--evaluation.perplexity_tokens", "32"]
    found = load_documents(load_config(settings), ByteTokenizer())
    assert [(s.index, s.length) for s in found.samples] == [(1, 32), (3, 32), (4, 32)] and found.notes == ()
    assert found.skipped == {"document too short": 1, "empty": 1, "not JSON": 1}
    assert len(load_documents(load_config([*settings, "--evaluation.num_samples", "2"]), ByteTokenizer()).samples) == 2
    settings[-1] = "101"
    with pytest.raises(UserError, match=r"evaluation.perplexity_tokens: no document .* has 101 tokens \(document too short: 4"):
        load_documents(load_config(settings), ByteTokenizer())
    with pytest.raises(UserError, match="evaluation.perplexity_source is 'nowhere'"):
        load_documents(load_config(["--evaluation.perplexity_source", "nowhere"]), ByteTokenizer())


def test_note_says_that_documents_come_from_the_training_data():
    settings = [
        "--data.source",
        "synthetic",
        "--data.synthetic_needles",
        "2",
        "--training.seq_len",
        "1024",
        "--evaluation.num_samples",
        "2",
    ]
    found = load_documents(load_config(settings), ByteTokenizer())
    assert len(found.samples) == 2 and "training data" in found.notes[0]


def write_texts(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def documents_of(*settings) -> TaskSamples:
    return load_documents(load_config(["--evaluation.perplexity_tokens", "32", *map(str, settings)]), ByteTokenizer())


def test_the_training_source_by_its_name_keeps_what_is_held_out(tmp_path):
    path = write_texts(tmp_path / "docs.jsonl", [f"document {i} " * 8 for i in range(100)])
    held_out = documents_of("--data.source", path, "--data.holdout_percent", 20)
    assert 5 <= len(held_out.samples) <= 40 and held_out.skipped == {"for training": 100 - len(held_out.samples)} and held_out.notes == ()
    for name in (path, f"{tmp_path}/../{tmp_path.name}/docs.jsonl"):
        assert documents_of("--data.source", path, "--data.holdout_percent", 20, "--evaluation.perplexity_source", name) == held_out
        whole = documents_of("--data.source", path, "--evaluation.perplexity_source", name)
        assert len(whole.samples) == 100 and whole.notes == (f"perplexity: documents of the training data's source, {str(path)!r}",)


def test_the_training_source_by_its_name_keeps_its_split(tmp_path):
    name = f"datasets:{local_repository(tmp_path / 'd')}"
    config = load_config(["--data.source", name, "--data.split", "test", "--evaluation.perplexity_source", name])
    source, note = held_out_source(config, ByteTokenizer(), 8, 0)
    assert texts_of(source) == ["only a test"] and "documents of the training data's source" in note


def test_a_note_says_that_another_source_may_hold_training_documents(tmp_path):
    texts = [f"document {i} " * 8 for i in range(4)]
    inside, other = write_texts(tmp_path / "data" / "a.jsonl", texts), write_texts(tmp_path / "other.jsonl", texts[:3])
    prepare([inside], "", tmp_path / "prepared", Settings(), workers=1)
    for trained, measured in ((inside.parent, inside), (inside, inside.parent), (tmp_path / "prepared", inside)):
        [note] = documents_of("--data.source", trained, "--evaluation.perplexity_source", measured).notes
        assert note == (
            f"perplexity: documents of {str(measured)!r}, some of which may be among those of the training data's source, {str(trained)!r}"
        )
    for trained in (inside.parent, inside, tmp_path / "prepared"):
        assert documents_of("--data.source", trained, "--evaluation.perplexity_source", other).notes == ()


def test_prepared_data_is_refused_naming_the_setting_that_gave_it(tmp_path):
    prepare([write_texts(tmp_path / "a.jsonl", ["text " * 20])], "", tmp_path / "prepared", Settings(), workers=1)
    with pytest.raises(UserError, match="^data.source is '.*prepared', .*: name files of text as evaluation.perplexity_source"):
        documents_of("--data.source", tmp_path / "prepared")
    with pytest.raises(UserError, match="^evaluation.perplexity_source is '.*prepared', .*: name the files from which it was made"):
        documents_of("--evaluation.perplexity_source", tmp_path / "prepared")


def test_progress_shows_perplexity_under_its_name():
    means = RunningMeans()
    for nll in (1.0, 2.0):
        means.add({"task": "perplexity", "nll": nll})
    means.add({"task": "vt", "score": 0.25})
    assert means.texts() == ["perplexity 4.482", "vt 0.250"]  # e to the power of 1.5
