"""The ReFINE step on a batch (arXiv 2602.16704, section 3): score, select, roll out, rescore, reward, update.

`RefineStep.run` takes the batch; `score_and_select` and `experience_pass` have the verbs before the update, one per line; between them the
engine samples the rollouts of several microbatches in one round. `experience.py` has what a microbatch brings from one verb to the next.
The mathematics is in `objective/`.

Legend: T trunk tokens of a microbatch on this rank, n rollouts of this rank, N rollouts of all ranks that share the microbatch,
k tokens of a rollout, D hidden channels, V vocabulary.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Protocol

import torch
import torch.distributed as dist
from torchtitan.distributed import utils as dist_utils
from torchtitan.tools.logging import logger

from refine_kernels.linear_head import IGNORE_INDEX
from refine_kernels.packing import on_device, on_host
from refine_titan.config.batch_plan import round_parts
from refine_titan.data.dataloader import TokenBatch
from refine_titan.models.context_shard import ContextShard, gather_rows, rows_after
from refine_titan.models.decoder import DecoderOutput
from refine_titan.models.shared_prefix import SharedPrefixLayout, SnapshotBank, read_with_snapshots
from refine_titan.monitoring.step_metrics import StepMetrics
from refine_titan.objective.advantages import group_advantages
from refine_titan.objective.extensions import find_reward, find_selection
from refine_titan.objective.losses import chosen_logprobs, kl_penalty, policy_loss, token_entropy
from refine_titan.objective.positions import select_positions
from refine_titan.objective.rewards import RewardInputs
from refine_titan.rollout.continuation import replay_prefixes
from refine_titan.rollout.engine import PrefixStates, RolloutEngine, RolloutRequest, Rollouts
from refine_titan.seeding import derive_seed, generator
from refine_titan.steps.checked_rollouts import CheckedRollouts, check_rollouts, sample_together
from refine_titan.steps.experience import Experience, Normalizers, ScoredMicrobatch, Selection, TrainingPass
from refine_titan.steps.runtime import StepRuntime


class RolloutRecorder(Protocol):
    """Takes rollouts to be read by people."""

    def record_rollouts(
        self,
        step: int,
        batch: TokenBatch,
        starts: Sequence[int],
        rollouts: Rollouts,
        truth_nk: torch.Tensor,
        reward_n: torch.Tensor,
        advantages_n: torch.Tensor,
    ) -> None: ...


SequenceNames = Callable[[TokenBatch, int, int], int | str]
"""Takes a microbatch, its number, and the number of a sequence in it; returns the name from which the draws of that sequence derive, unique
in the step."""


class RefineStep:
    """Trains a model on batches, one `run` each: ReFINE, or next-token training with as many optimizer steps.

    Attributes:
        number: the batch's number, from which its draws derive.
        metrics: sums over the batch.
        seed: the run's seed.
        update_count: optimizer steps so far: the version of the weights.
        skipped_updates: optimizer steps not taken because the gradient norm was not finite.
    """

    def __init__(
        self,
        runtime: StepRuntime,
        engine: RolloutEngine | None,
        recorder: RolloutRecorder,
        decode: Callable[[list[int]], str],
        sequence_name: SequenceNames | None = None,
    ):
        """
        Args:
            runtime: the model, its optimizer, and the ranks that share the work.
            engine: samples rollouts; None where the job has none.
            recorder: takes the rollouts of this rank.
            decode: gives the text of tokens, for rewards that read it.
            sequence_name: names sequences for their draws; None for their numbers in the global batch.
        """
        self.runtime, self.engine, self.recorder, self.decode = runtime, engine, recorder, decode
        self.sequence_name = sequence_name or self.number_in_global_batch
        self.refine = runtime.config.refine
        self.seed = runtime.config.debug.seed
        self.selection_rule, self.reward_function = find_selection(self.refine.selection), find_reward(self.refine.reward)
        self.group_size = self.refine.group_size
        self.update_count = self.skipped_updates = 0
        self.begin(0)

    def begin(self, number: int) -> StepMetrics:
        """Begins a batch; returns its metrics, to which all parts of the step add."""
        self.number, self.metrics = number, StepMetrics()
        return self.metrics

    def run(self, batches: list[TokenBatch], mini_batch_size: int) -> int:
        """Makes rollouts with the weights as they are, then takes one optimizer step per mini-batch of `mini_batch_size` microbatches.

        Returns:
            The number of mini-batches.
        """
        mini_batches = [batches[start : start + mini_batch_size] for start in range(0, len(batches), mini_batch_size)]
        passes = self.passes(batches, in_training_pass=self.refine.scores_in_training_pass(len(mini_batches)))
        for mini_batch in mini_batches:
            normalizers = self.normalizers(mini_batch)
            # Not by a comprehension, whose variable would keep a pass alive during its backward.
            self.update(map(partial(self.timed_loss, normalizers), islice(passes, len(mini_batch))))
        return len(mini_batches)

    def passes(self, batches: list[TokenBatch], *, in_training_pass: bool) -> Iterator[TrainingPass]:
        """Runs the training forward of each microbatch when it is asked for.

        Args:
            in_training_pass: whether the scoring pass is the training forward, or all microbatches are scored without gradient first.
        """
        if self.refine.objective == "ntp":
            yield from map(self.trunk_pass, batches)
        elif in_training_pass:
            yield from self.rollout_passes(batches, self.runtime.round_sizes.trained)
        else:
            with torch.no_grad():
                experiences = [done.experience for done in self.rollout_passes(batches, self.runtime.round_sizes.scored)]
            yield from map(self.shared_prefix_pass, batches, experiences)

    def rollout_passes(self, batches: list[TokenBatch], round_size: int) -> Iterator[TrainingPass]:
        """Turns microbatches into experience; the rollouts of `round_size` of them are sampled together. With gradient enabled the pass is
        the training forward too: trunk loss and rollout logits carry the gradient, through the whole prefix of every rollout."""
        for numbers in round_parts(len(batches), round_size):
            scored = deque(self.score_and_select(batches[i], i) for i in numbers)
            backward_follows = torch.is_grad_enabled() or numbers[-1] == len(batches) - 1
            requests, prefixes = [s.request for s in scored], [s.prefix for s in scored]
            sampled = deque(sample_together(self.engine, self.metrics, requests, prefixes, engine_sleeps=backward_follows))
            del requests, prefixes
            while scored:  # a microbatch's graph must end with its backward
                yield self.experience_pass(scored.popleft(), sampled.popleft())

    def score_and_select(self, batch: TokenBatch, microbatch: int) -> ScoredMicrobatch:
        """Reads a microbatch, and says which rollouts are to be sampled."""
        shard = self.runtime.shard_of(batch)
        scored, bank = self.score(batch, shard)
        selection = self.select(scored.losses.entropy_T, batch, microbatch, shard)
        true_tokens_nk, true_hidden_nkD = self.truth(batch, shard, selection, scored.hidden_TD)
        request, prefix = self.ask(batch, shard, bank, selection)
        return ScoredMicrobatch(batch, shard, scored.losses.nll_sum, selection, true_tokens_nk, true_hidden_nkD, request, prefix)

    def experience_pass(self, scored: ScoredMicrobatch, sampled: Rollouts) -> TrainingPass:
        """Compares a microbatch's rollouts with the truth."""
        rollouts = check_rollouts(self.runtime, self.metrics, scored.request, scored.prefix, sampled)
        compared = self.compare(scored, rollouts)
        reward_n = self.reward(compared)
        advantages_n = self.advantages(reward_n, scored.selection, scored.shard)
        self.record(scored, rollouts, compared, reward_n, advantages_n)
        return TrainingPass(scored.nll_sum, rollouts.logits_nkV, self.experience(scored, rollouts, advantages_n))

    def score(self, batch: TokenBatch, shard: ContextShard) -> tuple[DecoderOutput, SnapshotBank]:
        """Reads the shard: entropy and hidden state of every token, and the model's states at regular positions. If this pass is the
        training forward, it also gives the next-token loss."""
        labels = batch.labels_T if torch.is_grad_enabled() else None
        stride = self.runtime.model.model_args.snapshot_stride(self.refine.snapshot_stride)
        with self.metrics.stage("score"):
            return read_with_snapshots(self.runtime.forward, batch.tokens_T, shard, stride, labels=labels, entropy=True)

    def select(self, entropy_T: torch.Tensor, batch: TokenBatch, microbatch: int, shard: ContextShard) -> Selection:
        """Chooses where rollouts start, each position repeated for its rollouts, and the seed of every rollout's draws."""
        refine, starts, seeds = self.refine, [], []
        with self.metrics.stage("select"):
            (entropy_T,) = on_host(gather_rows(entropy_T, shard))
            for sequence in range(batch.num_sequences):
                name = self.sequence_name(batch, microbatch, sequence)
                offset, end = batch.cu_sequences[sequence : sequence + 2]
                positions = select_positions(
                    entropy_T[offset:end],
                    batch.documents_of_sequence(sequence),
                    num_chunks=refine.num_chunks,
                    rollout_length=refine.rollout_length,
                    selection=self.selection_rule,
                    temperature=refine.selection_temperature,
                    generator=generator(self.seed, "positions", self.number, name),
                )
                for chunk, position in enumerate(positions):
                    for sample in range(refine.rollouts_per_position):
                        starts.append(offset + position)
                        seeds.append(derive_seed(self.seed, "rollout", self.number, name, chunk, sample))
        return Selection(tuple(starts), tuple(seeds), tuple(i for i, start in enumerate(starts) if shard.owns(start)))

    @torch.no_grad()
    def truth(
        self, batch: TokenBatch, shard: ContextShard, selection: Selection, hidden_TD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the tokens that follow the prefixes of this rank's rollouts, `[n, k]`, and their hidden states, `[n, k, D]`. Every rank
        of the shard's group must call it."""
        k, device = self.refine.rollout_length, self.runtime.device
        with self.metrics.stage("reward"):
            if shard.group is not None:
                # The true continuation of a rollout may lie in the next rank's shard.
                hidden_TD = torch.cat([hidden_TD, rows_after(hidden_TD[:k], shard)])
            starts_n = on_device(torch.tensor(selection.own_starts, dtype=torch.long), device)
            positions_nk = starts_n[:, None] + torch.arange(k, device=device)
            return batch.tokens_T[positions_nk], hidden_TD[positions_nk - shard.begin]

    def ask(self, batch: TokenBatch, shard: ContextShard, bank: SnapshotBank, selection: Selection) -> tuple[RolloutRequest, PrefixStates]:
        """Returns the request for this rank's rollouts, and the states from which they go on."""
        # A rank without rollouts samples one that counts for nothing: all ranks must make equally many forwards.
        starts, seeds = selection.own_starts or (shard.end,), selection.own_seeds or (0,)
        with self.metrics.stage("rollout"):
            prefix = replay_prefixes(self.runtime.forward, bank, batch.tokens_T, starts)
        refine = self.refine
        request = RolloutRequest(
            batch.tokens_T, batch.cu_seqlens, starts, seeds, refine.rollout_length, refine.temperature, self.update_count
        )
        return request, prefix

    def compare(self, scored: ScoredMicrobatch, rollouts: CheckedRollouts) -> RewardInputs:
        """Puts this rank's rollouts beside the tokens that follow the same prefixes."""
        n = len(scored.selection.own)  # 0 on a rank without rollouts: the one that was sampled is a stand-in
        return RewardInputs(
            rollouts.tokens_nk[:n],
            scored.true_tokens_nk,
            rollouts.hidden_nkD[:n].detach(),
            scored.true_hidden_nkD,
            rollouts.logprobs_nk[:n],
            self.decode,
        )

    def reward(self, compared: RewardInputs) -> torch.Tensor:
        """Rewards this rank's rollouts, `[n]` float32."""
        with self.metrics.stage("reward"), torch.no_grad():
            if len(compared.tokens_nk) == 0:
                return torch.zeros(0, device=self.runtime.device)
            return self.reward_function(compared)

    def advantages(self, reward_n: torch.Tensor, selection: Selection, shard: ContextShard) -> torch.Tensor:
        """Compares rewards within each group of the N rollouts; returns the advantages of this rank's, `[n]`. Every rank of the shard's
        group must call it."""
        with self.metrics.stage("reward"), torch.no_grad():
            own = on_device(torch.tensor(selection.own, dtype=torch.long), self.runtime.device)
            reward_N = torch.zeros(len(selection.starts), device=self.runtime.device)
            reward_N[own] = reward_n
            if shard.group is not None:
                dist.all_reduce(reward_N, group=shard.group)
            return self.in_groups(reward_N, self.group_size)[own]

    def in_groups(self, reward_n: torch.Tensor, group_size: int) -> torch.Tensor:
        """Compares rewards within groups of `group_size`, as the settings say."""
        return group_advantages(reward_n, group_size, divide_by_std=self.refine.divide_advantage_by_std)

    def record(
        self,
        scored: ScoredMicrobatch,
        rollouts: CheckedRollouts,
        compared: RewardInputs,
        reward_n: torch.Tensor,
        advantages_n: torch.Tensor,
    ) -> None:
        """Adds this rank's rollouts to the metrics, and shows them to the recorder."""
        self.metrics.add(prefilled_tokens=rollouts.sampled.prefilled_tokens)
        selection = scored.selection
        if not selection.own:
            return
        tokens_nk, weights_nk = rollouts.tokens_nk, rollouts.weights_nk
        self.metrics.add(
            rollouts=len(selection.own),
            rollout_tokens=tokens_nk.numel(),
            matches=(tokens_nk == compared.true_tokens_nk).sum(),
            reward=reward_n.sum(),
            reward_squared=reward_n.double().square().sum(),
            advantage=advantages_n.sum(),
            advantage_squared=advantages_n.double().square().sum(),
            importance_weight=tokens_nk.numel() if weights_nk is None else weights_nk.sum(),
        )
        self.metrics.add_builtin_rewards(compared)
        self.metrics.add_gap(rollouts.sampled.logprobs_nk, rollouts.logprobs_nk)
        self.recorder.record_rollouts(
            self.number, scored.batch, selection.own_starts, rollouts.sampled, compared.true_tokens_nk, reward_n, advantages_n
        )

    def experience(self, scored: ScoredMicrobatch, rollouts: CheckedRollouts, advantages_n: torch.Tensor) -> Experience:
        """Keeps what the update needs of this rank's rollouts."""
        has_rollouts = bool(scored.selection.own)
        return Experience(
            scored.request.starts, rollouts.tokens_nk, rollouts.logprobs_nk, advantages_n if has_rollouts else None, rollouts.weights_nk
        )

    def number_in_global_batch(self, batch: TokenBatch, microbatch: int, sequence: int) -> int:
        """Returns a sequence's number among those of all ranks."""
        local = microbatch * self.runtime.config.training.local_batch_size + sequence
        return local * self.runtime.data_degree + self.runtime.data_rank

    def trunk_pass(self, batch: TokenBatch) -> TrainingPass:
        """Runs one forward over the shard of the trunk, for the next-token loss only."""
        shard = self.runtime.shard_of(batch)
        layout = SharedPrefixLayout(shard.local_cu_seqlens, shard=shard)
        with self.metrics.stage("update"):
            out = self.runtime.forward(batch.tokens_T[shard.tokens], layout, labels=batch.labels_T[shard.tokens])
        return TrainingPass(out.losses.nll_sum, None, None)

    def shared_prefix_pass(self, batch: TokenBatch, experience: Experience) -> TrainingPass:
        """Runs one forward over the shard of the trunk and its rollouts."""
        shard = self.runtime.shard_of(batch)
        starts = tuple(start - shard.begin for start in experience.starts)
        layout = SharedPrefixLayout(shard.local_cu_seqlens, starts, self.refine.rollout_length, shard=shard)
        stream = torch.cat([batch.tokens_T[shard.tokens], experience.tokens_nk.flatten()])
        with self.metrics.stage("update"):
            out = self.runtime.forward(stream, layout, labels=batch.labels_T[shard.tokens], logit_rows=layout.predicting_rows())
        return TrainingPass(out.losses.nll_sum, out.logits, experience)

    def update(self, losses: Iterator[torch.Tensor]) -> None:
        """Takes one optimizer step: the backward of each microbatch's loss, then clip and step. Leaves no gradients behind."""
        for loss in losses:
            with self.metrics.stage("update"):
                loss.backward()
            del loss
        with self.metrics.stage("update"):
            parameters, max_norm = list(self.runtime.model.parameters()), self.runtime.config.training.max_norm
            grad_norm = dist_utils.clip_grad_norm_(parameters, max_norm, foreach=True).item()
            self.runtime.before_weights_change()
            self.metrics.grad_norms.append(grad_norm)
            if math.isfinite(grad_norm):
                self.runtime.optimizers.step()
                self.update_count += 1
            else:
                self.skipped_updates += 1
                self.metrics.skipped_updates += 1
                logger.warning(f"Step {self.number}: the gradient norm is {grad_norm}; this optimizer step is skipped")
            self.runtime.optimizers.zero_grad()

    def timed_loss(self, normalizers: Normalizers, training_pass: TrainingPass) -> torch.Tensor:
        """Computes the loss as a part of the update."""
        with self.metrics.stage("update"):
            return self.loss(training_pass, normalizers)

    def loss(self, training_pass: TrainingPass, normalizers: Normalizers) -> torch.Tensor:
        """Computes this rank's share of the mini-batch's loss: sums over its tokens divided by the counts over all ranks, so that
        the ranks' gradients add up to those of the mean."""
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

    def normalizers(self, batches: list[TokenBatch]) -> Normalizers:
        """Counts the tokens of a mini-batch over all ranks."""
        runtime = self.runtime
        labels = sum(batch.num_labels for batch in batches)
        for batch in batches:
            own_labels_T = batch.labels_T[runtime.shard_of(batch).tokens]
            self.metrics.add(labels=(own_labels_T != IGNORE_INDEX).sum(), tokens=own_labels_T.shape[0])
        sequences = sum(batch.num_sequences for batch in batches) * runtime.data_degree
        rollouts = sequences * self.refine.num_chunks * self.refine.rollouts_per_position
        return Normalizers(runtime.sum_over_data(labels), rollouts * self.refine.rollout_length)
