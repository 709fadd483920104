"""Answers prompts with weights that were first adapted to them (test-time training)."""

import time
from collections.abc import Sequence
from typing import Any

from refine_titan.evaluation.answering import Answer, EngineAnswerer
from refine_titan.evaluation.prompts import AnswerProtocol, Prompt
from refine_titan.steps.test_time import TestTimeTrainer

# Values that an adaptation reports besides its time.
REPORTED = ("optimizer_steps", "skipped_updates", "too_short", "ntp_loss", "reward_mean", "match_mean")


class AdaptedAnswerer:
    """Adapts the weights to a batch, answers it, and restores the weights unless `ttt.carry_over` is set.

    A resumed evaluation has the same batches as one that was not interrupted: the weights are adapted to every prompt of a batch,
    also to prompts that were answered before the interruption.
    """

    def __init__(self, trainer: TestTimeTrainer, protocol: AnswerProtocol, seed: int):
        self.trainer, self.seed = trainer, seed
        self.batch_size, self.in_order = trainer.ttt.batch_size, trainer.ttt.carry_over
        self._answers = EngineAnswerer(trainer.completions, protocol, trainer.inference.tokenizer, seed, self.batch_size)

    def answer(self, batch: Sequence[Prompt], todo: Sequence[Prompt]) -> list[Answer]:
        adapted = self.trainer.adapt([prompt.tokens for prompt in batch], seed=self.seed)
        answers = self._answers.answer(batch, todo) if todo else []
        begin = time.perf_counter()
        self.trainer.restore()
        seconds = (adapted["seconds"] + time.perf_counter() - begin) / len(batch)
        report: dict[str, Any] = {name: adapted[name] for name in REPORTED}
        return [
            answer._replace(adaptation_seconds=seconds, adaptation=report | {"learnt_from": self.trainer.learns_from(prompt.tokens)})
            for prompt, answer in zip(todo, answers)
        ]
