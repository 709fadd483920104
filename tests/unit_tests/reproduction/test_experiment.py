"""The reproduction's files, the stages of an experiment, and the computation of its table."""

import json
from pathlib import Path

import numpy as np
import pytest

from refine_titan.errors import UserError
from refine_titan.models.sizes import resolve_flavor
from refine_titan.reproduction import table
from refine_titan.reproduction.experiment import ARMS, Experiment
from refine_titan.reproduction.tokenizer import retrieval_tokenizer

CONFIGS = Path(__file__).parents[3] / "train_configs" / "reproduction"
FOLDERS = sorted(path.parent for path in CONFIGS.glob("*/start.toml"))


@pytest.fixture(autouse=True)
def at_the_repository(monkeypatch):
    monkeypatch.chdir(CONFIGS.parents[1])  # paths in the files are relative to it


def test_committed_tokenizer_is_the_one_that_is_made():
    assert (CONFIGS / "tokenizer" / "tokenizer.json").read_text() == retrieval_tokenizer().to_str(pretty=True) + "\n"


def test_tokenizer_keeps_texts_and_has_a_token_a_digit():
    tokenizer, text = retrieval_tokenizer(), "The number for old-zebra is 1029384.\n\tÜ"
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text and sum(tokenizer.id_to_token(i).isdigit() for i in ids) == 7


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_both_files_train_the_same_model(folder):
    start, further = Experiment(folder, Path("out"), (1,)).configs()
    assert vars(start.model) == vars(further.model)
    assert start.refine.objective == "ntp" and further.training.steps < start.training.steps
    resolve_flavor(start.model.name, start.model.flavor)


def test_continuations_differ_in_nothing_but_objective_and_folder(tmp_path):
    stages = {stage.name: stage for stage in Experiment(FOLDERS[0], tmp_path, (1, 2)).stages()}
    name = FOLDERS[0].name
    assert len(stages) == 1 + 2 * 5 and not any(stage.is_done() for stage in stages.values())
    ntp, refine = stages[f"{name}/ntp_seed_2"], stages[f"{name}/refine_seed_2"]
    assert {a for a, b in zip(ntp.command, refine.command) if a != b} == {"ntp", str(tmp_path / "ntp_seed_2")}
    assert ntp.needs == refine.needs == (f"{name}/start",)
    evaluation = stages[f"{name}/evaluate_refine_seed_2"]
    assert evaluation.needs == (refine.name,) and evaluation.command[evaluation.command.index("--seed") + 1] == "2"


def test_folder_without_its_files_is_named(tmp_path):
    (tmp_path / "start.toml").touch()
    with pytest.raises(UserError, match=f"{tmp_path} holds no continue.toml; an experiment is a folder with"):
        Experiment(tmp_path, tmp_path / "out", (1,)).stages()


@pytest.fixture
def finished(tmp_path) -> Experiment:
    """An experiment of three seeds. ReFINE scores 0.1 above next-token training at 512 tokens, and a varying amount at 1,024."""
    experiment = Experiment(FOLDERS[0], tmp_path, (1, 2, 3))
    for seed in experiment.seeds:
        for arm, gain in zip(ARMS, (0.0, 0.1, 0.2)):
            rows = [(512, 0.3 + gain), (1024, 0.1 * seed + (0.05 * seed if arm == "refine" else 0.0))]
            write_results(experiment.evaluation_folder(arm, seed), rows)
            lines = [{"step": s, "timing/total": 2.0 + gain, "refine/ntp_loss": 5 - s, "rollout/match_mean": 0.5} for s in range(5)]
            folder = experiment.run_folder(arm, seed)
            folder.mkdir(exist_ok=True)
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return experiment


def write_results(folder: Path, rows: list[tuple[int, float]]) -> None:
    tasks = [{"task": "niah_single_1", "length": length, "score": score} for length, score in rows]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps({"tasks": tasks}))


@pytest.fixture(autouse=True)
def plain_results(monkeypatch):
    monkeypatch.setattr(table, "read_results", lambda path: json.loads(path.read_text()))


def test_differences_are_taken_seed_by_seed(finished):
    found = table.experiment_results(finished)
    assert found["columns"] == ["niah_single_1 512", "niah_single_1 1K", "mean"]
    short, long = (found["difference"][column] for column in found["columns"][:2])
    assert short["mean"] == pytest.approx(0.1) and short["half_width"] == pytest.approx(0, abs=1e-12)
    assert long["mean"] == pytest.approx(0.1) and long["half_width"] == pytest.approx(4.3027 * 0.05 / np.sqrt(3), rel=1e-4)
    assert found["estimates"]["start"]["mean"]["mean"] == pytest.approx(0.25)
    assert found["training"]["ntp"] == {"step_seconds": 2.1, "ntp_loss": 1.0, "match_mean": 0.5}
    text = table.comparison_page([found])
    assert "| + next-token training | 40.0 ±0.0 | 20.0 ±24.8 |" in text and "| ReFINE − next-token | +10.0 ±0.0" in text
    latex = table.comparison_latex([found])
    assert r"+ next-token training & 40.0 $\pm$0.0 & 20.0 $\pm$24.8 &" in latex and r"\toprule" in latex


def test_evaluations_of_other_tasks_are_refused(finished):
    write_results(finished.evaluation_folder("ntp", 2), [(512, 0.1)])
    with pytest.raises(UserError, match="the evaluations have different tasks or lengths"):
        table.experiment_results(finished)
