"""A tokenizer of the size of Qwen3.5's, with several tokens that end a text: prepared data, a run, its memory, and the way back."""

import json
import math
from dataclasses import replace
from itertools import islice, product
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from refine_titan.data.end_of_sequence import end_of_sequence_ids
from refine_titan.data.tokenizer import load_tokenizer
from refine_titan.estimation.rehearsal import rehearse
from refine_titan.preparation.run import prepare
from refine_titan.preparation.settings import Settings
from refine_titan.validation import load_config
from tests.checkpoints import convert, random_weights, read_hf_folder, write_hf_folder
from tests.helpers import two_layers
from tests.integration_tests.runs import REPOSITORY, assert_finished, losses, train
from tests.unit_tests.preparation.made_up import records

VOCABULARY, ADDED = 248320, ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEXT = "The quick brown fox jumps over the lazy dog. 漢字 and naïve words. " * 40


def write_tokenizer(folder: Path) -> list[int]:
    """A byte-level BPE whose merges make every pair of bytes, then triples, until only the added tokens lack; returns the ids of two
    that end a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = list(product(alphabet, alphabet))
    triples = ((first + second, third) for (first, second), third in product(pairs, alphabet))
    merges = [*pairs, *islice(triples, VOCABULARY - len(ADDED) - len(alphabet) - len(pairs))]
    tokens = [*alphabet, *map("".join, merges)]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(list(ADDED))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    ends = [tokenizer.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>")]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return ends


def write_start(folder: Path) -> tuple[Path, list[int]]:
    """A folder with weights of a narrow hybrid and the tokenizer, and the ids that end a text."""
    args = replace(two_layers("qwen3_5"), vocab_size=VOCABULARY, dim=16, intermediate_size=16, n_heads=1, n_v_heads=2)
    write_hf_folder(folder, args, random_weights(args), eos_token_id=VOCABULARY - 2)
    return folder, write_tokenizer(folder)


def prepare_texts(start: Path, folder: Path) -> Path:
    folder.mkdir()
    for i in range(4):
        (folder / f"{i}.txt").write_text(TEXT[i:] * 4)
    prepare([folder], str(start), folder.parent / "prepared", Settings(min_tokens=1), workers=1)
    return folder.parent / "prepared"


@pytest.mark.slow
def test_large_vocabulary_goes_through_preparation_a_run_and_conversion(tmp_path):
    start, ends = write_start(tmp_path / "start")
    tokenizer = load_tokenizer(str(start), "model.hf_assets_path")
    assert ends == [VOCABULARY - 1, VOCABULARY - 3]
    assert end_of_sequence_ids(tokenizer, [start]) == (*ends, VOCABULARY - 2)  # each file names others

    prepared = prepare_texts(start, tmp_path / "texts")
    rows = [row["tokens"] for row in records(prepared)]
    expected = [tokenizer.encode(TEXT[i:] * 4) for i in range(4)]
    assert sorted(rows) == sorted(expected) and max(map(max, rows)) > 2**16
    assert {tokenizer.decode(tokens) for tokens in rows} == {TEXT[i:] * 4 for i in range(4)}

    arguments = ["--model.name", "qwen3_5", "--model.flavor", str(start), "--model.hf_assets_path", str(start)]
    arguments += ["--data.source", str(prepared), "--training.steps", "2", "--refine.num_mini_batches", "1", "--optimizer.lr", "1e-2"]
    arguments += ["--checkpoint.initial_load_path", str(start), "--checkpoint.initial_load_in_hf"]
    assert_finished(train(tmp_path / "run", *arguments))
    steps = losses(tmp_path / "run")
    assert math.log(VOCABULARY) - 0.1 < steps[0]["refine/ntp_loss"] < math.log(VOCABULARY) + 0.1
    assert steps[1]["refine/ntp_loss"] < steps[0]["refine/ntp_loss"] and steps[0]["rollout/logprob_gap"] < 1e-4

    result = convert("to-hf", tmp_path / "run" / "checkpoint" / "step-2", tmp_path / "back")
    assert result.returncode == 0 and result.stderr == "", result.stderr
    embeddings = read_hf_folder(tmp_path / "back")["model.embed_tokens.weight"]
    seen = sorted({token for row in rows for token in row})
    before = read_hf_folder(start)["model.embed_tokens.weight"]
    assert embeddings.shape == (VOCABULARY, 16) and not torch.equal(embeddings[seen], before[seen])
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (start / name).read_bytes()


def test_memory_grows_with_the_rollouts_logits_and_not_with_those_of_all_tokens():
    """8,192 tokens have 7.6 GiB of logits; the head holds those of 512."""
    settings = ["--training.seq_len", "8192", "--model.options", f"vocab_size={VOCABULARY},n_layers=1", "--refine.num_chunks", "4"]
    config = load_config(["--job.config_file", str(REPOSITORY / "train_configs" / "debug_qwen3_5.toml"), *settings])
    step = rehearse(config, 1, gpu=True)
    logits = 512 * VOCABULARY * 4
    # Logits, probabilities and their products; the gradients of the head's weights and of its inputs, and a block's part of them.
    assert 3 * logits < step.parts["head"] < 3 * logits + 2 * VOCABULARY * 256 * 4 + 2 * 8192 * 256 * 4
    rollouts = 4 * config.refine.rollout_length * VOCABULARY * 4
    assert step.stages["roll out"] - step.parts["kept until the rollouts"] < 4 * rollouts
