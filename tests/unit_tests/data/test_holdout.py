"""Documents that `data.holdout_percent` holds out are never trained on, and are the same ones wherever they lie."""

import json
import random

import pytest

from refine_titan.config.sections import JobConfig
from refine_titan.data.dataloader import DataProgress, build_dataloader
from refine_titan.data.holdout import held_out_part, training_part
from refine_titan.data.sources import build_source
from refine_titan.data.tokenizer import ByteTokenizer
from refine_titan.errors import UserError
from refine_titan.preparation.run import prepare
from refine_titan.preparation.settings import Settings
from refine_titan.validation import load_config

TEXTS = [f"document {i} " * 8 for i in range(400)]


def write(path, texts):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def job(source, percent: float) -> JobConfig:
    config = JobConfig()
    config.training.seq_len, config.training.local_batch_size = 50, 2
    config.data.source, config.data.holdout_percent, config.data.shuffle_buffer = str(source), percent, 4
    return config


def texts_of(source) -> dict[str, str]:
    """Text of every row, or its reason to be skipped."""
    found = {}
    for file in range(source.num_files()):
        for number, row in source.rows(file, 0):
            assert source.rows_again(file, {number}) == {number: row}
            found[f"{source.file_name(file)}:{number}"] = row.text or row.skip_reason
    return found


def parts(path, percent: float) -> tuple[set[str], set[str]]:
    """The texts of both parts of a source."""
    config = job(path, percent)
    source = build_source(config.data, ByteTokenizer(), 50, 0)
    trained, held_out = texts_of(training_part(source, config.data)), texts_of(held_out_part(source, config.data))
    for name, text in trained.items():
        assert (text == "held out") != (held_out[name] == "for training")
    return set(trained.values()) - {"held out"}, set(held_out.values()) - {"for training"}


def test_every_document_is_on_one_side_wherever_it_lies(tmp_path):
    trained, held_out = parts(write(tmp_path / "a.jsonl", TEXTS), 10)
    assert trained | held_out == set(TEXTS) and not trained & held_out and 20 <= len(held_out) <= 60
    moved = random.Random(0).sample(TEXTS, 200)
    write(tmp_path / "moved" / "b.jsonl", moved[:150]), write(tmp_path / "moved" / "c.jsonl", moved[150:])
    assert parts(tmp_path / "moved", 10) == (trained & set(moved), held_out & set(moved))
    more = parts(tmp_path / "a.jsonl", 30)[1]
    assert held_out < more and 80 <= len(more) <= 160  # a larger share keeps the documents of a smaller one


def test_rows_without_text_keep_their_reason(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": ""}\nno json\n{"txt": "x"}\n')
    config = job(path, 99.9)
    source = training_part(build_source(config.data, ByteTokenizer(), 50, 0), config.data)
    assert list(texts_of(source).values()) == ["empty", "not JSON", "no key 'text'"]
    assert source.description()[-1] == "all but the 99.9 % of its documents that are held out (data.holdout_percent)"


def test_a_run_trains_on_the_others_and_counts_those_held_out(tmp_path):
    path = write(tmp_path / "a.jsonl", TEXTS)
    held_out = {text[:50] for text in parts(path, 20)[1]}
    loader = build_dataloader(1, 0, ByteTokenizer(), job(path, 20))
    seen = set()
    for _ in range(300):
        batch = loader.next_batch()
        seen |= {ByteTokenizer().decode(batch.tokens_T[a:b].tolist()) for a, b in zip(batch.cu_seqlens, batch.cu_seqlens[1:])}
    assert not seen & held_out and len(seen) == len({text[:50] for text in TEXTS} - held_out)
    assert DataProgress.at(loader.state_dict()).skipped == {"held out": len(parts(path, 20)[1])}


def test_a_run_resumes_with_the_same_share_only(tmp_path):
    path = write(tmp_path / "a.jsonl", TEXTS)
    loaders = {percent: build_dataloader(1, 0, ByteTokenizer(), job(path, percent)) for percent in (0.0, 10.0, 20.0)}
    loaders[10.0].next_batch()
    state = loaders[10.0].state_dict()
    build_dataloader(1, 0, ByteTokenizer(), job(path, 10.0)).load_state_dict(state)
    for percent in (0.0, 20.0):
        with pytest.raises(UserError, match=rf"data.holdout_percent is {percent}, but was 10.0 .*exclude_from_loading dataloader"):
            loaders[percent].load_state_dict(state)


def test_a_position_that_names_no_share_is_one_without(tmp_path):
    path = write(tmp_path / "a.jsonl", TEXTS)
    streams = {percent: build_dataloader(1, 0, ByteTokenizer(), job(path, percent)).streams[0] for percent in (0.0, 10.0)}
    state = streams[0.0].state_dict()
    del state["identity"]["data.holdout_percent"]
    streams[0.0].load_state_dict(state)
    with pytest.raises(UserError, match="data.holdout_percent is 10.0, but was 0.0 when"):
        streams[10.0].load_state_dict(state)


def test_pieces_of_a_prepared_document_are_on_its_side(tmp_path):
    write(tmp_path / "a.jsonl", [f"{i:03} " * 100 for i in range(100)])
    settings = Settings(max_tokens=100, long_documents="split")
    prepare([tmp_path / "a.jsonl"], "", tmp_path / "prepared", settings, workers=1)
    config = job(tmp_path / "prepared", 20)
    source = held_out_part(build_source(config.data, ByteTokenizer(), 50, 0), config.data)
    rows = [row.tokens for file in range(source.num_files()) for _, row in source.rows(file, 0) if row.tokens is not None]
    names = [ByteTokenizer().decode(tokens)[:3] for tokens in rows]
    assert 8 <= len(set(names)) <= 35 and all(names.count(name) == 4 for name in names)


def test_wrong_values_are_named(tmp_path):
    for value in ("-1", "100"):
        with pytest.raises(UserError, match=r"data.holdout_percent is .*at least 0 and below 100"):
            load_config(["--data.holdout_percent", value])
    with pytest.raises(UserError, match="data.holdout_percent is 5.0; allowed: 0 with refine.phase = 'posttrain'"):
        load_config(["--refine.phase", "posttrain", "--data.holdout_percent", "5", "--data.source", "synthetic"])
