"""Training on prepared data equals training on the text they were made from; damage and another tokenizer are noticed."""

import json
import shutil

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from refine_titan.config.sections import JobConfig
from refine_titan.data.dataloader import build_dataloader
from refine_titan.data.tokenizer import ByteTokenizer, load_tokenizer
from refine_titan.errors import UserError
from refine_titan.preparation.inspection import describe, histogram, verify
from tests.unit_tests.preparation.made_up import call, write_corpus, write_jsonl


@pytest.fixture
def words(tmp_path):
    """A Hugging Face tokenizer of single characters, with ids above a byte."""
    vocabulary = {character: 200 + i for i, character in enumerate("abcdefgh é漢\n")} | {"?": 0}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    (tmp_path / "words").mkdir()
    tokenizer.save(str(tmp_path / "words" / "tokenizer.json"))
    return str(tmp_path / "words")


def job(source, seq_len=100, min_tokens=50, **data) -> JobConfig:
    config = JobConfig()
    config.training.seq_len = seq_len
    config.training.local_batch_size = 2
    config.data.source = str(source)
    config.data.min_document_tokens = min_tokens
    config.data.shuffle_buffer = 4
    for name, value in data.items():
        setattr(config.data, name, value)
    return config


def loader(config, tokenizer="", rank=0, num_ranks=1):
    return build_dataloader(num_ranks, rank, load_tokenizer(tokenizer, "--tokenizer"), config)


def uncompressed(source):
    """Removes the compressed files of a folder, which the trainer does not read as text."""
    for path in (*source.rglob("*.gz"), *source.rglob("*.zst")):
        path.unlink()
    return source


@pytest.mark.parametrize("long_documents", ["split", "truncate"])
@pytest.mark.parametrize("prepared", ["documents kept whole", "cut as in training"])
def test_batches_equal_those_from_text(tmp_path, words, long_documents, prepared):
    source = uncompressed(write_corpus(tmp_path / "in"))
    cut = {} if prepared == "documents kept whole" else {"long_documents": long_documents, "max_tokens": 100}
    call(source, tmp_path / "out", tokenizer=words, min_tokens=50, shard_tokens=1500, **cut)
    from_text = loader(job(source, long_documents=long_documents), words)
    from_shards = loader(job(tmp_path / "out", long_documents=long_documents), words)
    assert from_shards.streams[0].source.num_files() > 2
    for _ in range(100):  # several passes
        expected, found = from_text.next_batch(), from_shards.next_batch()
        assert torch.equal(expected.tokens_T, found.tokens_T) and torch.equal(expected.labels_T, found.labels_T)
        assert expected.cu_seqlens == found.cu_seqlens
    assert from_text.streams[0].epoch >= 1
    assert int(found.tokens_T.max()) >= 200


def test_every_rank_gets_the_batches_of_text_where_no_row_is_dropped(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [chr(97 + i % 26) * (60 + i) for i in range(40)])
    call(source, tmp_path / "out", shard_tokens=700)
    for rank in range(3):
        expected, found = (loader(job(path), "", rank, 3) for path in (source, tmp_path / "out"))
        for _ in range(20):
            assert torch.equal(expected.next_batch().tokens_T, found.next_batch().tokens_T)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_saved_and_restored_after_every_batch_is_the_stream(tmp_path, num_ranks):
    call(write_corpus(tmp_path / "in"), tmp_path / "out", shard_tokens=2500)
    config = job(tmp_path / "out", long_documents="split")
    for rank in range(num_ranks):
        whole, broken = loader(config, "", rank, num_ranks), loader(config, "", rank, num_ranks)
        for _ in range(150 // num_ranks):
            a, b = whole.next_batch(), broken.next_batch()
            assert torch.equal(a.tokens_T, b.tokens_T) and a.document_names == b.document_names
            state = json.loads(json.dumps(broken.state_dict()))
            assert state == json.loads(json.dumps(whole.state_dict()))
            broken = loader(config, "", rank, num_ranks)
            broken.load_state_dict(state)
        assert whole.streams[0].epoch >= 1


def test_resuming_on_data_prepared_otherwise_is_refused(tmp_path):
    source = write_corpus(tmp_path / "in")
    call(source, tmp_path / "out")
    state = loader(job(tmp_path / "out")).state_dict()
    shutil.rmtree(tmp_path / "out")
    call(source, tmp_path / "out", seed=1)
    with pytest.raises(UserError, match="data.source has other files, columns or content"):
        loader(job(tmp_path / "out")).load_state_dict(state)


def test_another_tokenizer_is_refused_naming_both(tmp_path, words):
    call(write_corpus(tmp_path / "in"), tmp_path / "out")
    with pytest.raises(UserError, match=r"made with the tokenizer bytes \(sha256 .*, the run's tokenizer is .*words \(sha256"):
        loader(job(tmp_path / "out"), words)
    # A special token that only tokenizer_config.json adds makes it another tokenizer, too.
    call(tmp_path / "in", tmp_path / "with words", tokenizer=words)
    loader(job(tmp_path / "with words"), words)
    (tmp_path / "words" / "tokenizer_config.json").write_text('{"bos_token": "ab"}')
    with pytest.raises(UserError, match="made with the tokenizer words .*, the run's tokenizer is .*words"):
        loader(job(tmp_path / "with words"), words)


def test_what_cannot_be_trained_on_is_named(tmp_path):
    source = write_corpus(tmp_path / "in")
    call(source, tmp_path / "out", max_tokens=80, long_documents="truncate")
    with pytest.raises(UserError, match="have at most 80 tokens; data.min_document_tokens .100, by default"):
        loader(job(tmp_path / "out", min_tokens=0))
    with pytest.raises(UserError, match="a part of prepared data; name the folder that holds manifest.json"):
        loader(job(tmp_path / "out" / "shard-00000.parquet"))
    (tmp_path / "q.jsonl").write_text(json.dumps({"prompt": "p", "answer": "a"}))
    call(tmp_path / "q.jsonl", tmp_path / "questions", kind="questions")
    with pytest.raises(UserError, match="holds questions, not documents"):
        loader(job(tmp_path / "questions"))


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "extra", "manifest flipped", "manifest cut"])
def test_damage_is_found(tmp_path, damage):
    call(write_corpus(tmp_path / "in"), tmp_path / "out", shard_tokens=4000)
    folder, shard, manifest = tmp_path / "out", tmp_path / "out" / "shard-00001.parquet", tmp_path / "out" / "manifest.json"
    assert verify(folder) == []
    content = shard.read_bytes()
    if damage == "flipped":
        shard.write_bytes(content[:500] + bytes([content[500] ^ 1]) + content[501:])
        expected, in_training = "shard-00001.parquet has the sha256", "shard-00001.parquet cannot be read: .*verify"
    elif damage == "cut":
        shard.write_bytes(content[:-1])
        expected, in_training = f"has {len(content) - 1:,} bytes, the manifest says {len(content):,}", "bytes, the manifest says"
    elif damage == "gone":
        shard.unlink()
        expected, in_training = "shard-00001.parquet is missing", "shard-00001.parquet is missing"
    elif damage == "extra":
        (folder / "shard-00099.parquet").write_bytes(content)
        assert verify(folder) == [f"{folder / 'shard-00099.parquet'} is not in the manifest"]
        return
    else:
        text = manifest.read_text()
        manifest.write_text(text.replace('"rows": 2', '"rows": 3', 1) if damage == "manifest flipped" else text[:-20])
        with pytest.raises(UserError, match="manifest.json is damaged"):
            verify(folder)
        with pytest.raises(UserError, match="manifest.json is damaged"):
            loader(job(folder))
        return
    [problem] = verify(folder)
    assert expected in problem
    with pytest.raises(UserError, match=in_training):
        data = loader(job(folder, min_tokens=1))
        for _ in range(100):
            data.next_batch()


def test_prepared_data_are_described(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", ["x" * n for n in (3, 4, 7, 9, 900)] + [""])
    call(source, tmp_path / "out", shard_tokens=500)
    text = describe(tmp_path / "out")
    assert "settings:  shard_tokens 500\n" in text
    assert "documents: 5 with 923 tokens in 2 shard(s), from 5 of 6 rows" in text and "skipped:   1 empty" in text
    assert "shortest 3, median 7, longest 900" in text
    assert histogram_counts(text) == {"2 to": 1, "4 to": 2, "8 to": 1, "512 to": 1}
    with pytest.raises(UserError, match="is not prepared data, or not complete"):
        describe(tmp_path)


def histogram_counts(text: str) -> dict[str, int]:
    rows = [line.split() for line in text.splitlines() if " to " in line and "#" in line]
    return {f"{row[0]} to": int(row[-1]) for row in rows}


def test_histogram_of_one_length():
    import numpy as np

    assert len(histogram(np.array([16384] * 3))) == 1 and histogram(np.array([16384] * 3))[0].endswith("#  3")


def test_byte_tokenizer_is_named_bytes(tmp_path):
    call(write_corpus(tmp_path / "in"), tmp_path / "out")
    config = job(tmp_path / "out")
    batch = build_dataloader(1, 0, ByteTokenizer(), config).next_batch()
    assert batch.tokens_T.shape == (200,) and int(batch.tokens_T.max()) < 256


def test_a_run_says_files_bytes_rows_and_tokens(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["a" * 100, "b" * 150])
    call(tmp_path / "a.jsonl", tmp_path / "out", min_tokens=1)
    size = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.parquet"))
    assert loader(job(tmp_path / "out")).source_description() == [f"prepared data: 1 file(s), {size:,} bytes, 2 row(s), 250 tokens"]
