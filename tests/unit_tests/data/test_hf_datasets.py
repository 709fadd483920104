"""Datasets of Hugging Face: folders that save_to_disk wrote, and local folders that load_dataset reads."""

import json
import re
from pathlib import Path

import datasets
import pytest

from refine_titan.config.reading import read_config
from refine_titan.config.sections import Data, JobConfig
from refine_titan.data.dataloader import build_dataloader
from refine_titan.data.questions import build_question_source
from refine_titan.data.sources import build_source
from refine_titan.data.tokenizer import ByteTokenizer
from refine_titan.errors import UserError
from refine_titan.files.git_lfs import LFS_POINTER

TEXTS = [f"{i:03} naïve 漢字 " + "x" * 60 for i in range(200)]
CARD = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: {}\n  - split: test\n    path: data/test-*\n---\n"


def dataset(texts: list[str] = TEXTS) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"number": list(range(len(texts))), "text": texts})


def saved(folder: Path, shards: int = 3) -> Path:
    dataset().save_to_disk(folder, num_shards=shards)
    return folder


def saved_splits(folder: Path) -> Path:
    datasets.DatasetDict(train=dataset(), test=dataset(["only a test"])).save_to_disk(folder)
    return folder


def local_repository(folder: Path, card: str | None = CARD.format("data/train-*")) -> Path:
    """A clone of a dataset's repository: two parquet files of one split, one of another, and what says so."""
    (folder / "data").mkdir(parents=True)
    for name, texts in (("train-0", TEXTS[:130]), ("train-1", TEXTS[130:]), ("test-0", ["only a test"])):
        dataset(texts).to_parquet(str(folder / "data" / f"{name}.parquet"))
    if card is not None:
        (folder / "README.md").write_text(card + "# Words\n")
    return folder


FOLDERS = {
    "saved": lambda folder: str(saved(folder)),
    "splits": lambda folder: str(saved_splits(folder)),
    "repository": lambda folder: f"datasets:{local_repository(folder)}",
    "repository without a card": lambda folder: f"datasets:{local_repository(folder, None)}",
}


def source_of(name: str, **data):
    return build_source(Data(source=name, **data), ByteTokenizer(), 100, 0)


def texts_of(source) -> list[str]:
    return [row.text for file in range(source.num_files()) for _, row in source.rows(file, 0)]


def assert_position_is_restored(config: JobConfig, num_ranks: int) -> None:
    """Every rank's batches go on to the bit after its position was saved, into the second pass."""
    for rank in range(num_ranks):
        whole, resumed = (build_dataloader(num_ranks, rank, ByteTokenizer(), config) for _ in range(2))
        for _ in range(40):
            whole.next_batch()
        resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
        for _ in range(100):  # into the second pass
            expected, found = whole.next_batch(), resumed.next_batch()
            assert found.tokens_T.tolist() == expected.tokens_T.tolist() and found.document_names == expected.document_names


@pytest.mark.parametrize("kind", FOLDERS)
def test_every_row_of_the_split_is_read_in_order(tmp_path, kind):
    source = source_of(FOLDERS[kind](tmp_path / "a folder"))
    assert texts_of(source) == TEXTS and sum(source.num_rows(i) for i in range(source.num_files())) == 200
    assert [(i, row.text) for i, row in source.rows(0, 65, stride=30)] == [(i, TEXTS[i]) for i in range(65, source.num_rows(0), 30)]
    assert {i: row.text for i, row in source.rows_again(0, {4, 100, 0}).items()} == {i: TEXTS[i] for i in (0, 4, 100)}


@pytest.mark.parametrize("kind", FOLDERS)
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_position_is_restored_to_the_bit(tmp_path, kind, num_ranks):
    config = JobConfig()
    config.training.seq_len, config.training.local_batch_size = 100, 2
    config.data.source, config.data.min_document_tokens, config.data.shuffle_buffer = FOLDERS[kind](tmp_path / "d"), 20, 7
    assert_position_is_restored(config, num_ranks)


def test_a_shuffled_dataset_keeps_its_order(tmp_path):
    shuffled = dataset().shuffle(seed=3)
    shuffled.save_to_disk(tmp_path / "d")
    assert texts_of(source_of(str(tmp_path / "d"))) == shuffled["text"][:] != TEXTS


def test_a_changed_file_is_noticed(tmp_path):
    name = FOLDERS["saved"](tmp_path / "d")
    before = source_of(name).identity()
    [path] = (tmp_path / "d").glob("data-00001*.arrow")
    content = path.read_bytes()
    path.write_bytes(content.replace(b"100 na", b"999 na"))
    assert source_of(name).identity() != before
    path.write_bytes(content)
    assert source_of(name).identity() == before


def test_description_names_files_rows_and_other_splits(tmp_path):
    source = source_of(FOLDERS["splits"](tmp_path / "d"))
    size = (tmp_path / "d" / "train" / "data-00000-of-00001.arrow").stat().st_size
    assert source.description() == [
        "split 'train' of a dataset of Hugging Face",
        f"1 file(s), {size:,} bytes, 200 row(s): data-00000-of-00001.arrow",
        "left out, 1 (another split): test",
    ]
    assert "left out, 1 (another split): test" in source_of(FOLDERS["repository"](tmp_path / "r")).description()


@pytest.mark.parametrize("kind", ["splits", "repository"])
def test_splits_are_chosen_by_name(tmp_path, kind):
    name = FOLDERS[kind](tmp_path / "d")
    assert texts_of(source_of(name, split="test")) == ["only a test"]
    with pytest.raises(UserError, match="data.split is 'validation'; data.source: .*d has the splits: train, test"):
        source_of(name, split="validation")


@pytest.mark.parametrize("setting", ["split", "subset"])
def test_a_part_of_what_is_read_whole_is_refused(tmp_path, setting):
    folder, part = local_repository(tmp_path / "d"), {setting: "train"}
    hint = {str(folder): f"; 'datasets:{folder}' reads the folder as a dataset"}
    for name in (str(folder), str(folder / "data" / "train-0.parquet"), "synthetic", "python-stdlib"):
        whole = f"data.{setting} is 'train', but data.source is {name!r}, which is no dataset of Hugging Face and is read whole; "
        message = f"^{re.escape(whole)}allowed: ''{re.escape(hint.get(name, ''))}$"
        with pytest.raises(UserError, match=message):
            source_of(name, **part)
        with pytest.raises(UserError, match=message):
            build_question_source(JobConfig(data=Data(source=name, **part)), ByteTokenizer())
    with pytest.raises(UserError, match="data.source is 'nowhere': no such file or folder"):
        source_of("nowhere", **part)


def test_a_saved_dataset_has_no_subsets(tmp_path):
    with pytest.raises(UserError, match="data.subset is 'one'; data.source: .*d was written by save_to_disk, .*; allowed: ''"):
        source_of(str(saved(tmp_path / "d")), subset="one")


def test_subsets_are_chosen_by_name(tmp_path):
    folder = local_repository(
        tmp_path / "d",
        "---\nconfigs:\n- config_name: one\n  data_files: data/train-0*\n- config_name: two\n  data_files: data/train-1*\n---\n",
    )
    assert texts_of(source_of(f"datasets:{folder}", subset="two")) == TEXTS[130:]
    with pytest.raises(UserError, match=r"Config name is missing.*"):
        source_of(f"datasets:{folder}")


@pytest.mark.parametrize("kind", ["saved", "jsonl"])
def test_questions_are_read_with_the_same_rules(tmp_path, kind):
    rows = {"prompt": ["Why?", None, "How?"], "answers": [["x", None, ""], ["y"], []]}
    if kind == "saved":
        datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "d")
    else:
        (tmp_path / "d").mkdir()
        datasets.Dataset.from_dict(rows).to_json(str(tmp_path / "d" / "train.jsonl"))
    config = JobConfig()
    config.data.source = f"{'' if kind == 'saved' else 'datasets:'}{tmp_path / 'd'}"
    source = build_question_source(config, ByteTokenizer())
    assert [(row.text, row.answers, row.skip_reason) for _, row in source.rows(0, 0)] == [
        ("Why?", ("x",), ""),
        (None, (), "null prompt"),
        (None, (), "no answers"),
    ]


@pytest.mark.parametrize("damage", ["pointer", "empty", "truncated", "gone"])
@pytest.mark.parametrize("kind", ["saved", "repository"])
def test_damaged_files_are_named(tmp_path, kind, damage):
    name = FOLDERS[kind](tmp_path / "d")
    path = tmp_path / "d" / ("data-00001-of-00003.arrow" if kind == "saved" else "data/train-1.parquet")
    content = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes({"pointer": LFS_POINTER, "empty": b"", "truncated": content[: len(content) // 2]}[damage])
    if kind == "repository" and damage == "gone":
        assert texts_of(source_of(name)) == TEXTS[:130]  # nothing says that there was another file
        return
    message = f"{path.name} is a Git LFS pointer" if damage == "pointer" else "data.source: .*d cannot be read by the library datasets: "
    with pytest.raises(UserError, match=message):
        texts_of(source_of(name))


@pytest.mark.parametrize("name", ["state.json", "dataset_dict.json", "dataset_info.json"])
@pytest.mark.parametrize("content", ["", "[]", '{"_data_files": [{"filename": "/etc/passwd"}], "splits": ["../x"], "features": 3}'])
def test_damaged_descriptions_are_named(tmp_path, name, content):
    saved(tmp_path / "d") if name != "dataset_dict.json" else saved_splits(tmp_path / "d")
    (tmp_path / "d" / name).write_text(content)
    with pytest.raises(UserError, match=str(tmp_path / "d")):
        source_of(str(tmp_path / "d"))


@pytest.mark.parametrize(
    "card, message",
    [
        (CARD.format("https://example.com/train.parquet"), "README.md names data on other machines; allowed: files of the folder itself"),
        (CARD.format("hf://datasets/a/b/train.parquet"), "README.md names data on other machines; allowed: files of the folder itself"),
        (CARD.format("../elsewhere/*"), "names .*elsewhere.*, which is no file inside it"),
        ("---\nconfigs: [\n---\n", "README.md does not begin with valid YAML"),
    ],
)
def test_data_elsewhere_are_refused(tmp_path, card, message):
    local_repository(tmp_path / "d", card)
    (tmp_path / "elsewhere").mkdir()
    dataset().to_parquet(str(tmp_path / "elsewhere" / "train.parquet"))
    with pytest.raises(UserError, match=message):
        source_of(f"datasets:{tmp_path / 'd'}")


def test_readers_that_unpickle_are_refused(tmp_path):
    (tmp_path / "d").mkdir()
    dataset().to_pandas().to_pickle(tmp_path / "d" / "train.pkl")
    with pytest.raises(UserError, match="is of the kind 'pandas'; allowed: arrow, csv, json, parquet, text|cannot be read by the library"):
        source_of(f"datasets:{tmp_path / 'd'}")


def test_what_is_no_dataset_is_named(tmp_path):
    with pytest.raises(
        UserError, match="data.source is 'datasets:squad': no such folder; allowed after 'datasets:': a local folder, or OWNER/NAME"
    ):
        source_of("datasets:squad")
    with pytest.raises(UserError, match="data.text_column is 'body'; data.source: .*d, split 'all', has the columns: number, text"):
        source_of(FOLDERS["saved"](tmp_path / "d"), text_column="body")
    with pytest.raises(UserError, match="data.split is 'test'; data.source: .*d has only one split, without a name"):
        source_of(str(tmp_path / "d"), split="test")


def test_home_folder_after_the_prefix(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_config(["--data.source", "datasets:~/d"]).data.source == f"datasets:{tmp_path}/d"
