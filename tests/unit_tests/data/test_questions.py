"""Prompts with answers from every kind of file: columns, cutting, skipping, refusals, packing, resuming."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, models

from refine_titan.config.sections import JobConfig
from refine_titan.data.dataloader import build_dataloader
from refine_titan.data.questions import cut_tokens
from refine_titan.data.tokenizer import ByteTokenizer, load_tokenizer
from refine_titan.errors import UserError
from tests.questions import write_questions
from tests.unit_tests.preparation.made_up import call


def job(source, seq_len=200, **data) -> JobConfig:
    config = JobConfig()
    config.refine.phase, config.refine.num_chunks = "posttrain", 2
    config.training.seq_len, config.training.local_batch_size = seq_len, 2
    config.posttrain.answer_tokens = 10
    config.data.source, config.data.shuffle_buffer = str(source), 1
    for name, value in data.items():
        setattr(config.data, name, value)
    return config


def loader(config, rank=0, num_ranks=1):
    return build_dataloader(num_ranks, rank, ByteTokenizer(), config)


def text(tokens) -> str:
    return ByteTokenizer().decode(list(tokens))


def prompts_of(batch) -> list[str]:
    return [text(batch.tokens_T[a:b].tolist()) for a, b in zip(batch.cu_sequences, batch.cu_sequences[1:])]


def write_lines(path, *rows) -> None:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


PROMPT = "What is the answer to everything, in words of one kind or another?"


def test_every_prompt_is_a_sequence_of_its_own_length(tmp_path):
    rows = write_questions(tmp_path / "a.jsonl", longest=180)
    batch = loader(job(tmp_path / "a.jsonl")).next_batch()
    assert prompts_of(batch) == [row["prompt"] for row in rows[:2]] and batch.num_sequences == 2
    assert batch.cu_sequences == batch.cu_seqlens and batch.tokens_T.shape == (sum(len(r["prompt"]) for r in rows[:2]),)
    assert [text(answer) for answer in batch.answers] == [row["answers"][0] for row in rows[:2]]
    assert batch.references == tuple(tuple(row["answers"]) for row in rows[:2])
    assert batch.document_names == ("a.jsonl:0", "a.jsonl:1")
    assert batch.num_labels == int((batch.labels_T != -100).sum())


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("column, value", [("answers", ["forty", "two"]), ("answers", "forty"), ("answer", ["forty"]), ("answer", "forty")])
def test_answers_are_a_text_or_a_list_under_either_name(tmp_path, suffix, column, value):
    path = tmp_path / f"a.{suffix}"
    if suffix == "jsonl":
        write_lines(path, {"prompt": PROMPT, column: value})
    else:
        pyarrow.parquet.write_table(pyarrow.table({"prompt": [PROMPT], column: [value], "other": [1]}), path)
    batch = loader(job(path)).next_batch()
    assert text(batch.answers[0]) == "forty" and batch.references[0] == (tuple(value) if isinstance(value, list) else (value,))


def test_columns_that_are_named_are_the_only_ones_read(tmp_path):
    write_lines(tmp_path / "a.jsonl", {"question": PROMPT, "label": "yes", "answers": ["no"], "prompt": "x" * 90})
    batch = loader(job(tmp_path / "a.jsonl", prompt_column="question", answer_column="label")).next_batch()
    assert prompts_of(batch)[0] == PROMPT and text(batch.answers[0]) == "yes"


@pytest.mark.parametrize("where, kept", [("middle", "a" * 95 + "b" * 95), ("right", "a" * 150 + "b" * 40)])
def test_long_prompts_are_cut_and_counted(tmp_path, where, kept):
    write_lines(tmp_path / "a.jsonl", {"prompt": "a" * 150 + "b" * 150, "answer": "z" * 12}, {"prompt": PROMPT, "answer": "fits"})
    data = loader(job(tmp_path / "a.jsonl", cut=where))
    batch = data.next_batch()
    assert prompts_of(batch) == [kept, PROMPT] and text(batch.answers[0]) == "z" * 10
    assert data.streams[0].cut == {"prompts": 1, "answers": 1}
    data.next_batch()  # another pass counts nothing
    assert data.streams[0].cut == {"prompts": 1, "answers": 1}


def test_cut_keeps_the_limit_and_gives_the_odd_token_to_the_end():
    assert cut_tokens(range(10), 5, "middle") == [0, 1, 7, 8, 9] and cut_tokens(range(10), 5, "right") == [0, 1, 2, 3, 4]
    assert cut_tokens(range(5), 5, "middle") == [0, 1, 2, 3, 4] and cut_tokens(range(3), 1, "middle") == [2]


def test_prefix_and_end_of_sequence_belong_to_the_answer(tmp_path):
    write_lines(tmp_path / "a.jsonl", {"prompt": PROMPT, "answer": "forty-two"})
    config = job(tmp_path / "a.jsonl")
    config.posttrain.append_eos, config.posttrain.answer_prefix, config.posttrain.answer_tokens = True, " ", 11
    assert loader(config).next_batch().answers[0] == (*b" forty-two", 256)
    config.posttrain.answer_tokens = 10  # no room: an answer that is cut does not end
    assert loader(config).next_batch().answers[0] == tuple(b" forty-two")


def test_rows_that_cannot_be_used_are_skipped_by_reason(tmp_path):
    bad = [
        {"prompt": PROMPT, "answers": []},
        {"prompt": PROMPT, "answers": ["", " "]},
        {"prompt": PROMPT},
        {"prompt": PROMPT, "answers": None},
        {"prompt": "", "answers": "a"},
        {"prompt": "  \n", "answers": "a"},
        {"prompt": None, "answers": "a"},
        {"prompt": 3, "answers": "a"},
        {"prompt": PROMPT, "answers": [1]},
        {"prompt": "short", "answers": "a"},
        "not json",
        "",
        '["a list"]',
    ]
    write_lines(tmp_path / "a.jsonl", *bad, {"prompt": PROMPT, "answers": "good"})
    data = loader(job(tmp_path / "a.jsonl"))
    assert text(data.next_batch().answers[1]) == "good"
    assert data.streams[0].skipped == {
        "no answers": 4,
        "empty prompt": 2,
        "null prompt": 1,
        "not text (int) prompt": 1,
        "not text (int) answer": 1,
        "too short": 1,
        "not JSON": 1,
        "empty": 1,
        "no key 'prompt'": 1,
    }


@pytest.mark.parametrize(
    "lengths, min_document_tokens, settings",
    [
        ((50, 64, 65), 41, {"refine.num_chunks": 64}),
        ((40, 41, 42), 2, {}),
        ((1, 2, 3), 1, {"posttrain.inner": False, "posttrain.outer": "reward"}),
        ((49, 50, 51), 50, {}),
    ],
    ids=["a token for every chunk", "room for a rollout", "a state before the last token", "as asked"],
)
def test_prompts_are_as_long_as_the_steps_need_whatever_is_set(tmp_path, lengths, min_document_tokens, settings):
    write_lines(tmp_path / "a.jsonl", *({"prompt": "x" * length, "answer": "yes"} for length in lengths))
    config = job(tmp_path / "a.jsonl", seq_len=4096, min_document_tokens=min_document_tokens)
    for name, value in settings.items():
        section, key = name.split(".")
        setattr(getattr(config, section), key, value)
    data = loader(config)
    assert [len(prompt) for prompt in prompts_of(data.next_batch())] == list(lengths[1:])
    assert data.streams[0].skipped == {"too short": 1}


@pytest.mark.parametrize(
    "rows, data, message",
    [
        ([{"question": "q", "answers": "a"}], {}, "data.prompt_column is 'prompt'; .* has the columns: question, answers"),
        ([{"prompt": "q", "target": "a"}], {}, "has neither 'answers' nor 'answer'; it has the columns: prompt, target"),
        (
            [{"prompt": "q", "answers": "a"}],
            {"answer_column": "target"},
            "data.answer_column is 'target'; .* has the columns: prompt, answers",
        ),
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_wrong_columns_are_refused_with_those_found(tmp_path, rows, data, message, suffix):
    path = tmp_path / f"a.{suffix}"
    if suffix == "jsonl":
        write_lines(path, *rows)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    with pytest.raises(UserError, match=message):
        loader(job(path, **data))


def test_answer_without_tokens_is_skipped_and_counted(tmp_path):
    """The answer consists of characters that the tokenizer does not know."""
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate("<abc ?")}, merges=[]))
    write_lines(tmp_path / "a.jsonl", *({"prompt": "abc? " * 12, "answer": answer} for answer in ("123", "a1", "456")))
    config = job(tmp_path / "a.jsonl")
    config.training.local_batch_size = 1
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str())
    config.model.hf_assets_path, config.posttrain.answer_prefix = str(tmp_path), ""
    stream = build_dataloader(1, 0, load_tokenizer(str(tmp_path), "model.hf_assets_path"), config)
    batch = stream.next_batch()
    assert [references for references in batch.references] == [("a1",)] and [len(answer) for answer in batch.answers] == [1]
    stream.next_batch()
    assert stream.streams[0].skipped == {"answer without tokens": 2}


def test_sources_without_questions_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.parquet").write_text("PAR1")
    for source, message in [
        (tmp_path / "a.txt", "post-training takes prompts with answers"),
        ("python-stdlib", "post-training takes prompts with answers"),
        (tmp_path / "nowhere", "no such file or folder"),
        (tmp_path / "broken.parquet", "cannot be read as parquet"),
    ]:
        with pytest.raises(UserError, match=message):
            loader(job(source))
    with pytest.raises(UserError, match="holds no document of at least 41 tokens"):
        loader(job(tmp_path / "empty.jsonl")).next_batch()


def test_prepared_questions_are_read_by_their_manifest(tmp_path):
    rows = write_questions(tmp_path / "q.jsonl", longest=180)
    call(tmp_path / "q.jsonl", tmp_path / "prepared", kind="questions", max_tokens=300)
    batch = loader(job(tmp_path / "prepared")).next_batch()
    assert prompts_of(batch) == [row["prompt"] for row in rows[:2]] and batch.references[0] == tuple(rows[0]["answers"])
    call(tmp_path / "q.jsonl", tmp_path / "documents", text_column="prompt", min_tokens=1)
    with pytest.raises(UserError, match="holds documents, not questions"):
        loader(job(tmp_path / "documents"))
    (tmp_path / "prepared" / "shard-00000.parquet").unlink()
    with pytest.raises(UserError, match="shard-00000.parquet is missing"):
        loader(job(tmp_path / "prepared"))


def test_synthetic_questions_fit_and_repeat_by_number():
    config = job("synthetic", seq_len=700, synthetic_needles=2)
    first, again = loader(config).next_batch(), loader(config).next_batch()
    for prompt, answer, references in zip(prompts_of(first), first.answers, first.references):
        key = prompt.rpartition("The special magic number for ")[2].removesuffix(" mentioned in the provided text is")
        assert f"One of the special magic numbers for {key} is: {references[0].removesuffix('.')}." in prompt
        assert 580 < len(prompt) <= 690 and text(answer) == references[0]
    assert prompts_of(first) == prompts_of(again) and len(set(prompts_of(first))) == 2


def test_position_in_the_questions_resumes_exactly(tmp_path):
    write_questions(tmp_path / "a.jsonl", longest=300)  # some are cut
    config = job(tmp_path / "a.jsonl", shuffle_buffer=5)
    whole, resumed = loader(config), loader(config)
    for _ in range(3):
        whole.next_batch()
    resumed.load_state_dict(whole.state_dict())
    assert resumed.streams[0].cut == whole.streams[0].cut != {}
    for _ in range(12):  # into the second pass
        assert prompts_of(whole.next_batch()) == prompts_of(resumed.next_batch())
    changed = loader(job(tmp_path / "a.jsonl", shuffle_buffer=5, cut="right"))
    with pytest.raises(UserError, match="data.cut is 'right', but was 'middle' when the checkpoint was written. Restore it"):
        changed.load_state_dict(whole.state_dict())


def test_batches_that_ranks_share_are_padded_to_a_multiple_of_their_number(tmp_path):
    write_questions(tmp_path / "a.jsonl", longest=180)
    config = job(tmp_path / "a.jsonl")
    config.parallelism.context_parallel_degree = 4
    plain = loader(job(tmp_path / "a.jsonl")).next_batch()
    batch = loader(config).next_batch()
    assert batch.tokens_T.shape[0] % 4 == 0 and batch.tokens_T.shape[0] - plain.tokens_T.shape[0] < 4
    assert batch.cu_sequences == plain.cu_sequences and batch.num_labels == plain.num_labels
    assert prompts_of(batch) == prompts_of(plain) and batch.num_labels == int((batch.labels_T != -100).sum())
