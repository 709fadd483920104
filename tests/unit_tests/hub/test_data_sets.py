"""Names of data sets: streamed from the Hub, with their position in the checkpoint, and nothing but data."""

import io

import datasets
import pytest
from huggingface_hub import constants, snapshot_download

from refine_titan.config.reading import read_config
from refine_titan.data.dataloader import build_dataloader
from refine_titan.data.questions import build_question_source
from refine_titan.data.sources import build_source
from refine_titan.data.tokenizer import ByteTokenizer
from refine_titan.errors import UserError
from refine_titan.hub.settings import resolve_names
from refine_titan.validation import load_config
from tests.unit_tests.data.test_hf_datasets import CARD, TEXTS, assert_position_is_restored, dataset, texts_of

NAME = "owner/words"


def parquet(texts: list[str]) -> bytes:
    content = io.BytesIO()
    dataset(texts).to_parquet(content)
    return content.getvalue()


def files(card: str | None = CARD.format("data/train-*")) -> dict[str, bytes]:
    found = {"data/train-0.parquet": parquet(TEXTS[:130]), "data/train-1.parquet": parquet(TEXTS[130:])}
    found["data/test-0.parquet"] = parquet(["only a test"])
    return found | ({} if card is None else {"README.md": (card + "# Words\n").encode()})


def config_of(*arguments: str):
    return resolve_names(read_config(["--data.source", NAME, *arguments]), resumes=False)


def source_of(*arguments: str):
    return build_source(config_of(*arguments).data, ByteTokenizer(), 100, 0)


@pytest.mark.parametrize("card", [CARD.format("data/train-*"), None], ids=["card", "no card"])
def test_every_row_of_the_split_is_streamed_in_order(hub, card):
    commit = hub.put(NAME, files(card), "datasets")
    source = source_of()
    assert texts_of(source) == TEXTS and [source.num_rows(i) for i in range(source.num_files())] == [130, 70]
    assert {i: row.text for i, row in source.rows_again(0, {4, 100, 0}).items()} == {i: TEXTS[i] for i in (0, 4, 100)}
    assert source.description() == [
        f"split 'train' of the data set {NAME}@{commit} of the Hugging Face Hub",
        "2 file(s), streamed: train-0.parquet, train-1.parquet",
        "left out, 1 (another split): test",
    ]
    assert texts_of(source_of("--data.split", "test")) == ["only a test"]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_position_is_restored_to_the_bit(hub, num_ranks):
    hub.put(NAME, files(), "datasets")
    config = config_of("--training.seq_len", "100", "--data.min_document_tokens", "20", "--data.shuffle_buffer", "7")
    config.training.local_batch_size = 2
    assert_position_is_restored(config, num_ranks)


def test_the_position_belongs_to_the_commit(hub):
    hub.put(NAME, files(), "datasets")
    config = config_of("--training.seq_len", "100", "--data.min_document_tokens", "20", "--data.shuffle_buffer", "7")
    before = build_dataloader(1, 0, ByteTokenizer(), config)
    before.next_batch()
    hub.put(NAME, {"data/train-0.parquet": parquet(["other" * 30] * 130)}, "datasets")
    again = build_dataloader(1, 0, ByteTokenizer(), config)  # with the commit that the run has recorded
    again.load_state_dict(before.state_dict())
    assert again.next_batch().tokens_T.tolist() == before.next_batch().tokens_T.tolist()
    moved = config_of("--training.seq_len", "100", "--data.min_document_tokens", "20", "--data.shuffle_buffer", "7")
    with pytest.raises(UserError, match="data.source has other files, columns or content than when the checkpoint was written"):
        build_dataloader(1, 0, ByteTokenizer(), moved).load_state_dict(before.state_dict())


def test_without_a_network_the_cache_is_read(hub, monkeypatch):
    commit = hub.put(NAME, files(), "datasets")
    online = source_of()
    snapshot_download(NAME, repo_type="dataset")  # as `hf download` does
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    source = source_of()
    assert texts_of(source) == TEXTS and source.identity() == online.identity() and hub.requests == []
    assert config_of().data.source == f"datasets:{NAME}@{commit}"


def test_questions_are_read_with_the_same_rules(hub):
    rows = {"prompt": ["Why?", None], "answers": [["x"], ["y"]]}
    content = io.BytesIO()
    datasets.Dataset.from_dict(rows).to_json(content)
    hub.put(NAME, {"train.jsonl": content.getvalue()}, "datasets")
    source = build_question_source(config_of(), ByteTokenizer())
    assert [(row.text, row.skip_reason) for _, row in source.rows(0, 0)] == [("Why?", ""), (None, "null prompt")]


@pytest.mark.parametrize(
    "content, message",
    [
        ({"README.md": CARD.format("https://example.com/train.parquet").encode()}, "README.md names data on other machines"),
        ({"README.md": CARD.format("hf://datasets/a/b/train.parquet").encode()}, "README.md names data on other machines"),
        ({"words.py": b"raise SystemExit", "README.md": b"# x"}, "cannot be read by the library datasets"),
        ({"train.pkl": b"pickle"}, "is of the kind 'pandas'; allowed: arrow|cannot be read by the library datasets"),
        ({"train.parquet": b"PAR1 no parquet"}, "cannot be read by the library datasets"),
    ],
)
def test_what_is_no_data_is_refused(hub, content, message):
    hub.put(NAME, content, "datasets")
    with pytest.raises(UserError, match=f"data.source: {NAME}@.*{message}"):
        source_of()


def test_what_does_not_exist_is_one_line(hub):
    with pytest.raises(UserError, match="data.source is 'owner/words': no such file or folder here, and http.* shows no data set of this"):
        load_config(["--data.source", NAME])
    hub.put(NAME, files(), "datasets")
    with pytest.raises(UserError, match="data.split is 'validation'; data.source: .* has the splits: train, test"):
        source_of("--data.split", "validation")
    with pytest.raises(UserError, match="data.text_column is 'body'"):
        source_of("--data.text_column", "body")


def test_a_network_that_ends_is_one_line(hub):
    hub.put(NAME, files(), "datasets")
    source = source_of()
    for commit in hub.repositories["datasets", NAME].commits.values():
        commit["data/train-0.parquet"] = b"gone"
    with pytest.raises(UserError, match="data.source: owner/words@.* cannot be read by the library datasets"):
        texts_of(source)
