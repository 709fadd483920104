"""Evaluations from config and checkpoint to results, in this process, with a real model and real files."""

import json
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from refine_titan.benchmarks.samples import Sample, TaskSamples
from refine_titan.data.tokenizer import ByteTokenizer
from refine_titan.errors import UserError
from refine_titan.evaluation import job
from refine_titan.evaluation.answering import Answer
from refine_titan.evaluation.checkpoints import with_tokenizer
from refine_titan.evaluation.prompts import AnswerProtocol, Prompt
from refine_titan.evaluation.work import plan_work
from refine_titan.models import FAMILIES
from refine_titan.report.measurement import measurement_fields
from refine_titan.reproduction.tokenizer import retrieval_tokenizer
from refine_titan.validation import load_config
from tests.checkpoints import random_weights, write_full_size_start, write_hf_folder

ARGS = FAMILIES["delta_net"].flavors["debug"]
TIMES = ("seconds", "adaptation_seconds")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_hf_folder(tmp_path_factory.mktemp("checkpoint") / "hf", ARGS, random_weights(ARGS))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder with a LongBench file of nine rows: two cannot be used, one is too long."""
    folder = tmp_path_factory.mktemp("data") / "longbench"
    folder.mkdir()
    prompts = [f"Question {i}: {'what ' * (3 * i)}?" for i in range(7)]
    rows = [{"prompt": prompt, "answers": [f"answer {i}", "b|c"], "max_gen_tokens": 8} for i, prompt in enumerate(prompts)]
    rows[6]["prompt"] += "long " * 100
    rows.insert(2, {"prompt": "no answer", "answers": [], "max_gen_tokens": 8})
    rows.insert(5, {"prompt": "", "answers": ["x"], "max_gen_tokens": 8})
    (folder / "hotpotqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder.parent


def config_of(data: Path, *settings: str):
    return load_config(
        [
            "--evaluation.tasks",
            "longbench/hotpotqa",
            "--evaluation.data_folder",
            str(data),
            "--evaluation.batch_size",
            "2",
            "--training.seq_len",
            "200",
            "--training.mixed_precision_param",
            "float32",
            "--refine.num_chunks",
            "4",
            "--data.source",
            "python-stdlib",
            *settings,
        ]
    )


def lines_of(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


@pytest.fixture(scope="module")
def finished(checkpoint, data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "whole"
    job.evaluate(config_of(data), checkpoint, folder)
    return folder


def test_run_writes_samples_results_and_what_identifies_them(finished, checkpoint):
    results, run = (json.loads((finished / name).read_text()) for name in ("results.json", "run.json"))
    lines = lines_of(finished)
    assert sorted(line["index"] for line in lines) == [0, 1, 3, 4, 6, 7, 8]
    [row] = results["tasks"]
    assert (row["task"], row["num_samples"], row["cut_prompts"]) == ("hotpotqa", 7, 1)
    assert row["skipped"] == {"no answers": 1, "empty prompt": 1} and row["seconds_per_sample"] > 0
    assert run["engine"] == "native" and run["protocol"]["greedy"] and run["protocol"]["cut"] == "middle"
    assert run["engine_dtype"] == "float32" and dict(measurement_fields(results))["model"] == "delta_net debug"
    assert run["checkpoint"] == str(checkpoint) and len(run["weights_sha256"]) == len(run["tokenizer_sha256"]) == 64
    for line in lines:
        assert line["prompt_tokens"] <= 192 and line["response_tokens"] <= 8 and line["answers"][1] == "b|c"
        assert line["score"] == line["metrics"]["token_f1"]
    assert next(line["cut_tokens"] for line in lines if line["index"] == 8) > 0
    assert (finished / "report.html").is_file() and "hotpotqa" in (finished / "results.md").read_text()


def test_an_evaluation_with_other_options_of_the_model_is_another_one(finished, checkpoint, data):
    """The weights are the same; only what is computed with them differs."""
    args = json.loads((finished / "run.json").read_text())["model"]["args"]
    assert args["norm_eps"] == ARGS.norm_eps and args["dim"] == ARGS.dim and "_enforced" not in args
    other = config_of(data, "--model.options", "norm_eps=0.001")
    with pytest.raises(UserError, match="holds another evaluation, .*: model.args.norm_eps was 1e-0., is 0.001; give another"):
        job.evaluate(other, checkpoint, finished)


class Interrupted:
    """Answers `batches` batches, then raises KeyboardInterrupt as Ctrl-C does."""

    def __init__(self, answerer, batches: int):
        self.answerer, self.batches, self.answered = answerer, batches, []
        self.batch_size, self.in_order = answerer.batch_size, answerer.in_order

    def answer(self, batch: Sequence[Prompt], todo: Sequence[Prompt]) -> list[Answer]:
        if self.batches == 0:
            raise KeyboardInterrupt
        self.batches -= 1
        self.answered += [prompt.sample.index for prompt in todo]
        return self.answerer.answer(batch, todo)


def interrupt_after(monkeypatch, batches: int) -> list[Interrupted]:
    whole, made = job.open_answerer, []

    @contextmanager
    def answerer(*arguments):
        with whole(*arguments) as inner:
            made.append(Interrupted(inner, batches))
            yield made[-1]

    monkeypatch.setattr(job, "open_answerer", answerer)
    return made


@pytest.mark.parametrize("torn", [0, pytest.param(60, marks=pytest.mark.slow), 600])
def test_interrupted_run_goes_on_without_answering_again(finished, checkpoint, data, tmp_path, monkeypatch, torn):
    """The run is resumed after Ctrl-C, and after the file's last `torn` bytes are lost."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        first = interrupt_after(patch, 2)
        job.evaluate(config_of(data), checkpoint, tmp_path / "run")
    path = tmp_path / "run" / "samples.jsonl"
    assert len(lines_of(tmp_path / "run")) == 4 == len(first[0].answered) and not (tmp_path / "run" / "results.json").exists()
    path.write_bytes(path.read_bytes()[: path.stat().st_size - torn])
    kept = {json.loads(line)["index"] for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")}
    assert len(kept) == 4 if torn == 0 else 0 < len(kept) < 4
    with monkeypatch.context() as patch:
        second = interrupt_after(patch, 100)
        results = job.evaluate(config_of(data), checkpoint, tmp_path / "run")
    assert sorted([*kept, *second[0].answered]) == [0, 1, 3, 4, 6, 7, 8]
    assert lines_of(tmp_path / "run") == lines_of(finished)
    assert results["samples_sha256"] == json.loads((finished / "results.json").read_text())["samples_sha256"]


def test_finished_run_answers_nothing_again(finished, checkpoint, data, monkeypatch):
    made = interrupt_after(monkeypatch, 0)
    before = (finished / "samples.jsonl").read_bytes()
    job.evaluate(config_of(data), checkpoint, finished)
    assert made == [] and (finished / "samples.jsonl").read_bytes() == before


def test_answers_do_not_depend_on_order_and_batches(finished, checkpoint, data, tmp_path):
    rows = (data / "longbench" / "hotpotqa.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "longbench").mkdir()
    (tmp_path / "longbench" / "hotpotqa.jsonl").write_text("".join(reversed(rows)))
    job.evaluate(config_of(tmp_path, "--evaluation.num_samples", "5"), checkpoint, tmp_path / "run")
    responses = {line["prompt_sha256"]: line["response"] for line in lines_of(finished)}
    lines = lines_of(tmp_path / "run")
    assert len(lines) == 5 and all(responses[line["prompt_sha256"]] == line["response"] for line in lines)


@pytest.mark.parametrize(
    "settings, match",
    [
        (("--evaluation.seed", "1"), "seed was 0, is 1"),
        (("--evaluation.protocol", "reference"), 'protocol.name was "default", is "reference".*protocol.cut was "middle", is "right"'),
        (("--evaluation.max_prompt_tokens", "50"), "protocol.max_prompt_tokens was 0, is 50"),
        (("--evaluation.num_samples", "3"), "asked.longbench/hotpotqa.samples was 7, is 3"),
    ],
)
def test_run_is_not_resumed_with_another_protocol(finished, checkpoint, data, settings, match):
    with pytest.raises(UserError, match=match):
        job.evaluate(config_of(data, *settings), checkpoint, finished)


def test_run_is_not_resumed_with_other_weights_or_changed_files(finished, checkpoint, data, tmp_path):
    other = write_hf_folder(tmp_path / "hf", ARGS, random_weights(ARGS, seed=1))
    with pytest.raises(UserError, match="weights_sha256 was"):
        job.evaluate(config_of(data), other, finished)
    (tmp_path / "longbench").mkdir()
    text = (data / "longbench" / "hotpotqa.jsonl").read_text()
    (tmp_path / "longbench" / "hotpotqa.jsonl").write_text(text.replace("Question 3", "Query 3"))
    with pytest.raises(UserError, match="longbench/hotpotqa, sample 4 has another prompt"):
        job.evaluate(config_of(tmp_path), checkpoint, finished)
    (tmp_path / "longbench" / "hotpotqa.jsonl").write_text(text.replace("answer 3", "answer three"))
    with pytest.raises(UserError, match="asked.longbench/hotpotqa.answers_sha256 was"):
        job.evaluate(config_of(tmp_path), checkpoint, finished)


def test_skipped_rows_of_two_files_of_one_task_add_up():
    def task(name: str, index: int, **skipped: int) -> TaskSamples:
        return TaskSamples(name, [Sample("longbench", "hotpotqa", index, "why?", ("a",), 4)], skipped)

    protocol = AnswerProtocol.from_settings(config_of(Path()).evaluation, 200, ())
    work = plan_work([task("a.jsonl", 0, empty=1, null=1), task("b.jsonl", 1, empty=2)], protocol, ByteTokenizer())
    assert work.skipped == {"longbench/hotpotqa": {"empty": 3, "null": 1}} and len(work.prompts) == 2


def test_another_tokenizer_than_the_checkpoints_is_refused(data, tmp_path):
    folders = [tmp_path / name for name in ("same", "other", "checkpoint")]
    tokenizer = retrieval_tokenizer()
    for folder, pretty in zip(folders, (True, False, False)):
        folder.mkdir()
        (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=pretty))
    same, other, checkpoint = folders
    config = config_of(data)
    assert with_tokenizer(config, checkpoint).model.hf_assets_path == str(checkpoint)
    config.model.hf_assets_path = str(same)
    assert with_tokenizer(config, checkpoint) is config
    tokenizer.add_tokens(["<new>"])
    (other / "tokenizer.json").write_text(tokenizer.to_str())
    config.model.hf_assets_path = str(other)
    with pytest.raises(UserError, match="model.hf_assets_path is .*other.*not the one that .*checkpoint was trained with"):
        with_tokenizer(config, checkpoint)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_answers_end_at_the_ids_of_every_file_of_the_checkpoint(finished, data, tmp_path, name):
    """The ids of bytes that answers hold, in a list, in one file only."""
    before = {line["prompt_sha256"]: line["response"] for line in lines_of(finished)}
    byte = next(ord(letter) for response in before.values() for letter in response[1:] if letter.isascii())
    folder = write_hf_folder(tmp_path / "hf", ARGS, random_weights(ARGS))
    values = json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
    (folder / name).write_text(json.dumps(values | {"eos_token_id": [255, byte]}))
    job.evaluate(config_of(data), folder, tmp_path / "run")
    lines = lines_of(tmp_path / "run")
    assert all(line["response"] == before[line["prompt_sha256"]].partition(chr(byte))[0] for line in lines)
    assert any(line["response"] != before[line["prompt_sha256"]] for line in lines)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["protocol"]["stop_tokens"] == [256, 255, byte]


def test_sampled_answers_depend_on_the_seed(checkpoint, data, tmp_path):
    responses = []
    for i, seed in enumerate(("0", "0", "1")):
        settings = ("--evaluation.protocol", "reference", "--evaluation.seed", seed)
        job.evaluate(config_of(data, *settings), checkpoint, tmp_path / str(i))
        responses.append([line["response"] for line in lines_of(tmp_path / str(i))])
    assert responses[0] == responses[1] != responses[2]


def test_perplexity_and_generated_tasks_run(checkpoint, data, tmp_path):
    settings = ("--evaluation.num_samples", "2", "--evaluation.lengths", "1024", "--evaluation.perplexity_bin_tokens", "64")
    config = config_of(data, *settings)
    config.evaluation.tasks = ["ruler/niah_multikey_1", "perplexity"]
    results = job.evaluate(config, checkpoint, tmp_path / "run")
    rows = {row["task"]: row for row in results["tasks"]}
    assert rows["niah_multikey_1"]["num_samples"] == 2 and rows["niah_multikey_1"]["cut_prompts"] == 0
    assert [point["position"] for point in rows["perplexity"]["by_position"]] == [0, 64, 128, 192]
    assert 200 < rows["perplexity"]["score"] < 320  # random weights: about the vocabulary's 264 tokens


def test_questions_of_ones_own(checkpoint, data, tmp_path):
    """Their metric is in the samples, the results and the page, and an evaluation is not resumed with another."""
    rows = [{"context": "Ada wrote it.", "question": f"Who{'?' * i}", "answers": ["Ada"], "max_new_tokens": 4} for i in range(3)]
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = config_of(data, "--evaluation.metric", "f1")
    config.evaluation.tasks = [str(tmp_path / "facts.jsonl")]
    [row] = job.evaluate(config, checkpoint, tmp_path / "run")["tasks"]
    assert (row["benchmark"], row["task"], row["metric"], row["num_samples"]) == ("questions", "facts", "f1", 3)
    assert all(line["metrics"] == {"f1": line["score"]} for line in lines_of(tmp_path / "run"))
    assert "| facts, f1 |" in (tmp_path / "run/results.md").read_text()
    for name in ("results.md", "report.html"):
        assert "facts is scored by f1 (evaluation.metric)" in (tmp_path / "run" / name).read_text()
    config.evaluation.metric = "contains"
    with pytest.raises(UserError, match="asked.questions/facts.metric was .f1., is .contains."):
        job.evaluate(config, checkpoint, tmp_path / "run")


def test_bad_input_is_one_clear_error(checkpoint, data, tmp_path):
    def refused(match: str, tasks: list[str], *settings: str, checkpoint: Path = checkpoint) -> None:
        config = config_of(data, *settings)
        config.evaluation.tasks = tasks
        with pytest.raises(UserError, match=match):
            job.evaluate(config, checkpoint, tmp_path / "refused")
        assert not (tmp_path / "refused").exists()

    refused("hotpotqq.*did you mean .hotpotqa", ["longbench/hotpotqq"])
    refused("evaluation.tasks is empty", [])
    refused("evaluation.metric is 'bleu'; allowed: 'contains'", ["perplexity"], "--evaluation.metric", "bleu")
    wrong = tmp_path / "hotpotqa_wrong.jsonl"
    wrong.write_text('{"text": "x", "gold": "y"}\n')
    refused("has no column 'prompt'.*found: text, gold", [str(wrong)])
    twice = str(data / "longbench" / "hotpotqa.jsonl")
    refused("longbench/hotpotqa, sample 0 is given twice", ["longbench/hotpotqa", twice])
    refused(
        "asks for answers of 8 tokens.*training.seq_len = 8 has room for",
        ["longbench/hotpotqa"],
        "--training.seq_len",
        "8",
        "--refine.objective",
        "ntp",
    )
    big = write_full_size_start(tmp_path / "big", FAMILIES["delta_net"].flavors["340M"])
    refused(
        r"the tokenizer of .*big has ids up to 31999, but delta_net debug embeds only", ["perplexity"], "--model.hf_assets_path", str(big)
    )
    refused("checkpoint: .*holds neither", ["perplexity"], checkpoint=data)
    (tmp_path / "run" / "checkpoint" / "step-1").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text("{}")
    refused("is the folder of a run; its checkpoints are .*run/checkpoint/step-N", ["perplexity"], checkpoint=tmp_path / "run")


TTT = (
    "--refine.phase",
    "ttt",
    "--refine.reward",
    "binary",
    "--refine.num_mini_batches",
    "1",
    "--refine.num_chunks",
    "2",
    "--optimizer.lr",
    "0.01",
    "--refine.snapshot_stride",
    "32",
    "--ttt.steps",
    "1",
    "--activation_checkpoint.mode",
    "none",
)


def responses_of(folder: Path) -> dict[str, str]:
    return {line["prompt_sha256"]: line["response"] for line in lines_of(folder)}


def reversed_data(data: Path, folder: Path) -> Path:
    (folder / "longbench").mkdir(parents=True)
    rows = (data / "longbench" / "hotpotqa.jsonl").read_text().splitlines(keepends=True)
    (folder / "longbench" / "hotpotqa.jsonl").write_text("".join(reversed(rows)))
    return folder


@pytest.fixture(scope="module")
def adapted(checkpoint, data, tmp_path_factory) -> dict[bool, Path]:
    """Finished evaluations with test-time training, by whether it carries over."""
    folder = tmp_path_factory.mktemp("adapted")
    job.evaluate(config_of(data, *TTT), checkpoint, folder / "reset")
    job.evaluate(config_of(data, *TTT, "--ttt.carry_over"), checkpoint, folder / "carried")
    return {False: folder / "reset", True: folder / "carried"}


def test_adaptation_changes_answers_and_is_reported(adapted, finished):
    lines = [json.loads(line) for line in (adapted[False] / "samples.jsonl").read_text().splitlines()]
    adapted_to = [line for line in lines if line["adaptation"]["optimizer_steps"] == 1]
    assert adapted_to and lines[0]["adaptation"]["ntp_loss"]
    # A prompt too short for a step takes a time that may round to 0.
    assert all(line["adaptation_seconds"] > 0 for line in adapted_to)
    assert responses_of(adapted[False]) != responses_of(finished)
    for carry_over, folder in adapted.items():
        settings = json.loads((folder / "run.json").read_text())["phase"]["test_time_training"]
        assert settings["carry_over"] is carry_over and settings["refine"]["reward"] == "binary"
    row = json.loads((adapted[False] / "results.json").read_text())["tasks"][0]
    assert row["adaptation_seconds_per_sample"] > 0 and row["unadapted_prompts"] == len(lines) - len(adapted_to) > 0
    assert f"{row['unadapted_prompts']} prompts were too short to adapt to" in (adapted[False] / "results.md").read_text()


@pytest.mark.slow
def test_order_of_prompts_matters_only_if_adaptation_carries_over(adapted, checkpoint, data, tmp_path):
    other = reversed_data(data, tmp_path / "data")
    job.evaluate(config_of(other, *TTT), checkpoint, tmp_path / "reset")
    assert responses_of(tmp_path / "reset") == responses_of(adapted[False])
    job.evaluate(config_of(other, *TTT, "--ttt.carry_over"), checkpoint, tmp_path / "carried")
    assert responses_of(tmp_path / "carried") != responses_of(adapted[True])


@pytest.mark.parametrize("carry_over", [pytest.param(False, marks=pytest.mark.slow), True])
def test_interrupted_test_time_training_goes_on(adapted, checkpoint, data, tmp_path, monkeypatch, carry_over):
    settings = (*TTT, "--ttt.carry_over") if carry_over else TTT
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 4)
        job.evaluate(config_of(data, *settings), checkpoint, tmp_path / "run")
    assert len(lines_of(tmp_path / "run")) == 4
    with monkeypatch.context() as patch:
        made = interrupt_after(patch, 100)
        job.evaluate(config_of(data, *settings), checkpoint, tmp_path / "run")
    assert len(made[0].answered) == 3 and lines_of(tmp_path / "run") == lines_of(adapted[carry_over])
    with pytest.raises(UserError, match="phase.test_time_training"):
        job.evaluate(config_of(data), checkpoint, tmp_path / "run")
