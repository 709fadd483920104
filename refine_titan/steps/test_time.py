"""Test-time training: adapts the weights to prompts before they are answered, and brings them back afterwards.

    with TestTimeTrainer.from_config(config, checkpoint, width=8) as trainer:
        for prompts in batches:                       # of config.ttt.batch_size prompts
            metrics = trainer.adapt(prompts)
            answers = trainer.completions.complete(request, trainer.inference.tokenizer.decode)
            trainer.restore()                         # does nothing with ttt.carry_over

An adaptation's draws come from the seed, the prompt's tokens and the round, so that with `restore` the answers to a batch do not
depend on what was adapted to before it.
"""

import hashlib
import time
from array import array
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torchtitan.components.optimizer import build_optimizers

from refine_titan.config.sections import JobConfig
from refine_titan.data.dataloader import PackedSequence, TokenBatch, least_prompt_tokens, pack
from refine_titan.errors import UserError
from refine_titan.inference import Inference
from refine_titan.monitoring.step_metrics import StepMetrics
from refine_titan.rollout.completion import CompletionEngine
from refine_titan.rollout.engine import RolloutEngine
from refine_titan.rollout.native import build_native_engine
from refine_titan.rollout.vllm_engine import VLLMEngine
from refine_titan.rollout.vllm_settings import (
    PAGES_OF_A_SEQUENCE,
    config_json,
    engine_settings,
    sequence_bytes,
    unwritten_args,
    validate_engine,
)
from refine_titan.steps.refine_step import RefineStep


class TestTimeTrainer(RefineStep):
    """A model that learns from prompts before it answers them.

    Attributes:
        inference: the model, its tokenizer and device.
        completions: answers with the weights as they are.
    """

    # pytest collects classes by their name.
    __test__ = False

    def __init__(self, inference: Inference, width: int, max_tokens: int):
        self.inference, self.job_config = inference, inference.config
        self.model_parts, self.model_args = [inference.model], inference.args
        self.parallel_dims, self.device, self.tokenizer = inference.parallel_dims, inference.device, inference.tokenizer
        self.ttt = self.job_config.ttt
        self._width, self._max_tokens = width, max_tokens
        self.optimizers = build_optimizers(self.model_parts, self.job_config.optimizer, self.parallel_dims)
        self.monitor, self.metrics, self.step = _NoRecords(), StepMetrics(), 0
        self.begin_steps()
        self.completions: CompletionEngine = self._completion_engine()
        self._is_adapted = False
        # All of a model's weights change. The optimizer starts with no state, which takes no memory to go back to.
        self._start = None if self.ttt.carry_over else [self._kept(p) for p in inference.model.parameters()]

    @classmethod
    def from_config(
        cls,
        config: JobConfig,
        checkpoint: str | Path | None = None,
        *,
        width: int = 8,
        max_tokens: int | None = None,
        engine: Literal["native", "vllm"] | None = None,
    ) -> Self:
        """Builds the model, reads its weights, and builds what adapts and answers.

        Args:
            config: validated, with `refine.phase = "ttt"`.
            checkpoint: as in `Inference.from_config`.
            width: answers decoded at once.
            max_tokens: longest prompt and answer together (vLLM); None for `training.seq_len`.
            engine: what samples rollouts and answers; None for `rollout.engine`.

        Raises:
            UserError: if the config is of another phase, asks for float8, or the checkpoint is not of its model.
        """
        if config.refine.phase != "ttt":
            raise UserError(f"refine.phase is {config.refine.phase!r}; test-time training needs 'ttt'")
        if config.model.converters:
            raise UserError(f"model.converters is {config.model.converters}; test-time training supports none")
        config = replace(config, rollout=replace(config.rollout, engine=engine or config.rollout.engine))
        inference = Inference.from_config(config, checkpoint, trainable=True)
        return cls(inference, width, max_tokens or config.training.seq_len)

    def adapt(self, prompts: Sequence[Sequence[int]], steps: int | None = None, seed: int | None = None) -> dict[str, Any]:
        """Takes `steps` optimizer steps on the prompts' tokens, one mini-batch each; further rounds over the prompts begin with new
        rollouts. Prompts too short to learn from are left out and counted.

        Args:
            steps: None for `ttt.steps`.
            seed: of positions and rollouts; None for `debug.seed`.

        Returns:
            `optimizer_steps` that were taken, `skipped_updates` (gradient not finite), `too_short` prompts, `ntp_loss`,
            `reward_mean` and `match_mean` of each round (None where the objective has none), `seconds`.
        """
        begin = time.perf_counter()
        self.seed = self.job_config.debug.seed if seed is None else seed
        steps, rounds, before = self.ttt.steps if steps is None else steps, [], self.update_count
        used = [prompt for prompt in prompts if self.learns_from(prompt)]
        batches, size = self._microbatches(used)
        taken = 0
        while batches and taken < steps:
            self.step, self.metrics = len(rounds) + 1, StepMetrics()
            self._is_adapted = True
            self.train_on(batches[: (steps - taken) * size], size)
            taken += self.num_mini_batches
            rounds.append(self.metrics.result(self.refine, None))
        self._sync()
        return {
            "optimizer_steps": self.update_count - before,
            "skipped_updates": taken - (self.update_count - before),
            "too_short": len(prompts) - len(used),
            **{name: [result[name] for result in rounds] for name in ("ntp_loss", "reward_mean", "match_mean")},
            "seconds": time.perf_counter() - begin,
        }

    def learns_from(self, prompt: Sequence[int]) -> bool:
        """Whether a prompt is long enough for a rollout."""
        return len(prompt) >= least_prompt_tokens(self.job_config)

    @torch.no_grad()
    def restore(self) -> None:
        """Brings weights and optimizer back to what they were at the start, bit for bit; nothing with `ttt.carry_over`."""
        if not self._is_adapted or self._start is None:
            return
        for parameter, start in zip(self.inference.model.parameters(), self._start):
            parameter.copy_(start)
        for optimizer in self.optimizers:
            optimizer.state.clear()
        self.update_count += 1  # another version of the weights
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

    @property
    def maybe_enable_amp(self) -> AbstractContextManager:
        return self.inference.amp()

    def sequence_name(self, batch: TokenBatch, microbatch: int, row: int) -> str:
        return batch.document_names[row]

    def build_engine(self) -> RolloutEngine:
        if self.job_config.rollout.engine == "native":
            return build_native_engine(self.job_config, self.inference.model, self.inference.amp)
        validate_engine(self.job_config, self.model_args)
        settings = engine_settings(self.job_config, self.model_args)
        num_seqs = max(settings.max_num_seqs, self._width)
        pages = PAGES_OF_A_SEQUENCE[settings.prefixes] * num_seqs + 1  # one more, which vLLM keeps for itself
        settings = replace(
            settings,
            max_model_len=self._max_tokens + self.refine.rollout_length,
            max_num_seqs=num_seqs,
            max_num_batched_tokens=max(settings.max_num_batched_tokens, num_seqs),
            cache_bytes=max(settings.cache_bytes, pages * sequence_bytes(self.job_config, self.model_args)),
        )
        args = self.model_args
        return VLLMEngine(self.inference.model, config_json(args), unwritten_args(args), settings, self.device)

    def _completion_engine(self) -> CompletionEngine:
        if self.job_config.rollout.engine == "native":
            return self.inference.build_engine("native", width=self._width, max_tokens=self._max_tokens)
        if self.engine is None:
            self.engine = self.build_engine()  # the objective has no rollouts
        self._sync()
        return self.engine

    def _sync(self) -> None:
        if self.engine is not None and self.engine.weight_version != self.update_count:
            self.engine.sync_weights(self.update_count)

    def _kept(self, parameter: torch.Tensor) -> torch.Tensor:
        return parameter.detach().to("cpu" if self.ttt.keep_on_cpu else parameter.device, copy=True)

    def _microbatches(self, prompts: Sequence[Sequence[int]]) -> tuple[list[TokenBatch], int]:
        """Packed prompts, and how many microbatches make a mini-batch."""
        per_mini_batch = self.ttt.mini_batch_size
        per_microbatch = min(self.job_config.training.local_batch_size, per_mini_batch)
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
                batches.append(pack([PackedSequence([(list(prompts[i]), names[i])]) for i in chosen]).to(self.device))
        return batches, -(-per_mini_batch // per_microbatch)


class _NoRecords:
    """Keeps no rollouts."""

    def sample_rollouts(self, *_) -> None:
        pass
