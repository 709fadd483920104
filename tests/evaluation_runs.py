"""Makes folders of evaluation runs from a seed, with the statistics of real runs."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from refine_titan.report.paper_layout import LONGBENCH_TASKS
from refine_titan.seeding import derive_seed

HOSTILE = (
    "<script>alert('x')</script>",
    "</pre></article><img src=x onerror=alert(1)>",
    '"><a href="http://example.com">x</a>',
    "\x00\x07\x1b[31mred\x1b[0m \u202eright to left\u202c \ud800 lone surrogate \ufffe",
    "\u2028 line separator \x85 next line | pipe ` tick",
    "Ünïcödé 日本語 \U0001f9ea\n\n\ttabbed",
    "",
)
# (benchmark, task, length) -> (number of samples, approximate mean score).
Tasks = dict[tuple[str, str, int | None], tuple[int, float]]
METRICS = {
    "ruler": ("reference_fraction", "all_references"),
    "ruler_qa": ("any_reference", "reference_fraction"),
    "longbench": ("f1",),
}


def run_record(name: str = "run", **changes: Any) -> dict[str, Any]:
    """Makes the content of a `run.json`."""
    return {
        "format": 1,
        "name": name,
        "checkpoint": f"outputs/{name}/checkpoint/step-100",
        "weights_sha256": hashlib.sha256(name.encode()).hexdigest(),
        "tokenizer_sha256": hashlib.sha256(b"tokenizer").hexdigest(),
        "model": {"name": "delta_net", "flavor": "debug"},
        "engine": "native",
        "protocol": {"name": "default", "greedy": True, "temperature": 0.0, "cut": "middle", "max_prompt_tokens": 16384},
        "phase": {"test_time_training": None},
        "seed": 7,
        "tasks": ["ruler"],
        "haystack": "built-in substitute for essays",
        "versions": {"python": "3.11.9", "packages": {"torch": "2.13.0", "torchtitan": "0.2.2"}},
        "config": {},
    } | changes


def sample_lines(tasks: Tasks, seed: int = 0, depths: int = 0, skill: float = 0.0) -> list[dict[str, Any]]:
    """Makes the lines of a `samples.jsonl`.

    Args:
        tasks: the tasks that are evaluated.
        seed: seed of the responses. Prompts depend on the task only, so that runs of different seeds have the same samples.
        depths: number of depths of single needles; 0 for none.
        skill: added to the mean score.
    """
    lines = []
    for (benchmark, task, length), (count, mean) in tasks.items():
        rng = np.random.default_rng(derive_seed(seed, benchmark, task, str(length)))
        difficulty = np.random.default_rng(derive_seed(0, benchmark, task, str(length))).random(count)
        for index in range(count):
            prompt = hashlib.sha256(f"{benchmark}/{task}/{length}/{index}".encode()).hexdigest()
            line = {"benchmark": benchmark, "task": task, "index": index, "length": length, "depth": None}
            line["prompt_sha256"] = prompt
            line |= {"prompt_tokens": 4000, "cut_tokens": 120 if index % 50 == 49 else 0}
            line |= {"seconds": 0.5 + 0.1 * float(rng.random()), "adaptation_seconds": 0.0}
            if benchmark == "perplexity":
                positions = list(range(0, length, length // 64))
                level = 2.2 + 0.2 * float(difficulty[index]) - skill
                nll = [level + 0.9 / math.sqrt(1 + 20 * p / length) + 0.03 * float(rng.normal()) for p in positions]
                lines.append(line | {"positions": positions, "nll_by_position": nll, "nll": float(np.mean(nll))})
                continue
            if depths and "single" in task:
                line["depth"] = round((index % depths) / max(depths - 1, 1), 4)
            success = np.clip(mean + skill + 0.9 * (difficulty[index] - 0.5), 0.0, 1.0)
            score = float(rng.random() < success)
            if benchmark == "longbench" and score:
                score = round(float(rng.beta(2, 1)), 4)
            if task in ("niah_multiquery", "niah_multivalue"):
                score = float(rng.binomial(4, success)) / 4
            main, *others = METRICS[benchmark]
            metrics = {main: score} | {other: float(score == 1.0) for other in others}
            response = f"The answer to {index} is {rng.integers(10**6)}." * (1 + index % 9)
            response = HOSTILE[index] if index < len(HOSTILE) else response
            line |= {"response": response, "response_tokens": 12, "answers": [f"answer {index}", "<b>bold</b>"]}
            lines.append(line | {"score": score, "metrics": metrics})
    return lines


def write_run(folder: Path, lines: list[dict[str, Any]], **changes: Any) -> Path:
    """Writes a folder with `run.json` and `samples.jsonl`, as an evaluation does; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    changes.setdefault("name", folder.name)
    (folder / "run.json").write_text(json.dumps(run_record(**changes)), encoding="utf-8")
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (folder / "samples.jsonl").write_bytes(text.encode("utf-8", "backslashreplace"))
    return folder


def paper_tasks(samples: int = 40, lengths: tuple[int, ...] = (4096, 8192, 16384)) -> Tasks:
    """Every task of the paper, with `samples` samples for each length."""
    means = {
        "niah_single_1": 1.6,
        "niah_single_2": 0.9,
        "niah_single_3": 0.5,
        "niah_multikey_1": 0.45,
        "niah_multikey_2": 0.1,
        "niah_multikey_3": -0.6,
        "niah_multiquery": 0.3,
        "niah_multivalue": 0.25,
        "vt": 0.2,
        "cwe": 0.1,
        "fwe": 0.4,
    }
    tasks: Tasks = {("ruler", task, length): (samples, mean - 0.12 * i) for task, mean in means.items() for i, length in enumerate(lengths)}
    tasks |= {("ruler_qa", task, 4096): (samples, 0.15) for task in ("ruler_squadqa", "ruler_hotpotqa")}
    tasks |= {("longbench", task, None): (samples, 0.08 + 0.04 * (i % 7)) for i, task in enumerate(LONGBENCH_TASKS)}
    tasks["perplexity", "perplexity", 16384] = (min(samples, 30), 0.0)
    return tasks
