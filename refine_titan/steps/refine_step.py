"""The ReFINE step on a batch: score, select, roll out, evaluate, reward, update, sync.

Legend: T trunk tokens of a microbatch, n rollouts of this rank, k tokens of a rollout, D hidden channels, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.distributed as dist
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.distributed import ParallelDims
from torchtitan.distributed import utils as dist_utils
from torchtitan.tools.logging import logger

from refine_kernels.linear_head import IGNORE_INDEX
from refine_titan.config.phases import needs_engine
from refine_titan.config.sections import JobConfig
from refine_titan.data.dataloader import TokenBatch
from refine_titan.models.context_shard import ContextShard, gather_rows, rows_after
from refine_titan.models.decoder import DecoderArgs, DecoderOutput, FastWeightDecoder
from refine_titan.models.shared_prefix import SharedPrefixLayout, SnapshotBank
from refine_titan.monitoring.step_metrics import StepMetrics
from refine_titan.objective.advantages import group_advantages
from refine_titan.objective.extensions import find_reward, find_selection
from refine_titan.objective.losses import chosen_logprobs, kl_penalty, policy_loss, token_entropy
from refine_titan.objective.positions import select_positions
from refine_titan.objective.rewards import RewardInputs
from refine_titan.rollout.continuation import evaluate_rollouts, replay_prefixes
from refine_titan.rollout.engine import RolloutEngine, RolloutRequest, Rollouts
from refine_titan.rollout.logprob_gate import importance_weights, refuse_gap
from refine_titan.rollout.native import build_native_engine
from refine_titan.rollout.vllm_settings import build_vllm_engine
from refine_titan.seeding import derive_seed, generator
from refine_titan.validation import advantage_group


@dataclass(frozen=True)
class Selection:
    """Rollouts of one microbatch, and those of them that leave this rank's rows. The i-th of each field belongs together.

    Attributes:
        starts: position of each rollout in the microbatch's stream.
        seeds: of each rollout's draws.
        own: indices of this rank's rollouts.
    """

    starts: tuple[int, ...]
    seeds: tuple[int, ...]
    own: tuple[int, ...]


@dataclass
class Experience:
    """This rank's rollouts of one microbatch and what the update needs of them; all detached.

    Attributes:
        starts: position of each rollout in the microbatch's stream.
        tokens_nk: rollout tokens.
        old_logprobs_nk: log-probabilities by the weights that made the rollouts, recomputed by the trainer.
        advantages_n: one advantage per rollout; None for a stand-in on a rank that has none, which trains nothing.
        weights_nk: what corrects each token's loss for having been sampled by the engine's arithmetic; None for no correction.
    """

    starts: tuple[int, ...]
    tokens_nk: torch.Tensor
    old_logprobs_nk: torch.Tensor
    advantages_n: torch.Tensor | None
    weights_nk: torch.Tensor | None


@dataclass
class TrainingPass:
    """A microbatch's forward with gradient: what the loss is made of."""

    nll_sum: torch.Tensor
    logits_nkV: torch.Tensor | None
    experience: Experience | None


@dataclass
class Normalizers:
    """Tokens of a mini-batch over all ranks: labelled trunk tokens, and rollout tokens."""

    labels: float
    rollout_tokens: float


class RolloutRecorder(Protocol):
    """Takes rollouts to be read by people."""

    def sample_rollouts(
        self,
        step: int,
        batch: TokenBatch,
        starts: Sequence[int],
        rollouts: Rollouts,
        truth_nk: torch.Tensor,
        reward_n: torch.Tensor,
        advantages_n: torch.Tensor,
    ) -> None: ...


class RefineStep:
    """The step, with the model, optimizer and meshes of whoever is derived from it, and a metrics object a batch.

    Attributes:
        step: number of the batch, from which its draws derive.
        update_count: optimizer steps so far: the version of the weights.
        skipped_updates: optimizer steps left out for a gradient norm that was not finite.
    """

    job_config: JobConfig
    model_parts: list[FastWeightDecoder]
    model_args: DecoderArgs
    optimizers: OptimizersContainer
    parallel_dims: ParallelDims
    device: torch.device
    tokenizer: BaseTokenizer
    maybe_enable_amp: AbstractContextManager
    monitor: RolloutRecorder
    metrics: StepMetrics
    step: int

    def begin_steps(self) -> None:
        """Called once, when model, optimizer and meshes are there."""
        self.refine = self.job_config.refine
        self.seed = self.job_config.debug.seed
        self.update_count = 0
        self.skipped_updates = 0
        self.num_mini_batches = self.refine.num_mini_batches
        self.dp_group = self.parallel_dims.get_mesh("batch").get_group() if self.parallel_dims.dp_enabled else None
        self.dp_rank = dist.get_rank(self.dp_group) if self.dp_group is not None else 0
        self.dp_degree = dist.get_world_size(self.dp_group) if self.dp_group is not None else 1
        # Ranks with the same batch, each with a part of its rows; and those that together have every row of every batch once.
        self.context_group = self.parallel_dims.get_mesh("cp").get_group() if self.parallel_dims.cp_enabled else None
        self.rows_group = self.parallel_dims.get_mesh("loss").get_group() if self.parallel_dims.dp_cp_enabled else None
        self.group_size = self.refine.rollouts_per_position
        if advantage_group(self.job_config) == "sequence":
            self.group_size *= self.refine.num_chunks
        self.selection_rule, self.reward_function = find_selection(self.refine.selection), find_reward(self.refine.reward)
        self.engine = self.build_engine() if needs_engine(self.job_config) else None

    def build_engine(self) -> RolloutEngine:
        """The engine that `[rollout] engine` names."""
        if self.job_config.rollout.engine == "native":
            return build_native_engine(self.job_config, self.model_parts[0], lambda: self.maybe_enable_amp)
        mesh = self.parallel_dims.get_optional_mesh("tp")
        return build_vllm_engine(self.job_config, self.model_args, self.model_parts[0], self.device, self.rows_group, mesh)

    def train_on(self, batches: list[TokenBatch], size: int) -> None:
        """Rollouts from the current weights, then one optimizer step per mini-batch of `size` microbatches."""
        self.num_microbatches, self.num_mini_batches = len(batches), -(-len(batches) // size)
        # The forward of each microbatch, run when its mini-batch is due.
        if self.refine.objective == "ntp":
            passes = [partial(self.trunk_pass, batch) for batch in batches]
        elif self.scores_in_training_pass:
            passes = [partial(self.rollout_pass, batch, i) for i, batch in enumerate(batches)]
        else:
            with torch.no_grad():
                experiences = [self.rollout_pass(batch, i).experience for i, batch in enumerate(batches)]
            passes = [partial(self.shared_prefix_pass, *pair) for pair in zip(batches, experiences)]

        for start in range(0, len(batches), size):
            normalizers = self.count(batches[start : start + size])
            self.update([partial(self.pass_loss, run_pass, normalizers) for run_pass in passes[start : start + size]])

    @property
    def scores_in_training_pass(self) -> bool:
        """Whether the scoring pass is the training forward: with one optimizer step per batch its weights are the same."""
        return self.refine.scoring_pass != "separate" and self.num_mini_batches == 1

    def rollout_pass(self, batch: TokenBatch, microbatch: int) -> TrainingPass:
        """Score, select, roll out, evaluate and reward one microbatch. With gradient enabled, trunk loss and rollout
        logits carry it, through the whole prefix of every rollout."""
        shard = self.shard_of(batch)
        with self.metrics.stage("score"):
            scored, bank = self.score(batch, shard)
        with self.metrics.stage("select"):
            selection = self.select(gather_rows(scored.losses.entropy_T, shard), batch, microbatch, shard)
            # A rank without rollouts makes one that counts for nothing: ranks make equally many forwards.
            starts = tuple(selection.starts[i] for i in selection.own) or (shard.end_row,)
            seeds = tuple(selection.seeds[i] for i in selection.own) or (0,)
        if self.engine.weight_version != self.update_count:
            with self.metrics.stage("sync"):
                self.engine.sync_weights(self.update_count)
        with self.metrics.stage("rollout"):
            prefix = replay_prefixes(self.forward, bank, batch.tokens_T, starts)
            request = RolloutRequest(
                batch.tokens_T,
                batch.cu_seqlens,
                starts,
                seeds,
                self.refine.rollout_length,
                self.refine.temperature,
                self.update_count,
            )
            rollouts = self.engine.generate(request, prefix)
            if self.scores_in_training_pass or microbatch == self.num_microbatches - 1:
                self.engine.sleep()  # a backward follows
            self.metrics.add(prefilled_tokens=rollouts.prefilled_tokens)
        with self.metrics.stage("evaluate"):
            evaluation = evaluate_rollouts(self.forward, prefix, rollouts.tokens_nk)
            old_logprobs_nk = chosen_logprobs(evaluation.logits_nkV.detach(), rollouts.tokens_nk, self.refine.temperature)
            refuse_gap(self.job_config.rollout.max_logprob_gap, request, rollouts, old_logprobs_nk)
        with self.metrics.stage("reward"), torch.no_grad():
            advantages_n = self.reward(batch, shard, selection, scored.hidden_TD, rollouts, evaluation.hidden_nkD, old_logprobs_nk)
        weights_nk = importance_weights(old_logprobs_nk, rollouts.logprobs_nk, self.job_config.rollout.importance_ratio_cap)
        if advantages_n is not None:
            self.metrics.add_gap(rollouts.logprobs_nk, old_logprobs_nk)
            self.metrics.add(importance_weight=rollouts.tokens_nk.numel() if weights_nk is None else weights_nk.sum())
        experience = Experience(starts, rollouts.tokens_nk, old_logprobs_nk, advantages_n, weights_nk)
        return TrainingPass(scored.losses.nll_sum, evaluation.logits_nkV, experience)

    def shard_of(self, batch: TokenBatch) -> ContextShard:
        """This rank's rows of a microbatch."""
        return ContextShard.of_rank(batch.cu_seqlens, self.context_group)

    def score(self, batch: TokenBatch, shard: ContextShard) -> tuple[DecoderOutput, SnapshotBank]:
        """Entropy and hidden state of every token of the shard, and the states at regular boundaries. The loss comes along
        where this pass is the training forward."""
        stride = self.model_args.snapshot_stride(self.refine.snapshot_stride)
        positions = shard.local(SnapshotBank.boundaries(shard, stride))
        out = self.forward(
            batch.tokens_T[shard.rows],
            SharedPrefixLayout(shard.local_cu_seqlens, state_positions=positions, shard=shard),
            labels=batch.labels_T[shard.rows] if torch.is_grad_enabled() else None,
            entropy=True,
        )
        bank = SnapshotBank.from_forward(shard, stride, out.states)
        return out._replace(states=[]), bank

    def select(self, entropy_T: torch.Tensor, batch: TokenBatch, microbatch: int, shard: ContextShard) -> Selection:
        """Rollout starts in the microbatch's stream, each position repeated for its rollouts, and every rollout's seed."""
        refine, starts, seeds = self.refine, [], []
        entropy_T = entropy_T.cpu()
        for row in range(batch.num_sequences):
            sequence = self.sequence_name(batch, microbatch, row)
            offset, end = batch.cu_sequences[row : row + 2]
            positions = select_positions(
                entropy_T[offset:end],
                batch.documents_of_sequence(row),
                num_chunks=refine.num_chunks,
                rollout_length=refine.rollout_length,
                selection=self.selection_rule,
                temperature=refine.selection_temperature,
                generator=generator(self.seed, "positions", self.step, sequence),
            )
            for chunk, position in enumerate(positions):
                for sample in range(refine.rollouts_per_position):
                    starts.append(offset + position)
                    seeds.append(derive_seed(self.seed, "rollout", self.step, sequence, chunk, sample))
        return Selection(tuple(starts), tuple(seeds), tuple(i for i, start in enumerate(starts) if shard.owns(start)))

    def reward(
        self,
        batch: TokenBatch,
        shard: ContextShard,
        selection: Selection,
        hidden_TD: torch.Tensor,
        rollouts: Rollouts,
        rollout_hidden_nkD: torch.Tensor,
        logprobs_nk: torch.Tensor,
    ) -> torch.Tensor | None:
        """Advantages of this rank's rollouts, from the rewards of all rollouts of the microbatch; None if it has none."""
        k = self.refine.rollout_length
        if shard.group is not None:
            # The true continuation of a rollout may lie behind the border.
            hidden_TD = torch.cat([hidden_TD, rows_after(hidden_TD[:k], shard)])
        reward_all = torch.zeros(len(selection.starts), device=self.device)
        if selection.own:
            own = torch.tensor(selection.own, device=self.device)
            starts = tuple(selection.starts[i] for i in selection.own)
            truth_rows = torch.tensor(starts, device=self.device)[:, None] + torch.arange(k, device=self.device)
            truth_nk = batch.tokens_T[truth_rows]
            true_hidden_nkD = hidden_TD[truth_rows - shard.first_row]
            inputs = RewardInputs(rollouts.tokens_nk, truth_nk, rollout_hidden_nkD, true_hidden_nkD, logprobs_nk, self.tokenizer.decode)
            reward_n = self.reward_function(inputs)
            reward_all[own] = reward_n
        if shard.group is not None:
            dist.all_reduce(reward_all, group=shard.group)
        advantages_all = group_advantages(reward_all, self.group_size, divide_by_std=self.refine.divide_advantage_by_std)
        if not selection.own:
            return None
        advantages_n = advantages_all[own]
        self.metrics.add(
            rollouts=len(own),
            rollout_tokens=truth_nk.numel(),
            matches=(rollouts.tokens_nk == truth_nk).sum(),
            reward=reward_n.sum(),
            reward_squared=reward_n.double().square().sum(),
            advantage=advantages_n.sum(),
            advantage_squared=advantages_n.double().square().sum(),
        )
        self.metrics.add_builtin_rewards(inputs)
        self.monitor.sample_rollouts(self.step, batch, starts, rollouts, truth_nk, reward_n, advantages_n)
        return advantages_n

    def sequence_name(self, batch: TokenBatch, microbatch: int, row: int) -> int | str:
        """What tells a sequence's draws from those of others in the step: its number in the global batch."""
        return (microbatch * self.job_config.training.local_batch_size + row) * self.dp_degree + self.dp_rank

    def trunk_pass(self, batch: TokenBatch) -> TrainingPass:
        """Next-token loss only."""
        shard = self.shard_of(batch)
        layout = SharedPrefixLayout(shard.local_cu_seqlens, shard=shard)
        with self.metrics.stage("update"):
            out = self.forward(batch.tokens_T[shard.rows], layout, labels=batch.labels_T[shard.rows])
        return TrainingPass(out.losses.nll_sum, None, None)

    def shared_prefix_pass(self, batch: TokenBatch, experience: Experience) -> TrainingPass:
        """One forward over the shard of the trunk and its rollouts."""
        shard = self.shard_of(batch)
        starts = tuple(start - shard.first_row for start in experience.starts)
        layout = SharedPrefixLayout(shard.local_cu_seqlens, starts, self.refine.rollout_length, shard=shard)
        stream = torch.cat([batch.tokens_T[shard.rows], experience.tokens_nk.flatten()])
        with self.metrics.stage("update"):
            out = self.forward(stream, layout, labels=batch.labels_T[shard.rows], logit_rows=layout.predicting_rows())
        return TrainingPass(out.losses.nll_sum, out.logits, experience)

    def update(self, losses: list[Callable[[], torch.Tensor]]) -> None:
        """One optimizer step: the loss and backward of each microbatch, then clip and step. Leaves no gradients behind."""
        for microbatch_loss in losses:
            loss = microbatch_loss()
            with self.metrics.stage("update"):
                loss.backward()
            del loss
        with self.metrics.stage("update"):
            grad_norm = dist_utils.clip_grad_norm_(
                [p for part in self.model_parts for p in part.parameters()], self.job_config.training.max_norm, foreach=True
            ).item()
            self.before_optimizer_step()
            self.metrics.grad_norms.append(grad_norm)
            if math.isfinite(grad_norm):
                self.optimizers.step()
                self.update_count += 1
            else:
                self.skipped_updates += 1
                self.metrics.skipped_updates += 1
                logger.warning(f"Step {self.step}: the gradient norm is {grad_norm}; this optimizer step is skipped")
            self.optimizers.zero_grad()

    def before_optimizer_step(self) -> None:
        """What must be awaited before weights change."""

    def pass_loss(self, run_pass: Callable[[], TrainingPass], normalizers: Normalizers) -> torch.Tensor:
        """A forward and its loss."""
        training_pass = run_pass()
        with self.metrics.stage("update"):
            return self.loss(training_pass, normalizers)

    def loss(self, training_pass: TrainingPass, normalizers: Normalizers) -> torch.Tensor:
        """This rank's share of the mini-batch's loss: sums over its tokens by the counts over all ranks, so that
        gradients add up to those of the mean."""
        refine, experience = self.refine, training_pass.experience
        loss = refine.ntp_coef * training_pass.nll_sum / normalizers.labels
        self.metrics.add(nll=training_pass.nll_sum.detach())
        if experience is None:
            return loss
        if experience.advantages_n is None:
            return loss + 0.0 * training_pass.logits_nkV.sum()
        logprobs_nk = chosen_logprobs(training_pass.logits_nkV, experience.tokens_nk, refine.temperature)
        policy = policy_loss(
            logprobs_nk,
            experience.old_logprobs_nk,
            experience.advantages_n[:, None],
            clip_low=refine.clip_low,
            clip_high=refine.clip_high,
            clip_dual=refine.clip_dual,
            weights=experience.weights_nk,
        )
        with torch.set_grad_enabled(refine.kl_coef > 0):
            penalty = kl_penalty(logprobs_nk, experience.old_logprobs_nk)
        with torch.set_grad_enabled(refine.entropy_coef > 0):
            entropy = token_entropy(training_pass.logits_nkV, refine.temperature).sum()
        self.metrics.add(
            policy_loss=policy.loss.detach(),
            policy_tokens=logprobs_nk.numel(),
            clipped=policy.clipped + policy.clipped_dual,
            kl=policy.kl,
            kl_penalty=penalty.detach(),
            rollout_entropy=entropy.detach(),
        )
        rollout_loss = refine.rl_coef * policy.loss + refine.kl_coef * penalty - refine.entropy_coef * entropy
        return loss + rollout_loss / normalizers.rollout_tokens

    def count(self, batches: list[TokenBatch]) -> Normalizers:
        """Tokens of a mini-batch over all ranks."""
        labels = sum(batch.num_labels for batch in batches)
        for batch in batches:
            own_labels_T = batch.labels_T[self.shard_of(batch).rows]
            self.metrics.add(labels=(own_labels_T != IGNORE_INDEX).sum(), tokens=own_labels_T.shape[0])
        all_labels = dist_utils.dist_sum(torch.tensor(labels, device=self.device), self.parallel_dims.get_optional_mesh("batch"))
        sequences = sum(batch.num_sequences for batch in batches) * self.dp_degree
        rollouts = sequences * self.refine.num_chunks * self.refine.rollouts_per_position
        return Normalizers(all_labels, rollouts * self.refine.rollout_length)

    def forward(self, *args, **kwargs) -> DecoderOutput:
        """The model in the run's compute precision."""
        with self.maybe_enable_amp:
            return self.model_parts[0](*args, **kwargs)
