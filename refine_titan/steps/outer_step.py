"""The outer step of post-training: one optimizer step on the answers to a batch's prompts, after the inner steps.

Legend: T trunk tokens of a microbatch, n answers of this rank, k tokens of the longest answer, V vocabulary.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch.nn.utils.rnn import pad_sequence
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.distributed import utils as dist_utils

from refine_titan.config.phases import has_inner_steps
from refine_titan.data.dataloader import TokenBatch
from refine_titan.models.context_shard import ContextShard
from refine_titan.models.shared_prefix import SharedPrefixLayout
from refine_titan.objective.advantages import group_advantages
from refine_titan.objective.losses import chosen_logprobs, policy_loss
from refine_titan.rollout.continuation import evaluate_rollouts
from refine_titan.rollout.engine import PrefixStates, RolloutRequest, Rollouts
from refine_titan.rollout.logprob_gate import importance_weights, refuse_gap
from refine_titan.seeding import derive_seed
from refine_titan.steps.refine_step import RefineStep

# Response and right answers to a score in [0, 1].
AnswerScorer = Callable[[str, Sequence[str]], float]


class OuterStep:
    """Cross entropy on the first answers, or GRPO on sampled ones. Prompts are the trunk of a forward and answers its branches: no
    prompt token has a loss of its own."""

    def __init__(self, step: RefineStep, tokenizer: BaseTokenizer, scorer: AnswerScorer | None = None):
        """`scorer` is needed for `outer = "reward"`."""
        self.posttrain = step.job_config.posttrain
        if self.posttrain.outer == "reward" and scorer is None:
            raise ValueError("posttrain.outer = 'reward' needs a scorer")
        self.step, self.tokenizer, self.scorer = step, tokenizer, scorer

    def run(self, batches: list[TokenBatch]) -> None:
        """One optimizer step."""
        step = self.step
        if not has_inner_steps(step.job_config):
            step.metrics.add(tokens=sum(step.shard_of(batch).num_rows for batch in batches))
        if self.posttrain.outer == "sft":
            count = torch.tensor(sum(len(answer) for batch in batches for answer in batch.answers), device=step.device)
            num_tokens = dist_utils.dist_sum(count, step.parallel_dims.get_optional_mesh("batch"))
            losses = [partial(self.answer_loss, batch, num_tokens) for batch in batches]
        else:
            num_answers = sum(batch.num_sequences for batch in batches) * step.dp_degree * self.posttrain.samples
            losses = [partial(self.reward_loss, batch, i, num_answers) for i, batch in enumerate(batches)]
        with step.metrics.outer_step():
            step.update(losses)

    def answer_loss(self, batch: TokenBatch, num_tokens: float) -> torch.Tensor:
        """This rank's share of the mean cross entropy over the `num_tokens` answer tokens of the batch."""
        step, shard = self.step, self.step.shard_of(batch)
        with step.metrics.stage("outer"):
            own = own_prompts(batch, shard)
            # A rank without answers makes one that counts for nothing: ranks make equally many forwards.
            answers = [torch.tensor(batch.answers[i]) for i in own] or [torch.zeros(1, dtype=torch.long)]
            starts = tuple(batch.cu_sequences[i + 1] - shard.first_row for i in own) or (shard.num_rows,)
            tokens_nk = pad_sequence(answers, batch_first=True).to(step.device)
            lengths = [len(answer) for answer in answers] if own else [0]
            mask_nk = first_tokens(lengths, tokens_nk.shape[1], step.device)
            layout = SharedPrefixLayout(shard.local_cu_seqlens, starts, tokens_nk.shape[1], shard=shard)
            stream = torch.cat([batch.tokens_T[shard.rows], tokens_nk.flatten()])
            logits_nkV = step.forward(stream, layout, logit_rows=layout.predicting_rows()).logits
            nll_sum = -(chosen_logprobs(logits_nkV, tokens_nk) * mask_nk).sum()
            step.metrics.add(answer_nll=nll_sum.detach(), answer_tokens=sum(lengths))
            return nll_sum / num_tokens

    def reward_loss(self, batch: TokenBatch, microbatch: int, num_answers: int) -> torch.Tensor:
        """This rank's share of the policy loss: the mean over the batch's `num_answers` sampled answers of the mean over an
        answer's tokens (GRPO, arXiv 2402.03300, equation 3), which ends with end-of-sequence or at `answer_tokens`."""
        step, posttrain, shard = self.step, self.posttrain, self.step.shard_of(batch)
        own = own_prompts(batch, shard)
        if step.engine.weight_version != step.update_count:
            with step.metrics.stage("sync"):
                step.engine.sync_weights(step.update_count)
        with step.metrics.stage("outer"):
            ends = [batch.cu_sequences[i + 1] for i in own] or [shard.end_row]
            prefix = self.read_prompts(batch, shard, ends)
            starts = tuple(end for end in ends for _ in range(posttrain.samples))
            names = [step.sequence_name(batch, microbatch, i) for i in own] or [""]
            seeds = tuple(derive_seed(step.seed, "answer", step.step, n, i) for n in names for i in range(posttrain.samples))
            request = RolloutRequest(
                batch.tokens_T, batch.cu_seqlens, starts, seeds, posttrain.answer_tokens, posttrain.temperature, step.update_count
            )
            rollouts = step.engine.generate(request, prefix)
            step.engine.sleep()  # a backward follows
            logits_nkV = evaluate_rollouts(step.forward, prefix, rollouts.tokens_nk).logits_nkV
            logprobs_nk = chosen_logprobs(logits_nkV, rollouts.tokens_nk, posttrain.temperature)
            refuse_gap(step.job_config.rollout.max_logprob_gap, request, rollouts, logprobs_nk.detach())
            if not own:
                return 0.0 * logprobs_nk.sum()
            lengths, texts = self.read_answers(rollouts)
            references = [batch.references[i] for i in own for _ in range(posttrain.samples)]
            reward_n = torch.tensor([self.scorer(*pair) for pair in zip(texts, references)])
            advantages_n = group_advantages(reward_n, posttrain.samples, divide_by_std=step.refine.divide_advantage_by_std)
            weights_nk = first_tokens(lengths, posttrain.answer_tokens, step.device)
            weights_nk = weights_nk / weights_nk.sum(1, keepdim=True)
            correction = importance_weights(logprobs_nk.detach(), rollouts.logprobs_nk, step.job_config.rollout.importance_ratio_cap)
            if correction is not None:
                weights_nk = weights_nk * correction
            # The weights that sampled are those that are trained: the ratio is 1, its gradient is not 0.
            loss = policy_loss(
                logprobs_nk,
                logprobs_nk.detach(),
                advantages_n.to(step.device)[:, None],
                clip_low=step.refine.clip_low,
                clip_high=step.refine.clip_high,
                clip_dual=step.refine.clip_dual,
                weights=weights_nk,
            ).loss
        step.metrics.add(
            answers=len(texts),
            answer_tokens=sum(lengths),
            answer_policy_loss=loss.detach(),
            task_reward=reward_n.sum(),
            task_reward_squared=reward_n.double().square().sum(),
        )
        gap = float((rollouts.logprobs_nk - logprobs_nk.detach()).abs().max())
        step.metrics.largest_answer_gap = max(float(step.metrics.largest_answer_gap), gap)
        step.monitor.sample_answers(step.step, batch, starts, rollouts, texts, references, reward_n, advantages_n)
        return loss / num_answers

    def read_prompts(self, batch: TokenBatch, shard: ContextShard, ends: Sequence[int]) -> PrefixStates:
        """States of the prompts that end at `ends`, each without its last token, `samples` times."""
        positions = tuple(end - 1 - shard.first_row for end in ends)
        layout = SharedPrefixLayout(shard.local_cu_seqlens, state_positions=positions, shard=shard)
        states = self.step.forward(batch.tokens_T[shard.rows], layout).states
        copies = torch.arange(len(ends)).repeat_interleave(self.posttrain.samples)
        last_tokens = batch.tokens_T[torch.tensor(ends, device=batch.tokens_T.device) - 1]
        return PrefixStates(last_tokens[copies.to(last_tokens.device)], [layer.select(copies) for layer in states])

    def read_answers(self, rollouts: Rollouts) -> tuple[list[int], list[str]]:
        """Tokens of each answer, end-of-sequence included, and its text without it."""
        lengths, texts = [], []
        for tokens in rollouts.tokens_nk.tolist():
            length = tokens.index(self.tokenizer.eos_id) + 1 if self.tokenizer.eos_id in tokens else len(tokens)
            lengths.append(length)
            texts.append(self.tokenizer.decode([token for token in tokens[:length] if token != self.tokenizer.eos_id]))
        return lengths, texts


def own_prompts(batch: TokenBatch, shard: ContextShard) -> list[int]:
    """The sequences whose last row this rank holds."""
    return [i for i, end in enumerate(batch.cu_sequences[1:]) if shard.owns(end)]


def first_tokens(lengths: Sequence[int], num_tokens: int, device: torch.device) -> torch.Tensor:
    """1 for the first `lengths[i]` of `num_tokens` tokens of row i, else 0; float32."""
    return (torch.arange(num_tokens) < torch.tensor(lengths)[:, None]).float().to(device)
