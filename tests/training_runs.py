"""Makes folders of training runs from a seed: metrics that fall and rise as those of real runs, and rollouts token by token."""

import json
import math
import random
from pathlib import Path
from typing import Any

WORDS = ("def ", "return", " self", ".", "(", ")", ":\n", "    ", " import", " the", " of", " state", "\n", " tokens", " é", "", "日本")


def rollout_line(step: int, index: int, seed: int = 0, k: int = 5) -> dict[str, Any]:
    """Makes a line of `rollouts.jsonl`; token i has the text `WORDS[i]`."""
    rng = random.Random(seed * 1_000_003 + step * 8 + index)
    truth = [rng.randrange(len(WORDS)) for _ in range(k)]
    sampled = [token if rng.random() < 0.4 else rng.randrange(len(WORDS)) for token in truth]
    matches = sum(a == b for a, b in zip(sampled, truth))
    return {
        "step": step,
        "document": f"folder/module_{rng.randrange(300)}.py:{rng.randrange(40)}",
        "position": rng.randrange(64, 4096),
        "prefix_tail": "".join(rng.choices(WORDS, k=64)),
        "rollout": "".join(WORDS[i] for i in sampled),
        "truth": "".join(WORDS[i] for i in truth),
        "rollout_tokens": sampled,
        "truth_tokens": truth,
        "rollout_texts": [WORDS[i] for i in sampled],
        "truth_texts": [WORDS[i] for i in truth],
        "reward": matches / k,
        "advantage": (matches / k - 0.4) / 0.2,
        "engine": "native",
        "weight_version": step - 1,
    }


def metrics_line(step: int, steps: int) -> dict[str, Any]:
    """Makes a line of `metrics.jsonl`."""
    rng = random.Random(step)
    fall = math.exp(-4 * step / steps)
    return {
        "step": step,
        "refine/ntp_loss": 2 + 4 * fall + 0.1 * rng.random(),
        "rollout/reward_mean": 0.5 - 0.3 * fall + 0.1 * rng.random(),
        "rollout/match_mean": 0.4 - 0.4 * fall + 0.05 * rng.random(),
        "grad_norm": 40.0 if step == 2 else 1 + rng.random(),
        "lr": 2e-3 * min(step / 20, 1) * (1 - step / steps),
        "rollout/entropy": 1 + 3 * fall,
        "timing/tokens_per_second": 1800 + 50 * rng.random(),
    }


def write_training_run(folder: Path, steps: int, rollouts_per_step: int = 8) -> Path:
    """Writes a run's folder; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    metrics = [metrics_line(step, steps) for step in range(1, steps + 1)]
    rollouts = [rollout_line(step, index) for step in range(1, steps + 1) for index in range(rollouts_per_step)]
    for name, lines in (("metrics", metrics), ("rollouts", rollouts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
