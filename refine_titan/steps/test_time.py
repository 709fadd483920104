"""Test-time training: adapts the weights to prompts before the model answers them, and restores the weights afterwards.

    with TestTimeTrainer.from_config(config, checkpoint, width=8) as trainer:
        for prompts in batches:                       # of config.ttt.batch_size prompts
            metrics = trainer.adapt(prompts)
            answers = trainer.completions.complete(request, trainer.inference.tokenizer.decode)
            trainer.restore()                         # no effect with ttt.carry_over

Draws come from the seed, the prompt's tokens and the round: with `restore`, the answers to a batch do not depend on the batches before it.
"""

import hashlib
import time
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torchtitan.components.optimizer import build_optimizers

from refine_titan.config.batch_plan import RoundSizes
from refine_titan.config.sections import JobConfig
from refine_titan.data.dataloader import TokenBatch, pack
from refine_titan.data.packing import PackedSequence
from refine_titan.data.streams import least_prompt_tokens
from refine_titan.errors import UserError
from refine_titan.estimation.checkpointing_choice import choose_checkpointing
from refine_titan.inference import Inference
from refine_titan.rollout.build import EngineName, build_both_engines
from refine_titan.steps.refine_step import RefineStep
from refine_titan.steps.runtime import StepRuntime

# What an adaptation reports of each round, and the step's metric that it is.
METRICS_OF_A_ROUND = {"ntp_loss": "refine/ntp_loss", "reward_mean": "rollout/reward_mean", "match_mean": "rollout/match_mean"}


class TestTimeTrainer:
    """A model that learns from prompts before it answers them.

    Attributes:
        inference: the model, its tokenizer and device.
        completions: the engine that answers, with the present weights.
    """

    # pytest collects classes by their name.
    __test__ = False

    def __init__(self, inference: Inference, width: int, max_tokens: int):
        """
        Args:
            inference: built with `trainable=True`.
            width: answers decoded at once.
            max_tokens: most tokens of a prompt and its answer together (vLLM).
        """
        self.inference, self.config, self.ttt = inference, inference.config, inference.config.ttt
        optimizers = build_optimizers([inference.model], self.config.optimizer, inference.parallel_dims)
        rounds = RoundSizes.without_estimate(self.config, -(-self.ttt.batch_size // self._prompts_per_microbatch))
        runtime = StepRuntime(
            self.config,
            inference.model,
            optimizers,
            inference.parallel_dims,
            inference.device,
            precision=inference.amp,
            round_sizes=rounds,
        )
        self.engine, self.completions = build_both_engines(self.config, runtime.engine_host, width=width, max_tokens=max_tokens)
        self.refine_step = RefineStep(runtime, self.engine, NoRecords(), inference.tokenizer.decode, sequence_name=document_name)
        self._sync()
        self._is_adapted = False
        # A copy of all weights. The optimizer starts without state, so that there is nothing of it to copy.
        self._start = None if self.ttt.carry_over else [self._kept(p) for p in inference.model.parameters()]

    @classmethod
    def from_config(
        cls,
        config: JobConfig,
        checkpoint: str | Path | None = None,
        *,
        width: int = 8,
        max_tokens: int | None = None,
        engine: EngineName | None = None,
    ) -> Self:
        """Builds the model, reads its weights, and builds the engines that sample rollouts and answers.

        Args:
            config: validated, with `refine.phase = "ttt"`.
            checkpoint: as in `Inference.from_config`.
            width: answers decoded at once.
            max_tokens: most tokens of a prompt and its answer together (vLLM); None for `training.seq_len`.
            engine: name of the engine that samples rollouts and answers; None for `rollout.engine`.

        Raises:
            UserError: if the config has another phase, asks for float8, or the checkpoint holds another model.
        """
        if config.refine.phase != "ttt":
            raise UserError(f"refine.phase is {config.refine.phase!r}; test-time training needs 'ttt'")
        if config.model.converters:
            raise UserError(f"model.converters is {config.model.converters}; test-time training supports none")
        config = replace(config, rollout=replace(config.rollout, engine=engine or config.rollout.engine))
        config = choose_checkpointing(config, num_ranks=1).config
        inference = Inference.from_config(config, checkpoint, trainable=True)
        return cls(inference, width, max_tokens or config.training.seq_len)

    def adapt(self, prompts: Sequence[Sequence[int]], steps: int | None = None, seed: int | None = None) -> dict[str, Any]:
        """Takes `steps` optimizer steps on the prompts' tokens, each on one mini-batch. If there are fewer mini-batches, further rounds
        over the prompts follow, each with new rollouts. Prompts too short to learn from are left out and counted.

        Args:
            steps: number of optimizer steps; None for `ttt.steps`.
            seed: seed of positions and rollouts; None for `debug.seed`.

        Returns:
            `optimizer_steps`: steps taken; `skipped_updates`: steps whose gradient was not finite; `too_short`: prompts left out;
            `ntp_loss`, `reward_mean`, `match_mean`: a value per round, None where the objective has none; `seconds`.
        """
        begin = time.perf_counter()
        step = self.refine_step
        step.seed = self.config.debug.seed if seed is None else seed
        steps, rounds, before = self.ttt.steps if steps is None else steps, [], step.update_count
        used = [prompt for prompt in prompts if self.learns_from(prompt)]
        batches, size = self._microbatches(used)
        taken = 0
        while batches and taken < steps:
            metrics = step.begin(len(rounds) + 1)
            self._is_adapted = True
            taken += step.run(batches[: (steps - taken) * size], size)
            rounds.append(metrics.result(self.config.refine, None))
        self._sync()
        return {
            "optimizer_steps": step.update_count - before,
            "skipped_updates": taken - (step.update_count - before),
            "too_short": len(prompts) - len(used),
            **{field: [result[metric] for result in rounds] for field, metric in METRICS_OF_A_ROUND.items()},
            "seconds": time.perf_counter() - begin,
        }

    def learns_from(self, prompt: Sequence[int]) -> bool:
        """Says whether a prompt is long enough for a rollout."""
        return len(prompt) >= least_prompt_tokens(self.config)

    @torch.no_grad()
    def restore(self) -> None:
        """Restores weights and optimizer as they were at the start, bit for bit; does nothing with `ttt.carry_over`."""
        if not self._is_adapted or self._start is None:
            return
        for parameter, start in zip(self.inference.model.parameters(), self._start):
            parameter.copy_(start)
        for optimizer in self.refine_step.runtime.optimizers:
            optimizer.state.clear()
        self.refine_step.update_count += 1  # another version of the weights
        self._is_adapted = False
        self._sync()

    def close(self) -> None:
        """Releases the engine and the process group."""
        if self.engine is not None:
            self.engine.close()
        self.inference.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _sync(self) -> None:
        version = self.refine_step.update_count
        if self.engine is not None and self.engine.weight_version != version:
            self.engine.sync_weights(version)

    def _kept(self, parameter: torch.Tensor) -> torch.Tensor:
        return parameter.detach().to("cpu" if self.ttt.keep_on_cpu else parameter.device, copy=True)

    @property
    def _prompts_per_microbatch(self) -> int:
        return min(self.config.training.local_batch_size, self.ttt.mini_batch_size)

    def _microbatches(self, prompts: Sequence[Sequence[int]]) -> tuple[list[TokenBatch], int]:
        """Packs prompts into microbatches; returns them, and how many make a mini-batch."""
        per_mini_batch, per_microbatch = self.ttt.mini_batch_size, self._prompts_per_microbatch
        names, seen = [], Counter()
        for prompt in prompts:
            digest = hashlib.blake2b(array("q", prompt).tobytes(), digest_size=16).hexdigest()
            names.append(f"{digest}/{seen[digest]}")
            seen[digest] += 1
        batches = []
        for start in range(0, len(prompts), per_mini_batch):
            end = min(start + per_mini_batch, len(prompts))
            for begin in range(start, end, per_microbatch):
                chosen = range(begin, min(begin + per_microbatch, end))
                batches.append(pack([PackedSequence([(list(prompts[i]), names[i])]) for i in chosen]).to(self.inference.device))
        return batches, -(-per_mini_batch // per_microbatch)


def document_name(batch: TokenBatch, microbatch: int, sequence: int) -> str:
    """Names a prompt by its tokens, so that its draws do not depend on the other prompts."""
    return batch.document_names[sequence]


class NoRecords:
    """A recorder that keeps nothing."""

    def record_rollouts(self, *_) -> None:
        pass
