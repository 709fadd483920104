"""Reading documents from every kind of file, skipping and reporting, packing, sharding, and exact resuming."""

import json

import pyarrow
import pyarrow.parquet
import pytest
import torch

from refine_titan.config.sections import JobConfig
from refine_titan.data.dataloader import build_dataloader
from refine_titan.data.synthetic import _FILLER, RetrievalCorpus
from refine_titan.data.tokenizer import ByteTokenizer, build_tokenizer
from refine_titan.errors import UserError


def job(source, seq_len=100, min_tokens=50, **data) -> JobConfig:
    config = JobConfig()
    config.training.seq_len = seq_len
    config.training.local_batch_size = 2
    config.data.source = str(source)
    config.data.min_document_tokens = min_tokens
    config.data.shuffle_buffer = 1
    for name, value in data.items():
        setattr(config.data, name, value)
    return config


def loader(config, rank=0, num_ranks=1):
    return build_dataloader(num_ranks, rank, ByteTokenizer(), config)


def text_of(batch, document):
    return ByteTokenizer().decode(batch.tokens_T[batch.cu_seqlens[document] : batch.cu_seqlens[document + 1]].tolist())


def write_jsonl(path, count=20, length=70):
    texts = [f"{i:04}" + "x" * (length - 4) for i in range(count)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return texts


def test_sequences_are_full_and_labels_stay_inside_documents(tmp_path):
    texts = write_jsonl(tmp_path / "a.jsonl")
    batch = loader(job(tmp_path / "a.jsonl")).next_batch()
    assert batch.tokens_T.shape == (200,) and batch.num_sequences == 2
    # The rest of a document that does not fit begins the next sequence, as a document of its own.
    assert batch.cu_seqlens == (0, 70, 100, 140, 200)
    assert text_of(batch, 0) == texts[0] and text_of(batch, 1) + text_of(batch, 2) == texts[1]
    assert batch.document_names == ("a.jsonl:0", "a.jsonl:1", "a.jsonl:1+30", "a.jsonl:2")
    for start, end in zip(batch.cu_seqlens, batch.cu_seqlens[1:]):
        assert torch.equal(batch.labels_T[start : end - 1], batch.tokens_T[start + 1 : end])
        assert batch.labels_T[end - 1] == -100
    assert batch.num_labels == int((batch.labels_T != -100).sum())
    assert batch.documents_of_sequence(1) == (0, 40, 100)


def test_truncated_and_split_documents(tmp_path):
    (tmp_path / "long.txt").write_text("a" * 100 + "b" * 100 + "c" * 60)
    truncated = loader(job(tmp_path / "long.txt", long_documents="truncate")).next_batch()
    assert [text_of(truncated, i) for i in range(2)] == ["a" * 100, "a" * 100]
    split = loader(job(tmp_path / "long.txt", long_documents="split"))
    first, second = split.next_batch(), split.next_batch()
    assert text_of(first, 0) == "a" * 100 and text_of(first, 1) == "b" * 100
    assert text_of(second, 0) == "c" * 60 and text_of(second, 1) == "a" * 40


def test_bad_rows_are_skipped_counted_and_reported_once(tmp_path, caplog):
    good = json.dumps({"text": "y" * 100})
    rows = [
        good,
        json.dumps({"text": None}),
        "",
        "{broken",
        json.dumps({"text": ""}),
        json.dumps({"other": 1}),
        json.dumps({"text": 5}),
        json.dumps({"text": "\ud800" * 60}),
        '{"text": ' + "9" * 5000 + "}",
        "[" * 100000,
        json.dumps({"text": "short"}),
        json.dumps({"text": "short"}),
        json.dumps([1]),
    ]
    (tmp_path / "a.jsonl").write_bytes("\n".join(rows).encode() + b'\n{"text": "\xff\xfe"}\n')
    data = loader(job(tmp_path / "a.jsonl"))
    for _ in range(3):  # several passes over the file: rows are counted in the first
        batch = data.next_batch()
        assert [text_of(batch, i) for i in range(2)] == ["y" * 100] * 2
    assert data.streams[0].skipped == {
        "null": 1,
        "empty": 2,
        "not JSON": 3,
        "no key 'text'": 2,
        "not text (int)": 1,
        "too short": 2,
        "not UTF-8": 2,
    }
    assert sum("too short" in record.message for record in caplog.records) == 1


def test_parquet_with_nulls_and_bytes_that_are_not_utf8(tmp_path):
    invalid = pyarrow.array([b"\xff\xfe" * 60], type=pyarrow.binary()).view(pyarrow.string())
    good = pyarrow.array(["z" * 100, None, ""], type=pyarrow.string())
    table = pyarrow.table({"body": pyarrow.chunked_array([good, invalid])})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    data = loader(job(tmp_path / "a.parquet", text_column="body"))
    assert text_of(data.next_batch(), 1) == "z" * 100
    assert data.streams[0].skipped == {"null": 1, "empty": 1, "not UTF-8": 1}


def test_folder_reads_its_files_in_order(tmp_path):
    (tmp_path / "b.txt").write_text("b" * 100)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.md").write_text("c" * 100)
    write_jsonl(tmp_path / "a.jsonl", count=1, length=100)
    (tmp_path / "latin.txt").write_bytes(b"\xe9" * 100)
    (tmp_path / "picture.png").write_bytes(b"x" * 100)
    data = loader(job(tmp_path))
    names = [name for _ in range(3) for name in data.next_batch().document_names]
    assert names == ["a.jsonl:0", "b.txt:0", "sub/c.md:0"] * 2
    assert data.streams[0].skipped["not UTF-8"] >= 1


@pytest.mark.parametrize(
    "prepare, message",
    [
        (lambda p: None, "no such file or folder"),
        (lambda p: p.mkdir(), "holds no file ending in"),
        (lambda p: p.write_text("text without a suffix"), "allowed files end in"),
    ],
)
def test_source_that_cannot_be_read_is_named(tmp_path, prepare, message):
    prepare(tmp_path / "source")
    with pytest.raises(UserError, match=message):
        loader(job(tmp_path / "source"))


def test_unreadable_parquet_and_missing_column_are_named(tmp_path):
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 this is not parquet")
    with pytest.raises(UserError, match="bad.parquet cannot be read as parquet"):
        loader(job(tmp_path / "bad.parquet"))
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"], "title": ["y"]}), tmp_path / "good.parquet")
    with pytest.raises(UserError, match="has the columns: body, title"):
        loader(job(tmp_path / "good.parquet"))


@pytest.mark.parametrize("content", ["", "short\n", "\n\n\n"])
def test_nothing_usable_is_an_error_with_counts_not_a_hang(tmp_path, content):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UserError, match="no document of at least 50 tokens"):
        loader(job(tmp_path / "a.jsonl")).next_batch()


def test_more_ranks_than_documents_is_an_error(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", count=2)
    with pytest.raises(UserError, match="stream 2 of 3"):
        loader(job(tmp_path / "a.jsonl"), rank=2, num_ranks=3).next_batch()


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_share_all_documents_without_overlap(tmp_path, num_ranks):
    for i in range(5):  # a mix of files with several rows and with one
        write_jsonl(tmp_path / f"{i}.jsonl", count=i + 1, length=100)
    seen = []
    for rank in range(num_ranks):
        data = loader(job(tmp_path), rank, num_ranks)
        share = []
        while data.streams[0].epoch == 0:
            share.append(data.streams[0].next_document().address)
        seen += share[:-1]  # the last one belongs to the second pass
    assert sorted(seen) == sorted((f, r, 0) for f in range(5) for r in range(f + 1))


@pytest.mark.parametrize("source", ["jsonl", "parquet", "python-stdlib", "synthetic"])
@pytest.mark.parametrize("batches_before", [0, 1, 7])
def test_resumed_stream_goes_on_exactly(tmp_path, source, batches_before):
    path = source
    if source == "jsonl":
        path = tmp_path / "a.jsonl"
        write_jsonl(path, count=9, length=130)
    elif source == "parquet":
        path = tmp_path / "a.parquet"
        texts = [chr(97 + i) * (60 + 37 * i) for i in range(9)]
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=4)
    config = job(path, long_documents="split", shuffle_buffer=5, synthetic_needles=1)
    config.training.seq_len = 520 if source == "synthetic" else 100
    config.training.local_batch_size = 3
    original = loader(config)
    for _ in range(batches_before):
        original.next_batch()
    state = json.loads(json.dumps(original.state_dict()))
    resumed = loader(config)
    resumed.load_state_dict(state)
    for _ in range(12):
        a, b = original.next_batch(), resumed.next_batch()
        assert torch.equal(a.tokens_T, b.tokens_T) and a.cu_seqlens == b.cu_seqlens and a.document_names == b.document_names
    assert original.state_dict() == resumed.state_dict()


@pytest.mark.parametrize("shuffle_buffer", [1, 4, 100])
def test_every_document_comes_once_a_pass(tmp_path, shuffle_buffer):
    write_jsonl(tmp_path / "a.jsonl", count=12, length=100)
    data = loader(job(tmp_path / "a.jsonl", shuffle_buffer=shuffle_buffer))
    for _ in range(3):
        assert sorted(data.streams[0].next_document().address.row for _ in range(12)) == list(range(12))
    assert data.streams[0].documents_read == 12


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_stream_saved_and_restored_after_every_batch_is_the_stream(tmp_path, num_ranks):
    write_jsonl(tmp_path / "a.jsonl", count=7, length=130)
    (tmp_path / "b.txt").write_text("0123456789" * 47)
    (tmp_path / "c.txt").write_text("too short")
    texts = [None, "p" * 99, "q" * 260, ""] + [chr(97 + i) * 75 for i in range(6)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "d.parquet", row_group_size=3)
    config = job(tmp_path, long_documents="split", shuffle_buffer=4)
    for rank in range(num_ranks):
        whole, broken = loader(config, rank, num_ranks), loader(config, rank, num_ranks)
        for _ in range(40):
            a, b = whole.next_batch(), broken.next_batch()
            assert torch.equal(a.tokens_T, b.tokens_T) and a.document_names == b.document_names
            state = json.loads(json.dumps(broken.state_dict()))
            assert state == json.loads(json.dumps(whole.state_dict()))
            broken = loader(config, rank, num_ranks)
            broken.load_state_dict(state)
        assert whole.streams[0].epoch >= 2


def test_resuming_a_long_split_document_reads_it_once(tmp_path, monkeypatch):
    (tmp_path / "long.txt").write_text("abcdefghij" * 20000)
    config = job(tmp_path / "long.txt", long_documents="split", shuffle_buffer=50)
    original = loader(config)
    original.next_batch()
    state = original.state_dict()
    assert len(state["stream_0"]) < 3000  # the position does not grow with the document
    resumed = loader(config)
    calls = []
    encode = ByteTokenizer.encode
    monkeypatch.setattr(ByteTokenizer, "encode", lambda self, text: calls.append(len(text)) or encode(self, text))
    resumed.load_state_dict(state)
    assert sum(length > 1000 for length in calls) <= 3  # buffer, pending, rest of the last row
    assert torch.equal(original.next_batch().tokens_T, resumed.next_batch().tokens_T)


@pytest.mark.parametrize(
    "change, message",
    [
        ("file added", "data.source has other files"),
        ("file grown", "data.source has other files"),
        ("seq_len", "training.seq_len is 120, but was 100 when the checkpoint was written. Restore it, or pass"),
        ("split", "data.long_documents is 'split', but was 'truncate' when"),
        ("source", "data.source has other files"),
        ("tokenizer", "model.hf_assets_path has a tokenizer that gives other tokens"),
    ],
)
def test_resuming_on_other_data_is_refused(tmp_path, monkeypatch, change, message):
    write_jsonl(tmp_path / "b.jsonl")
    config = job(tmp_path)
    original = loader(config)
    original.next_batch()
    if change == "file added":
        write_jsonl(tmp_path / "a.jsonl")
    elif change == "file grown":
        with (tmp_path / "b.jsonl").open("a") as file:
            file.write('{"text": "more"}\n')
    elif change == "seq_len":
        config.training.seq_len = 120
    elif change == "split":
        config.data.long_documents = "split"
    elif change == "tokenizer":
        encode = ByteTokenizer.encode
        monkeypatch.setattr(ByteTokenizer, "encode", lambda self, text: encode(self, text)[::-1])
    else:
        config.data.source = "python-stdlib"
    with pytest.raises(UserError, match=message):
        loader(config).load_state_dict(original.state_dict())


def test_resuming_goes_on_where_the_data_have_moved_to(tmp_path):
    (tmp_path / "a").mkdir()
    write_jsonl(tmp_path / "a" / "a.jsonl")
    original = loader(job(tmp_path / "a"))
    original.next_batch()
    (tmp_path / "a").rename(tmp_path / "b")
    moved = loader(job(tmp_path / "b"))
    moved.load_state_dict(original.state_dict())


def test_resuming_with_other_streams_is_refused(tmp_path):
    write_jsonl(tmp_path / "a.jsonl")
    state = loader(job(tmp_path / "a.jsonl"), 0, 2).state_dict()
    with pytest.raises(UserError, match="of 2 streams, this run has 1; pass --data.num_streams 2"):
        loader(job(tmp_path / "a.jsonl")).load_state_dict(state)


def test_batches_do_not_depend_on_how_many_ranks_share_the_streams(tmp_path):
    """Two steps of eight sequences on one, two and four ranks; the number of ranks and the batch size change in between."""
    write_jsonl(tmp_path / "a.jsonl", count=40, length=130)
    config = job(tmp_path / "a.jsonl", long_documents="split", shuffle_buffer=4, num_streams=4)

    def step(num_ranks: int, batch_size: int, state: dict | None) -> tuple[list, dict]:
        config.training.local_batch_size = batch_size
        sequences, states = [None] * 8, {}
        for rank in range(num_ranks):
            data = loader(config, rank, num_ranks)
            if state:
                data.load_state_dict(state)
            for i in range(8 // (num_ranks * batch_size)):
                own = data.next_batch().tokens_T.view(batch_size, -1).tolist()
                for j, tokens in enumerate(own):
                    sequences[(i * batch_size + j) * num_ranks + rank] = tokens
            states |= data.state_dict()
        return sequences, states

    first, state = step(1, 1, None)
    second, last = step(1, 8, state)
    assert all(a != b for a, b in zip(first, second))
    assert step(2, 2, None) == (first, state) and step(4, 2, state) == (second, last)


def test_shuffling_depends_on_the_seed_and_changes_order_only(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", count=30, length=100)

    def first_documents(seed, shuffle_buffer):
        config = job(tmp_path / "a.jsonl", shuffle_buffer=shuffle_buffer)
        config.debug.seed = seed
        data = loader(config)
        return [data.streams[0].next_document().address.row for _ in range(20)]

    assert first_documents(1, 10) == first_documents(1, 10) != first_documents(2, 10)
    assert first_documents(1, 1) == list(range(20)) and len(set(first_documents(1, 10))) == 20


def test_synthetic_documents_hold_every_answer_within_the_sequence():
    config = job("synthetic", seq_len=1500, min_tokens=0, synthetic_needles=4)
    batch = loader(config).next_batch()
    text = text_of(batch, 0)
    answers = [line.split(" text is ")[1].rstrip(".") for line in text.splitlines() if line.startswith("What is the special")]
    assert len(answers) == 4
    for answer in answers:
        assert f"is: {answer}." in text
    with pytest.raises(UserError, match="synthetic_needles"):
        loader(job("synthetic", seq_len=300, min_tokens=0, synthetic_needles=8)).next_batch()


def test_byte_tokenizer_round_trip_and_damage():
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode("naïve — 漢字\n")) == "naïve — 漢字\n"
    assert tokenizer.decode([0xFF, 65, 256]) == "\ufffdA"


def test_hugging_face_tokenizer_adds_no_special_tokens(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "a": 1, "b": 2, "<unk>": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = JobConfig()
    config.model.hf_assets_path = str(tmp_path)
    loaded = build_tokenizer(config)
    assert loaded.encode("a b a") == [1, 2, 1]
    vocabulary = {f"token{i}": i for i in range(300)} | {"<unk>": 300}
    Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="ids up to 300, but delta_net debug embeds only 288"):
        build_tokenizer(config)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read"):
        build_tokenizer(config)


def test_words_that_leave_no_room_are_drawn_again():
    """With one token per byte, most first draws are too long for 450 tokens; the others give the same needle as with more room."""

    def needle(document: str) -> str:
        return next(line for line in document.splitlines() if line.startswith("One of the special"))

    tight, wide = (RetrievalCorpus(ByteTokenizer(), num_tokens, 1, seed=0) for num_tokens in (450, 600))
    documents = [(tight.document(i), wide.document(i)) for i in range(100)]
    assert all(len(narrow.encode()) - 2 * len(_FILLER) <= 450 for narrow, _ in documents)
    assert 10 < sum(needle(narrow) == needle(broad) for narrow, broad in documents) < 50
    with pytest.raises(UserError, match="data.synthetic_needles = 1 leaves no room for filler in 400 tokens"):
        RetrievalCorpus(ByteTokenizer(), 400, 1, seed=0).document(0)
