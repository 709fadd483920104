"""training.epochs: every document once in each epoch, in an order over all of them, and a position that is a number."""

import errno
import gzip
import json
import threading
from collections import Counter

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from torch.distributed import HashStore

from refine_titan import rank_messages
from refine_titan.config.reading import read_config
from refine_titan.data import epochs
from refine_titan.data.dataloader import DataProgress, build_dataloader
from refine_titan.data.epochs import shuffled, with_steps
from refine_titan.data.tokenizer import ByteTokenizer
from refine_titan.dry_run import dry_run
from refine_titan.errors import UserError
from refine_titan.preparation.run import prepare
from refine_titan.preparation.settings import resolve_settings
from refine_titan.registration import register_models

# Documents of 20 to 59 bytes, each beginning with its number.
TEXTS = [f"{i:04}" + "abcdefghij"[i % 10] * (16 + 7 * i % 40) for i in range(150)]
TOTAL = sum(map(len, TEXTS))


def jsonl(folder) -> str:
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:100]))
    (folder / "b.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS[100:]))  # no newline at its end
    return str(folder)


def texts(folder) -> str:
    for i, text in enumerate(TEXTS):
        (folder / f"{i}.txt").write_text(text)
    return str(folder)


def parquet(folder) -> str:
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), folder / "a.parquet", row_group_size=40)
    return str(folder)


def saved(folder) -> str:
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(folder / "d")
    return str(folder / "d")


def prepared(folder) -> str:
    jsonl(folder)
    prepare([folder / "a.jsonl", folder / "b.jsonl"], "", folder / "p", resolve_settings(None, {"shard_tokens": 1000}))
    return str(folder / "p")


SOURCES = [jsonl, texts, parquet, saved, prepared]


def config_of(source: str, run, *arguments: str):
    shared = ["--data.min_document_tokens", "1", "--training.seq_len", "64", "--training.global_batch_size", "4", "--training.epochs", "3"]
    return read_config(["--data.source", source, "--job.dump_folder", str(run), *shared, "--refine.num_mini_batches", "1", *arguments])


def loader(config, ranks: int = 1, rank: int = 0):
    return build_dataloader(ranks, rank, ByteTokenizer(), config)


def tokens_of(loaders, sequences: int) -> list[int]:
    """The tokens of sequences, which loaders of several ranks take in turn."""
    return [token for i in range(sequences) for token in loaders[i % len(loaders)].next_batch().tokens_T.tolist()]


@pytest.fixture(autouse=True)
def forgotten():
    epochs._last.clear()


@pytest.mark.parametrize("make", SOURCES)
def test_every_document_comes_once_in_each_epoch(tmp_path, make):
    (tmp_path / "data").mkdir()
    config = config_of(make(tmp_path / "data"), tmp_path / "run")
    text = bytes(tokens_of([loader(config)], 3 * TOTAL // 64)).decode()
    orders = []
    for epoch in range(3):
        part = text[epoch * TOTAL : (epoch + 1) * TOTAL]
        documents, order = dict.fromkeys(TEXTS), []
        while part:
            length = next((len(t) for t in documents if part.startswith(t)), None)
            if length is None:  # the end of the last step
                assert epoch == 2 and len(part) < 64
                break
            order.append(int(part[:4]))
            part = part[length:]
        assert len(order) == len(set(order)) and (epoch == 2 or sorted(order) == list(range(150)))
        orders.append(order)
    assert orders[0][:50] != orders[1][:50] != orders[2][:50] and orders[0] != sorted(orders[0])


def test_the_order_is_the_same_for_every_source_and_number_of_ranks(tmp_path):
    found = []
    for make in (jsonl, parquet, saved):
        (tmp_path / make.__name__).mkdir()
        config = config_of(make(tmp_path / make.__name__), tmp_path / "runs" / make.__name__, "--data.num_streams", "2")
        for ranks in (1, 2):
            found.append(tokens_of([loader(config, ranks, rank) for rank in range(ranks)], 60))
    assert all(tokens == found[0] for tokens in found)
    other = config_of(jsonl(tmp_path / "jsonl"), tmp_path / "runs" / "x", "--debug.seed", "1", "--data.num_streams", "2")
    assert tokens_of([loader(other)], 60) != found[0]


@pytest.mark.parametrize("make", [jsonl, prepared])
def test_position_is_restored_to_the_bit(tmp_path, make):
    (tmp_path / "data").mkdir()
    config = config_of(make(tmp_path / "data"), tmp_path / "run")
    whole, resumed = loader(config), loader(config)
    for steps in (1, 37, 60, 90):  # into the second epoch and the third
        tokens_of([whole], steps)
        resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
        for _ in range(20):
            expected, found = whole.next_batch(), resumed.next_batch()
            assert found.tokens_T.tolist() == expected.tokens_T.tolist() and found.document_names == expected.document_names
    progress = DataProgress.at(whole.state_dict())
    assert (progress.passes, progress.documents_read) == (whole._sequences * 64 // TOTAL, 150)


def test_the_number_of_steps_is_that_of_the_epochs(tmp_path):
    config = config_of(jsonl(tmp_path), tmp_path / "run")
    assert with_steps(config, 4).training.steps == 3 * TOTAL // (4 * 64)
    short = config_of(jsonl(tmp_path), tmp_path / "run", "--data.min_document_tokens", "40")
    kept = [text for text in TEXTS if len(text) >= 40]
    assert with_steps(short, 4).training.steps == 3 * sum(map(len, kept)) // (4 * 64)
    split = config_of(jsonl(tmp_path), tmp_path / "run", "--data.long_documents", "split", "--training.seq_len", "32")
    assert with_steps(split, 4).training.steps == 3 * TOTAL // (4 * 32)
    with pytest.raises(UserError, match="training.epochs is 3: [0-9,]+ tokens in all, but a step takes 6,400,000; allowed: more data"):
        with_steps(config, 100_000)
    with pytest.raises(UserError, match="lr_scheduler.total_steps is 3; allowed: at least [0-9]+, the steps of 3 epoch.s., or not set"):
        with_steps(config_of(jsonl(tmp_path), tmp_path / "run", "--lr_scheduler.total_steps", "3"), 4)


def test_lengths_are_kept_in_the_run_folder(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    config = config_of(jsonl(tmp_path / "data"), tmp_path / "run")
    steps = with_steps(config, 4).training.steps
    epochs._last.clear()
    monkeypatch.setattr(epochs.DocumentIndex, "of", None)  # is not made again
    assert with_steps(config, 4).training.steps == steps
    monkeypatch.undo()
    epochs._last.clear()
    (tmp_path / "run" / epochs.INDEX_FILE).write_bytes(b"damaged")
    assert with_steps(config, 4).training.steps == steps
    epochs._last.clear()
    (tmp_path / "data" / "b.jsonl").unlink()
    assert with_steps(config, 4).training.steps == 3 * sum(map(len, TEXTS[:100])) // (4 * 64)


@pytest.fixture
def two_ranks(monkeypatch):
    """Makes this process a rank of two, without its memory of the index; the event is set as soon as rank 1 waits for rank 0."""
    store, waits = HashStore(), threading.Event()

    class Forgetful(dict):
        def __setitem__(self, identity: str, index: epochs.DocumentIndex) -> None:
            """Another rank is another process."""

    def open_store(name: str, rank: int, size: int) -> HashStore:
        if rank:
            waits.set()
        return store

    monkeypatch.setattr(epochs, "_last", Forgetful())
    monkeypatch.setattr(rank_messages, "open_store", open_store)
    monkeypatch.setattr(rank_messages, "POLL_SECONDS", 0.001)
    monkeypatch.setenv("WORLD_SIZE", "2")
    return waits


def test_rank_0_alone_makes_and_keeps_the_lengths(tmp_path, monkeypatch, two_ranks):
    (tmp_path / "data").mkdir()
    config, work, steps = config_of(jsonl(tmp_path / "data"), tmp_path / "run"), [], []
    make, write = epochs.DocumentIndex.of, epochs.write_atomically

    def told(what: str, function):
        return lambda *arguments: work.append((what, threading.current_thread().name)) or function(*arguments)

    monkeypatch.setattr(epochs.DocumentIndex, "of", told("makes", make))
    monkeypatch.setattr(epochs, "write_atomically", told("writes", write))
    monkeypatch.setenv("RANK", "1")
    other = threading.Thread(target=lambda: steps.append(with_steps(config, 4).training.steps), name="rank 1")
    other.start()
    assert two_ranks.wait(60)  # it has come first
    monkeypatch.setenv("RANK", "0")
    assert with_steps(config, 4).training.steps == 3 * TOTAL // (4 * 64)
    other.join(60)
    assert steps == [3 * TOTAL // (4 * 64)]
    assert work == [("makes", "MainThread"), ("writes", "MainThread")]


def test_lengths_that_rank_0_cannot_keep_end_every_rank(tmp_path, monkeypatch, two_ranks):
    def fail(path, content):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    (tmp_path / "data").mkdir()
    config = config_of(jsonl(tmp_path / "data"), tmp_path / "run")
    monkeypatch.setattr(epochs, "write_atomically", fail)
    for rank, kind in (("0", OSError), ("1", UserError)):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(kind, match="No space left on device: .*documents.npz"):
            with_steps(config, 4)


def test_a_dataloader_keeps_nothing(tmp_path):
    (tmp_path / "data").mkdir()
    loader(config_of(jsonl(tmp_path / "data"), tmp_path / "run")).next_batch()
    assert not (tmp_path / "run").exists()


def test_a_dry_run_counts_steps_and_writes_nothing(tmp_path):
    (tmp_path / "data").mkdir()
    config = config_of(jsonl(tmp_path / "data"), tmp_path / "run")
    register_models()
    assert f"{3 * TOTAL // (4 * 64)} steps" in dry_run(config)
    assert not (tmp_path / "run").exists()


def test_questions_come_once_in_each_epoch(tmp_path):
    rows = [{"prompt": f"{i:03} " + "why? " * 20, "answer": f"{i}"} for i in range(30)] + [{"prompt": None, "answer": "x"}]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = config_of(str(tmp_path / "q.jsonl"), tmp_path / "run", "--refine.phase", "posttrain", "--training.seq_len", "256")
    assert with_steps(config, 4).training.steps == 3 * 30 // 4
    whole = loader(config)
    batches = [whole.next_batch() for _ in range(75)]
    prompts = [bytes(batch.tokens_T.tolist()).decode()[:3] for batch in batches]
    assert Counter(prompts[:30]) == Counter(prompts[30:60]) == Counter(f"{i:03}" for i in range(30)) and prompts[:30] != prompts[30:60]
    assert all(batch.references == ((str(int(prompt)),),) for batch, prompt in zip(batches, prompts))
    resumed = loader(config)
    resumed.load_state_dict(whole.state_dict())
    assert resumed.next_batch().tokens_T.tolist() == whole.next_batch().tokens_T.tolist()


def test_steps_keep_their_size(tmp_path):
    """The number of a step says how many sequences were read, whatever gives it its size."""
    size = "--training.global_batch_size"
    config = [jsonl(tmp_path), tmp_path / "run", "--data.num_streams", "2"]
    whole = loader(config_of(*config))
    tokens_of([whole], 8)
    state = whole.state_dict()
    for arguments, ranks, found in (([size, "8"], 1, 8), ([size, "2"], 2, 2), ([size, "-1"], 2, 2)):
        message = f"gives a step {found} sequences, but 4 when the checkpoint was written, .*; allowed: {size} 4. Or begin another run"
        with pytest.raises(UserError, match=message):
            loader(config_of(*config, *arguments), ranks).load_state_dict(state)
    loader(config_of(*config, size, "-1", "--training.local_batch_size", "2"), 2).load_state_dict(state)  # 4 sequences too
    earlier = {
        name: json.dumps({k: v for k, v in json.loads(text).items() if k != "step_sequences"})
        for name, text in state.items()
        if name != "num_streams"
    }
    resumed = loader(config_of(*config))
    resumed.load_state_dict(earlier | {"num_streams": 2})
    assert resumed.next_batch().tokens_T.tolist() == whole.next_batch().tokens_T.tolist()


def test_positions_of_steps_and_epochs_are_not_mixed(tmp_path):
    counted, in_epochs = (loader(config_of(jsonl(tmp_path), tmp_path / "run", "--training.epochs", n)) for n in ("0", "1"))
    counted.next_batch()
    with pytest.raises(UserError, match="training.epochs is set, but the checkpoint's run counted steps"):
        in_epochs.load_state_dict(counted.state_dict())
    with pytest.raises(UserError, match="training.epochs is 0, but the checkpoint's run counted epochs"):
        counted.load_state_dict(in_epochs.state_dict())
    with pytest.raises(UserError, match="training.seq_len is 32, but was 64"):
        loader(config_of(jsonl(tmp_path), tmp_path / "run", "--training.seq_len", "32")).load_state_dict(in_epochs.state_dict())


def test_more_epochs_go_on_where_fewer_ended(tmp_path):
    few, many = (loader(config_of(jsonl(tmp_path), tmp_path / "run", "--training.epochs", n)) for n in ("1", "5"))
    tokens_of([few], 50)
    many.load_state_dict(few.state_dict())
    assert many.next_batch().tokens_T.tolist() == few.next_batch().tokens_T.tolist()


def test_data_without_random_access_are_refused(tmp_path):
    jsonl(tmp_path)
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": TEXTS[0]}) + "\n")
    for source, reason in (
        ("synthetic", "is generated without end"),
        (f"datasets:{tmp_path}", "is streamed, so that neither its length is known"),
        (str(tmp_path), "holds c.jsonl.gz, which is compressed"),
    ):
        with pytest.raises(UserError, match=f"training.epochs is 3, which reads documents in any order, but data.source {reason}"):
            with_steps(config_of(source, tmp_path / "run"), 4)


def test_steps_and_epochs_of_one_place_contradict_each_other(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("[training]\nsteps = 5\n")
    file = ["--job.config_file", str(path)]
    config = read_config([*file, "--training.epochs", "2"])  # the command line replaces what the file says
    assert config.training.epochs == 2
    with pytest.raises(UserError, match="training.epochs is 2 and training.steps is 7, both in the command line; allowed: one of them"):
        read_config(["--training.epochs", "2", "--training.steps=7"])
    path.write_text("[training]\nepochs = 4\n")
    assert read_config(file).training.epochs == 4
    trial = read_config([*file, "--training.steps", "3"])
    assert (trial.training.epochs, trial.training.steps) == (0, 3)
    path.write_text("[training]\nepochs = 4\nsteps = 5\n")
    with pytest.raises(UserError, match="training.epochs is 4 and training.steps is 5, both in .*run.toml"):
        read_config(file)


def test_the_shuffle_is_written_down():
    assert sorted(shuffled(1000, 7)) == list(range(1000))
    assert shuffled(10, 2**62 + 1).tolist() == shuffled(10, 2**62 + 1).tolist() != shuffled(10, 3).tolist()
    assert shuffled(8, 1).tolist() == [4, 3, 7, 0, 1, 5, 6, 2]  # a change of it would change every run
