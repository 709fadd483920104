"""The files with which an evaluation is resumed, and what they refuse."""

import json

import pytest
import torch

from refine_titan.benchmarks.samples import Sample
from refine_titan.errors import UserError
from refine_titan.evaluation.identity import begin_run, weights_sha256
from refine_titan.evaluation.sample_log import SampleKey, SampleLog, text_sha256
from refine_titan.models import FAMILIES, build_decoder


def line(index: int, prompt: str = "p") -> dict:
    return {
        "benchmark": "ruler",
        "task": "vt",
        "length": 512,
        "index": index,
        "prompt_sha256": text_sha256(prompt),
        "response": "é\ud800",
        "score": 0.5,
        "metrics": {"reference_fraction": 0.5},
    }


def reopened(folder) -> SampleLog:
    log = SampleLog(folder)
    log.close()
    return log


def test_half_written_line_is_dropped_and_written_anew(tmp_path):
    log = SampleLog(tmp_path)
    log.append([line(0), line(1)])
    log.close()
    whole = log.path.read_bytes()
    for size in range(len(whole) + 1):
        log.path.write_bytes(whole[:size])
        log = SampleLog(tmp_path)
        assert len(log.lines) == whole[:size].count(b"\n")
        log.append([line(i) for i in range(len(log.lines), 2)])
        log.close()
        assert log.path.read_bytes() == whole
    assert reopened(tmp_path).lines[SampleKey("ruler", "vt", 512, 1)] == line(1)


def test_foreign_lines_are_refused(tmp_path):
    path = tmp_path / "samples.jsonl"
    for text, match in (
        ("{}\n", "line 1, is no finished sample: it lacks 'benchmark'"),
        ("nonsense\n", "line 1"),
        (2 * (json.dumps(line(3)) + "\n"), "twice"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=match):
            SampleLog(tmp_path)


def test_damaged_lines_are_dropped_and_their_samples_are_not_finished(tmp_path, caplog):
    path = tmp_path / "samples.jsonl"
    whole = [json.dumps(line(index)) for index in range(4)]
    path.write_text("\n".join([whole[0], whole[1][:40], whole[2], "\0" * 100, whole[3], whole[1][:10]]))
    log = SampleLog(tmp_path)
    assert "lines 2, 4 are damaged and left out" in caplog.text and "run again" in caplog.text
    assert [key.index for key in log.lines] == [0, 2, 3]
    log.append([line(1)])
    log.close()
    caplog.clear()
    assert [key.index for key in reopened(tmp_path).lines] == [0, 2, 3, 1] and not caplog.text


@pytest.mark.parametrize("field, value", [("length", []), ("score", "x"), ("index", None), ("prompt_sha256", 3), ("metrics", {"a": 2})])
def test_damaged_line_is_refused_with_the_name_of_its_field(tmp_path, field, value):
    (tmp_path / "samples.jsonl").write_text(json.dumps(line(0) | {field: value}) + "\n")
    with pytest.raises(UserError, match=f"samples.jsonl, line 1: {'a' if field == 'metrics' else field} is "):
        SampleLog(tmp_path)


def test_changed_prompt_is_refused(tmp_path):
    log = SampleLog(tmp_path)
    log.append([line(0)])
    log.close()
    sample = Sample("ruler", "vt", 0, "p", ("a",), 4, 512)
    log.require_same_prompt(sample, text_sha256("p"))
    with pytest.raises(UserError, match="ruler/vt, sample 0 of length 512 has another prompt"):
        log.require_same_prompt(sample, text_sha256("q"))


def test_another_evaluation_is_refused_naming_what_differs(tmp_path):
    run = {"name": "a", "checkpoint": "x", "weights_sha256": "1", "protocol": {"cut": "middle", "top_k": 0}, "seed": 0, "versions": {}}
    begin_run(tmp_path, run)
    begin_run(tmp_path, run | {"checkpoint": "elsewhere", "versions": {"torch": "3"}})
    for change, match in (
        ({"weights_sha256": "2"}, 'weights_sha256 was "1", is "2"'),
        ({"protocol": {"cut": "right", "top_k": 0}}, 'protocol.cut was "middle", is "right"'),
        ({"seed": 1}, "seed was 0, is 1"),
    ):
        with pytest.raises(UserError, match=match):
            begin_run(tmp_path, run | change)
    with pytest.raises(UserError, match='model was not recorded, is {"name": "lact", "args": {"chunk_size": 512}}'):
        begin_run(tmp_path, run | {"model": {"name": "lact", "args": {"chunk_size": 512}}})
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds 'notes.txt' but no run.json"):
        begin_run(other, run)


def test_hash_of_weights_changes_with_one_weight():
    torch.manual_seed(0)
    model = build_decoder(FAMILIES["delta_net"].flavors["debug"])
    model.init_weights()
    before = weights_sha256(model)
    assert weights_sha256(model) == before and len(before) == 64
    with torch.no_grad():
        model.norm.weight[3] += 1e-7
        changed = weights_sha256(model)
        assert changed != before
        model.norm.weight[3] = 1.0
    assert weights_sha256(model) == before
