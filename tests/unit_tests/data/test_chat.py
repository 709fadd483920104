"""Prompts that are chat messages, and answers of every kind: post-training, preparation and evaluation treat them alike."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoTokenizer

from refine_titan.benchmarks.response_files import score_file
from refine_titan.benchmarks.tasks import load_samples
from refine_titan.config.sections import JobConfig
from refine_titan.data.chat import ChatTemplate
from refine_titan.data.dataloader import build_dataloader
from refine_titan.data.questions import build_question_source
from refine_titan.data.tokenizer import ByteTokenizer, load_tokenizer
from refine_titan.errors import UserError
from refine_titan.preparation.run import prepare
from refine_titan.preparation.settings import Settings

TEMPLATE = (
    "{{- bos_token }}{% for message in messages %}\n<|start|>{{ message.role }}\n{{ message['content'] | trim }}<|end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
QUESTION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What colour is the box in the long row? "}]
RENDERED = "<|end|><|start|>system\nBe brief.<|end|>\n<|start|>user\nWhat colour is the box in the long row?<|end|>\n<|start|>assistant\n"


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A tokenizer without a template."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([RENDERED], vocab_size=280, special_tokens=["<|end|>", "<|start|>"], show_progress=False)
    folder = tmp_path_factory.mktemp("plain")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|end|>", "eos_token": "<|end|>"})
    )
    return folder


def with_template(plain: Path, folder: Path, template: str | list | None = None, jinja: str | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    values = json.loads((plain / "tokenizer_config.json").read_text())
    (folder / "tokenizer.json").write_bytes((plain / "tokenizer.json").read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps(values | ({} if template is None else {"chat_template": template})))
    if jinja is not None:
        (folder / "chat_template.jinja").write_text(jinja)
    return folder


def write(path: Path, rows: list) -> Path:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def post_training(path: Path, tokenizer: str) -> list[tuple]:
    """Prompt, answers and reason to skip of every row."""
    config = JobConfig()
    config.data.source, config.model.hf_assets_path = str(path), tokenizer
    source = build_question_source(config, load_tokenizer(tokenizer, "model.hf_assets_path"))
    return [(row.text, row.answers, row.skip_reason) for _, row in source.rows(0, 0)]


def evaluation(path: Path, tokenizer: str) -> list[tuple]:
    samples = load_samples(str(path), tokenizer=load_tokenizer(tokenizer, "model.hf_assets_path"))
    return [(sample.prompt, sample.answers) for sample in samples.samples], samples.skipped


def preparation(path: Path, tokenizer: str, out: Path) -> list[tuple]:
    outcome = prepare([path], tokenizer or "", out, Settings(kind="questions"), workers=1)
    rows = [row for shard in sorted(out.glob("*.parquet")) for row in pyarrow.parquet.read_table(shard).to_pylist()]
    return [(row["prompt"], tuple(row["answers"])) for row in rows], outcome.manifest["counts"]["skipped"]


@pytest.mark.parametrize(
    "template, jinja",
    [
        (TEMPLATE, None),
        ("not this one", TEMPLATE),
        ([{"name": "tool_use", "template": "not this one"}, {"name": "default", "template": TEMPLATE}], None),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_chat_prompts_are_rendered_everywhere(plain, tmp_path, template, jinja, suffix):
    tokenizer = str(with_template(plain, tmp_path / "tokenizer", template, jinja))
    path = write(tmp_path / f"hotpotqa{suffix}", [{"prompt": QUESTION, "answers": ["red"]}, {"prompt": QUESTION[1:], "answers": ["red"]}])
    both = [(RENDERED, ("red",)), (RENDERED.replace("<|start|>system\nBe brief.<|end|>\n", ""), ("red",))]
    assert [row[:2] for row in post_training(path, tokenizer)] == both
    assert evaluation(path, tokenizer) == (both, {}) and preparation(path, tokenizer, tmp_path / "out") == (both, {})


def test_rendering_and_tokens_are_those_of_transformers(plain, tmp_path):
    folder = with_template(plain, tmp_path / "tokenizer", TEMPLATE)
    theirs, ours = AutoTokenizer.from_pretrained(folder), load_tokenizer(str(folder), "")
    chat = ChatTemplate.of_tokenizer(ours)
    for messages in (QUESTION, QUESTION[1:]):
        text = chat.render(messages)
        assert text == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert ours.encode(text) == theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    begun = [*QUESTION, {"role": "assistant", "content": "It is"}]
    assert chat.render(begun) == RENDERED + "It is" == theirs.apply_chat_template(begun, tokenize=False, continue_final_message=True)


def test_dates_do_not_change_the_prompts_of_a_run(plain, tmp_path):
    folder = with_template(plain, tmp_path / "tokenizer", "{{ strftime_now('%d %b %Y') }}{{ messages[0].content }}")
    assert ChatTemplate.of_tokenizer(load_tokenizer(str(folder), "")).render(QUESTION) == "26 Jul 2024Be brief."


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("has_tokenizer", [True, False])
def test_chat_without_a_template_is_named(plain, tmp_path, suffix, has_tokenizer):
    path, tokenizer = write(tmp_path / f"hotpotqa{suffix}", [{"prompt": QUESTION, "answers": ["red"]}]), str(plain) if has_tokenizer else ""
    reason = "is a list of chat messages, and the tokenizer has no chat template"
    with pytest.raises(UserError, match=rf"data.prompt_column: 'prompt' of .*hotpotqa{suffix} {reason} \(model.hf_assets_path"):
        post_training(path, tokenizer)
    with pytest.raises(UserError, match=rf"hotpotqa{suffix} has no usable row: prompt {reason} \(1\)"):
        evaluation(path, tokenizer)
    with pytest.raises(UserError, match=f"no question is left of 1 rows: 1 prompt {reason}"):
        preparation(path, tokenizer, tmp_path / "out")


@pytest.mark.parametrize(
    "template, message",
    [
        ("{% for %}", "tokenizer_config.json is not a chat template: "),
        (3, "tokenizer_config.json: chat_template is 3; allowed: a text, or a list of named ones"),
    ],
)
def test_templates_that_are_none_are_named(plain, tmp_path, template, message):
    tokenizer = str(with_template(plain, tmp_path / "tokenizer", template))
    with pytest.raises(UserError, match=message):
        post_training(write(tmp_path / "a.jsonl", [{"prompt": QUESTION, "answers": ["red"]}]), tokenizer)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[7].content + 1 }}",
        "{{ messages.append(1) }}",  # the sandbox: nothing can be changed
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",  # and nothing can be reached
        "{{ messages[0].content / 2 }}",
    ],
)
def test_messages_that_a_template_refuses_are_skipped_and_counted(plain, tmp_path, template, caplog):
    tokenizer = str(with_template(plain, tmp_path / "tokenizer", template))
    [row] = post_training(write(tmp_path / "a.jsonl", [{"prompt": QUESTION, "answers": ["red"]}]), tokenizer)
    assert row == (None, (), "prompt is a list of chat messages that the chat template refuses")
    assert "tokenizer_config.json refuses messages: " in caplog.text


def test_position_in_rendered_prompts_resumes_and_another_template_is_refused(plain, tmp_path):
    rows = [{"prompt": [{"role": "user", "content": f"Where is the box {i} of the long row?"}], "answers": [str(i)]} for i in range(9)]
    config = JobConfig()
    config.refine.phase, config.training.seq_len, config.posttrain.answer_tokens = "posttrain", 200, 10
    config.data.source, config.data.shuffle_buffer = str(write(tmp_path / "a.jsonl", rows)), 3
    config.model.hf_assets_path = str(with_template(plain, tmp_path / "one", TEMPLATE))

    def loader(folder):
        return build_dataloader(1, 0, load_tokenizer(str(folder), ""), config)

    whole, resumed = loader(tmp_path / "one"), loader(tmp_path / "one")
    for _ in range(3):
        whole.next_batch()
    resumed.load_state_dict(whole.state_dict())
    for _ in range(12):
        assert whole.next_batch().tokens_T.tolist() == resumed.next_batch().tokens_T.tolist()
    other = loader(with_template(plain, tmp_path / "two", TEMPLATE.replace("assistant", "model")))
    with pytest.raises(UserError, match="data.source has other files, columns or content"):
        other.load_state_dict(whole.state_dict())


# What a file holds as answers -> those that count, or why the row is skipped.
ANSWERS = [
    (["x", None, ""], ("x",)),
    ("x", ("x",)),
    ([" ", "x", "y|z\n"], ("x", "y|z\n")),
    ([], "no answers"),
    (None, "no answers"),
    ("", "no answers"),
    ([None, "", " \n"], "no answers"),
    (3, "not text (int) answer"),
    (["x", 3], "not text (int) answer"),
    (["x", ["y"]], "not text (list) answer"),
    ({"a": "x"}, "not text (dict) answer"),
    (["x", "\ud800"], "not UTF-8 answer"),
]


@pytest.mark.parametrize("answers, expected", ANSWERS)
def test_odd_answers_are_treated_alike_everywhere(tmp_path, answers, expected):
    path = write(tmp_path / "hotpotqa.jsonl", [{"prompt": "Why?", "answers": answers}, {"prompt": "Why?", "answers": ["good"]}])
    rows, skipped = [("Why?", ("good",))], {}
    if isinstance(expected, str):
        skipped = {expected: 1}
    else:
        rows = [("Why?", expected), *rows]
    found = post_training(path, "")
    assert [row[:2] for row in found if row[0] is not None] == rows and [row[2] for row in found if row[0] is None] == list(skipped)
    assert evaluation(path, "") == (rows, skipped) and preparation(path, "", tmp_path / "out") == (rows, skipped)
    record = {"benchmark": "longbench", "task": "hotpotqa", "response": "x", "answers": answers}
    if isinstance(answers, list):
        scored = score_file(write(tmp_path / "responses.jsonl", [record]))
        if isinstance(expected, str):
            with pytest.raises(UserError) as error:
                list(scored)
            assert f"line 1: longbench/hotpotqa: {expected}; found " in str(error.value)
        else:
            assert [(line["score"], line["answers"]) for line in scored] == [(1.0, answers)]


def test_bytes_have_no_template():
    assert ChatTemplate.of_tokenizer(ByteTokenizer()) is None
