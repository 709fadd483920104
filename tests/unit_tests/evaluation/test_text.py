"""Measures on held-out documents agree with plain forwards in float64 over every prefix, and are the same whatever is read together."""

import copy
import gzip
import json
import math
import random
from collections import defaultdict
from dataclasses import fields, replace

import pytest
import torch
from torchtitan.distributed import ParallelDims

from refine_titan.commands.main import main
from refine_titan.data.packing import PackedSequence
from refine_titan.data.sources import build_source
from refine_titan.data.tokenizer import ByteTokenizer
from refine_titan.errors import UserError
from refine_titan.evaluation.text.reading import SequenceMeter
from refine_titan.evaluation.text.recall import recall_spans, recall_tokens
from refine_titan.evaluation.text.sequences import DrawnDocuments, draw_sequences
from refine_titan.evaluation.text.sums import measures_of
from refine_titan.evaluation.text.temperatures import TEMPERATURES, best_temperature
from refine_titan.inference import Inference
from refine_titan.models import FAMILIES
from refine_titan.models.shared_prefix import SharedPrefixLayout
from refine_titan.preparation.run import prepare
from refine_titan.preparation.settings import Settings
from refine_titan.validation import load_config
from tests.checkpoints import random_weights, write_hf_folder
from tests.helpers import two_layers
from tests.integration_tests.vllm_engines import random_model

pytestmark = pytest.mark.usefixtures("this_process_stays_as_it_is")
LENGTH, NGRAM, BEYOND, K = 180, 3, 20, 5
# From 1 / 2 to 1 / 0.7, fine enough to find the best temperature by trying.
INVERSE_TEMPERATURES = [0.5 + 0.01 * n for n in range(93)]
SETTINGS = ["--training.seq_len", str(LENGTH), "--training.mixed_precision_param", "float32", "--refine.num_chunks", "4"]


def small_inference(family: str) -> Inference:
    """A small model with random weights, large enough that its greedy text is not one token again and again."""
    args = replace(two_layers(family), dim=64, intermediate_size=64)
    args.compute_in_float32()
    args = replace(args, n_heads=2, head_dim=32) if "head_dim" in {f.name for f in fields(args)} else args
    model = random_model(args).eval()
    with torch.no_grad():
        model.output.weight.mul_(20)
    dims = ParallelDims(dp_replicate=1, dp_shard=1, cp=1, tp=1, pp=1, ep=1, etp=1, world_size=1)
    config = load_config([*SETTINGS, "--refine.rollouts_per_position", "2"])
    return Inference(config, None, args, model, dims, ByteTokenizer(), (), torch.device("cpu"))


class Plain:
    """The model in float64: a forward over a whole prefix for everything that is asked."""

    def __init__(self, inference: Inference):
        self.model = copy.deepcopy(inference.model).double()

    @torch.no_grad()
    def logits(self, tokens: list[int]) -> torch.Tensor:
        return self.model(torch.tensor(tokens), SharedPrefixLayout((0, len(tokens))), logit_rows=torch.arange(len(tokens))).logits

    def greedy(self, tokens: list[int], count: int) -> list[int]:
        written = list(tokens)
        for _ in range(count):
            written.append(int(self.logits(written)[-1].argmax()))
        return written[len(tokens) :]


def documents_it_can_guess(plain: Plain) -> list[PackedSequence]:
    """Three sequences of one, two and three documents, most of whose tokens are the likeliest ones, in which phrases come again."""
    draws, sequences = random.Random(0), []
    for lengths in ([LENGTH], [100, LENGTH - 100], [50, 60, LENGTH - 110]):
        documents = []
        for number, length in enumerate(lengths):
            tokens = [draws.randrange(256) for _ in range(30)]
            while len(tokens) < length:
                likeliest = int(plain.logits(tokens)[-1].argmax()) if draws.random() < 0.6 else draws.randrange(256)
                tokens += [likeliest] if draws.random() < 0.96 else tokens[:24]
            documents.append((tokens[:length], f"document {len(sequences)} {number}"))
        sequences.append(PackedSequence(documents))
    return sequences


def expected_measures(plain: Plain, sequences: list[PackedSequence], meter: SequenceMeter, starts: list[tuple[int, ...]]):
    """The measures that need no draws but those of the positions, which are given: of each sequence, from its beginning."""
    found, tempered = defaultdict(list), defaultdict(list)
    for sequence, selected in zip(sequences, starts):
        offset, spans = 0, {k: [] for k in meter.lengths}
        documents = [tokens for tokens, _ in sequence.documents]
        for tokens in documents:
            logits = plain.logits(tokens)
            is_recall = []
            for t in range(len(tokens)):
                earlier = [u for u in range(2, t) if tokens[u - 2 : u + 1] == tokens[t - 2 : t + 1]] if t >= 2 else []
                is_recall.append(bool(earlier) and t - max(earlier) > BEYOND)
                if t == 0:
                    continue
                loss = -float(logits[t - 1].log_softmax(-1)[tokens[t]])
                hit = int(logits[t - 1].argmax()) == tokens[t]
                found["loss"].append(loss)
                found["accuracy"].append(hit)
                found["probability"].append(math.exp(-loss))
                found["loss_0_256"].append(loss)
                for inverse in INVERSE_TEMPERATURES:
                    tempered[inverse].append(-float((logits[t - 1] * inverse).log_softmax(-1)[tokens[t]]))
                kind = "recall" if is_recall[t] else "fresh"
                found[f"{kind}_loss"].append(loss)
                found[f"{kind}_accuracy"].append(hit)
                found[f"{kind}_probability"].append(math.exp(-loss))
                found["recall_share"].append(is_recall[t])
            for k in meter.lengths:
                spans[k] += [offset + t for t in range(len(tokens) - k + 1) if all(is_recall[t : t + k]) and not is_recall[t - 1]]
            offset += len(tokens)
        for kind in ("entropy", "recall"):
            for k in meter.lengths:
                for start in selected if kind == "entropy" else spans[k]:
                    end = 0
                    for tokens in documents:
                        begin, end = end, end + len(tokens)
                        if begin < start < end:
                            right = [a == b for a, b in zip(plain.greedy(tokens[: start - begin], k), tokens[start - begin :])]
                            assert len(right) == k
                            found[f"match_{kind}_{k}"] += right
                            found[f"exact_{kind}_{k}"].append(all(right))
        assert all(len(spans[k]) <= 4 for k in meter.lengths), "as many as chunks, so that none is left out"
    losses = {inverse: sum(values) / len(values) for inverse, values in tempered.items()}
    best = min(losses, key=losses.get)
    means = {name: sum(values) / len(values) for name, values in found.items()}
    return means | {"calibrated_loss": losses[best], "best_temperature": 1 / best}


@pytest.mark.parametrize(
    "family", ["delta_net", pytest.param("lact", marks=pytest.mark.slow), pytest.param("olmo_hybrid", marks=pytest.mark.slow)]
)
def test_measures_are_those_of_plain_forwards(family):
    inference = small_inference(family)
    plain = Plain(inference)
    sequences = documents_it_can_guess(plain)
    meter = SequenceMeter(inference, seed=3, ngram=NGRAM, beyond=BEYOND)
    starts, select = [], meter.step.select

    def remember(*args):
        selection = select(*args)
        starts.extend(meter._starts_of_sequence(selection, i) for i in range(len(selection.starts) // 8))
        return selection

    meter.step.select = remember
    found = measures_of(meter.measure(sequences[:2], 0) + meter.measure(sequences[2:], 2))
    starts = [tuple(s - LENGTH * (i % 2) for s in own) for i, own in enumerate(starts)]
    expected = expected_measures(plain, sequences, meter, starts)
    rewards = {"reward_cosine", "reward_binary", "reward_hybrid", "match"}
    assert found.keys() - expected.keys() == rewards and not expected.keys() - found.keys()
    for name, value in expected.items():
        # The loss is flat around the best temperature, which is found by a parabola.
        assert found[name] == pytest.approx(value, abs={"best_temperature": 0.05, "calibrated_loss": 1e-3}.get(name, 1e-4)), name
    assert 0 < found["match_entropy_5"] < 1 and "match_recall_5" in found and 0 < found["recall_share"] < 1
    assert found["match"] == pytest.approx(found["reward_binary"]) and -1 <= found["reward_cosine"] <= 1
    assert found["reward_hybrid"] == pytest.approx(found["reward_cosine"] + found["reward_binary"], abs=1e-6)


@pytest.mark.parametrize("true", [0.6, 0.77, 0.93, 1.0, 1.24, 1.8, 2.5])
def test_best_temperature_is_the_one_that_draws_the_tokens(true):
    """Tokens that are drawn at a temperature are predicted best at that temperature."""
    logits = 3 * torch.randn(100, 2000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    share = (logits / true).softmax(-1)  # of each token, instead of draws

    def loss(temperature: float) -> float:
        return -float((share * (logits / temperature).log_softmax(-1)).sum(-1).mean())

    temperature, least = best_temperature({t: loss(t) for t in (1.0, *TEMPERATURES)})
    within = min(max(true, min(TEMPERATURES)), max(TEMPERATURES))
    assert temperature == pytest.approx(within, rel=0.01) and least == pytest.approx(loss(within), abs=3e-4)


def test_recall_tokens_are_those_whose_ngram_came_longer_ago():
    #         0  1  2  3  4  5  6  7  8  9 10 11 12
    tokens = [1, 2, 3, 9, 1, 2, 3, 8, 7, 6, 1, 2, 3]
    assert [t for t, found in enumerate(recall_tokens(tokens, 3, 3)) if found] == [6, 12]
    assert [t for t, found in enumerate(recall_tokens(tokens, 3, 4)) if found] == [12]  # 4 tokens before is not beyond 4
    assert not any(recall_tokens(tokens, 3, 6))  # the last time counts, not the first
    assert [t for t, found in enumerate(recall_tokens(tokens, 2, 3)) if found] == [5, 6, 11, 12]
    assert recall_tokens([5, 5], 3, 0) == [False, False] and recall_tokens([], 3, 0) == []


def test_recall_spans_are_whole_rows():
    recall = [False, True, True, False, True, True, True, False, True]
    assert recall_spans(recall, 1) == [1, 4, 8] and recall_spans(recall, 2) == [1, 4]
    assert recall_spans(recall, 3) == [4] and recall_spans(recall, 4) == [] and recall_spans([], 1) == []


def text_of(seed: int, length: int) -> str:
    """Words of a small vocabulary, so that phrases come again."""
    draws = random.Random(seed)
    return "".join(f"{draws.choice(['alpha', 'beta', 'gamma', 'delta'])} " for _ in range(length // 4))[:length]


@pytest.fixture(scope="module")
def model_and_text(tmp_path_factory):
    """The arguments of the command for a checkpoint with random weights, and a folder with a source of 30 documents."""
    args, folder = FAMILIES["delta_net"].flavors["debug"], tmp_path_factory.mktemp("text")
    checkpoint = write_hf_folder(folder / "hf", args, random_weights(args))
    rows = [{"text": text_of(i, 150 + 10 * i)} for i in range(30)] + [{"text": "short"}, {"text": ""}]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.toml").write_text(
        '[training]\nmixed_precision_param = "float32"\n[refine]\nnum_chunks = 4\n'
        f'[data]\nsource = "{folder}/text.jsonl"\nmin_document_tokens = 60\n[evaluation]\ndump_folder = "{folder}/evaluation"\n'
    )
    command = ["evaluate", "text", str(folder / "config.toml"), "--checkpoint", str(checkpoint), "--length", "200", "--beyond", "40"]
    return command, folder


def measured(capsys, *arguments) -> tuple[int, str, str]:
    try:
        status = main([*map(str, arguments)])
    except SystemExit as end:
        status = end.code
    return status, *capsys.readouterr()


@pytest.mark.slow
def test_command_writes_measures_that_do_not_depend_on_the_batch(model_and_text, capsys, tmp_path):
    command, folder = model_and_text
    found = {}
    for name, more in {
        "one": ["--training.local_batch_size", 1],
        "again": ["--training.local_batch_size", 1],
        "four": ["--training.local_batch_size", 4],
        "seed": ["--seed", 5],
    }.items():
        status, out, errors = measured(capsys, *command, "--sequences", 5, "--output", tmp_path / name, *more)
        assert status == 0, errors
        record = found[name] = json.loads((tmp_path / name / "measures.json").read_text())
        assert f"Measures: {tmp_path / name}/measures.json" in out and "note: documents of the training data's source" in out
        assert all(f"\n{measure} " in out for measure in record["measures"])
        assert (record["sequences"], record["length"], record["beyond"], record["ngram"]) == (5, 200, 40, 3)
        assert record["command"].startswith("refine-titan evaluate text ") and record["skipped"].keys() <= {"too short", "empty"}
    one, again, four, seed = (found[name] for name in found)
    assert one["measures"] == again["measures"] and one["terms"] == again["terms"] == four["terms"]
    assert one["measures"].keys() == four["measures"].keys()
    for name, value in one["measures"].items():
        assert four["measures"][name] == pytest.approx(value, abs=1e-5), name
    assert seed["measures"]["loss"] != one["measures"]["loss"] and seed["seed"] == 5
    assert {"recall_loss", "match_recall_5", "loss_0_256", "match_entropy_20", "reward_hybrid"} <= one["measures"].keys()
    assert one["terms"]["loss"] == 5 * 200 - one["documents"] and 5.4 < one["measures"]["loss"] < 5.8  # nearly uniform over 256


def test_measures_that_nothing_can_be_measured_for_are_absent(model_and_text, capsys):
    command, folder = model_and_text
    status, out, _ = measured(capsys, *command, "--sequences", 2, "--beyond", 200)
    record = json.loads((folder / "evaluation" / "hf-text" / "measures.json").read_text())
    assert status == 0 and "recall_loss" not in record["measures"] and "recall_loss" in record["absent"]
    assert "absent: no recall token: no 3 tokens in a row came again after more than 200 tokens" in out
    assert record["absent"]["match_recall_20"] == "no row of 20 recall tokens"


def test_documents_are_those_held_out(model_and_text, capsys, tmp_path):
    command, folder = model_and_text
    status, out, errors = measured(capsys, *command, "--sequences", 2, "--data.holdout_percent", 40, "--output", tmp_path)
    record = json.loads((tmp_path / "measures.json").read_text())
    assert status == 0 and record["held_out_percent"] == 40 and record["notes"] == [] and record["skipped"]["for training"] > 0
    status, out, errors = measured(capsys, *command, "--sequences", 100, "--data.holdout_percent", 40)
    assert status == 1 and "--sequences is 100, but the documents of" in errors and "for training" in errors and errors.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, message, status",
    [
        (["--sequences", "0"], "--sequences is 0; allowed: at least 1", 1),
        (["--ngram", "1"], "--ngram is 1; allowed: at least 2", 1),
        (["--beyond", "-1"], "--beyond is -1; allowed: at least 0", 1),
        (["--sequences", "few"], "argument --sequences: invalid int value: 'few'", 2),
        (["--lenght", "100"], "there is no option --lenght; did you mean '--length'?", 2),
        (["--length", "100"], "refine.num_chunks is 4, which cuts sequences of 100 tokens", 1),
        (["--source", "{nowhere}"], "evaluation.perplexity_source is '{nowhere}': no such file or folder", 1),
        (["--source", ""], "--source is empty", 1),
        (["--data.min_document_tokens", "199", "--sequences", "40"], "fill only 25 sequences of 200 tokens", 1),
        (["--refine.phase", "ttt"], "refine.phase is 'ttt'; held-out text is measured with the weights of the checkpoint", 1),
        (["--refine.rollout_length", "30", "--refine.objective", "ntp"], "refine.rollout_length is 30; allowed: 1 to 20", 1),
    ],
)
def test_wrong_arguments_are_named(model_and_text, capsys, tmp_path, arguments, message, status):
    nowhere = str(tmp_path / "nowhere")
    found, _, errors = measured(capsys, *model_and_text[0], *(word.format(nowhere=nowhere) for word in arguments))
    assert found == status and message.format(nowhere=nowhere) in errors and errors.count("\n") == 1


def test_several_ranks_are_refused(model_and_text, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, _, errors = measured(capsys, *model_and_text[0])
    assert status == 1 and "this runs in one process, and torchrun has started 2" in errors


def drawn(path, seed: int, count: int) -> list[list[str]]:
    """Texts of the documents of each sequence of 40 tokens that is drawn from a source."""
    tokenizer, data = ByteTokenizer(), replace(load_config([]).data, source=str(path), min_document_tokens=10)
    source = build_source(data, tokenizer, 40, 0)
    stream = DrawnDocuments(source, tokenizer, seq_len=40, min_tokens=10, split_long=True, seed=seed)
    return [[tokenizer.decode(tokens) for tokens, _ in s.documents] for s in draw_sequences(stream, count, "it")]


def test_documents_are_drawn_once_each_in_an_order_of_the_seed(tmp_path):
    texts = [f"{i:03}" + "x" * 17 for i in range(200)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "a.jsonl").write_text(lines)
    first, again, other = (drawn(tmp_path / "a.jsonl", seed, 100) for seed in (0, 0, 1))
    assert first == again != other
    for sequences in (first, other):
        assert all(len(sequence) == 2 for sequence in sequences)
        assert sorted(text for sequence in sequences for text in sequence) == texts
    assert [text for sequence in first for text in sequence] != texts and drawn(tmp_path / "a.jsonl", 0, 3) == first[:3]
    with pytest.raises(
        UserError, match="--sequences is 101, but the documents of it fill only 100 sequences of 40 tokens .documents used: 200"
    ):
        drawn(tmp_path / "a.jsonl", 0, 101)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))  # in which no row is found at once
    assert [text for sequence in drawn(tmp_path / "a.jsonl.gz", 0, 100) for text in sequence] == texts
    with pytest.raises(UserError, match="fill only 100 sequences"):
        drawn(tmp_path / "a.jsonl.gz", 0, 101)
    prepare([tmp_path / "a.jsonl"], "", tmp_path / "prepared", Settings(), workers=1)
    assert sorted(text for sequence in drawn(tmp_path / "prepared", 3, 100) for text in sequence) == texts
