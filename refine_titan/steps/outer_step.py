"""The outer step of post-training: one optimizer step on the answers to a batch's prompts, after the inner steps.

Legend: T trunk tokens of a microbatch, n answers of this rank, k tokens of the longest answer, V vocabulary.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from typing import Protocol

import torch
from torch.nn.utils.rnn import pad_sequence
from torchtitan.components.tokenizer import BaseTokenizer

from refine_kernels.packing import on_device, on_host
from refine_titan.config.batch_plan import round_parts
from refine_titan.config.phases import has_inner_steps
from refine_titan.data.dataloader import TokenBatch
from refine_titan.models.context_shard import ContextShard
from refine_titan.models.shared_prefix import SharedPrefixLayout
from refine_titan.objective.losses import chosen_logprobs, policy_loss
from refine_titan.rollout.engine import PrefixStates, RolloutRequest, Rollouts
from refine_titan.seeding import derive_seed
from refine_titan.steps.checked_rollouts import CheckedRollouts, check_rollouts, sample_together
from refine_titan.steps.refine_step import RefineStep

# Takes a response and the correct answers; returns a score in [0, 1].
AnswerScorer = Callable[[str, Sequence[str]], float]


class AnswerRecorder(Protocol):
    """Takes sampled answers to be read by people."""

    def record_answers(
        self,
        step: int,
        batch: TokenBatch,
        starts: Sequence[int],
        rollouts: Rollouts,
        texts: Sequence[str],
        references: Sequence[Sequence[str]],
        reward_n: torch.Tensor,
        advantages_n: torch.Tensor,
    ) -> None: ...


class OuterStep:
    """Trains on answers: cross entropy on the first answers, or GRPO on sampled ones. Prompts are the trunk of a forward and answers
    its branches: no prompt token has a loss of its own."""

    def __init__(
        self,
        inner: RefineStep,
        tokenizer: BaseTokenizer,
        recorder: AnswerRecorder,
        scorer: AnswerScorer | None = None,
        stop_tokens: tuple[int, ...] = (),
    ):
        """
        Args:
            inner: the step that trains on the prompts; this step uses its model, engine, metrics and optimizer.
            recorder: takes the sampled answers of this rank.
            scorer: scores sampled answers; needed for `outer = "reward"`.
            stop_tokens: a sampled answer ends with the first of these tokens.
        """
        self.inner, self.runtime = inner, inner.runtime
        self.posttrain = self.runtime.config.posttrain
        if self.posttrain.outer == "reward" and scorer is None:
            raise ValueError("posttrain.outer = 'reward' needs a scorer")
        self.tokenizer, self.recorder, self.scorer, self.stop_tokens = tokenizer, recorder, scorer, stop_tokens

    def run(self, batches: list[TokenBatch]) -> None:
        """Takes one optimizer step."""
        runtime, metrics = self.runtime, self.inner.metrics
        if not has_inner_steps(runtime.config):
            metrics.add(tokens=sum(runtime.shard_of(batch).num_tokens for batch in batches))
        if self.posttrain.outer == "sft":
            num_tokens = runtime.sum_over_data(sum(len(answer) for batch in batches for answer in batch.answers))
            losses = (self.answer_loss(batch, num_tokens) for batch in batches)
        else:
            losses = self.reward_losses(batches)
        with metrics.outer_step():
            self.inner.update(losses)

    def answer_loss(self, batch: TokenBatch, num_tokens: float | torch.Tensor) -> torch.Tensor:
        """Computes this rank's share of the mean cross entropy over the `num_tokens` answer tokens of the batch."""
        runtime, metrics, shard = self.runtime, self.inner.metrics, self.runtime.shard_of(batch)
        with metrics.stage("outer"):
            own = own_prompts(batch, shard)
            # A rank without answers reads one that counts for nothing: all ranks must make equally many forwards.
            answers = [torch.tensor(batch.answers[i]) for i in own] or [torch.zeros(1, dtype=torch.long)]
            starts = tuple(batch.cu_sequences[i + 1] - shard.begin for i in own) or (shard.num_tokens,)
            tokens_nk = on_device(pad_sequence(answers, batch_first=True), runtime.device)
            lengths = [len(answer) for answer in answers] if own else [0]
            mask_nk = first_tokens(lengths, tokens_nk.shape[1], runtime.device)
            layout = SharedPrefixLayout(shard.local_cu_seqlens, starts, tokens_nk.shape[1], shard=shard)
            stream = torch.cat([batch.tokens_T[shard.tokens], tokens_nk.flatten()])
            logits_nkV = runtime.forward(stream, layout, logit_rows=layout.predicting_rows()).logits
            nll_sum = -(chosen_logprobs(logits_nkV, tokens_nk) * mask_nk).sum()
            metrics.add(answer_nll=nll_sum.detach(), answer_tokens=sum(lengths))
            return nll_sum / num_tokens

    def reward_losses(self, batches: list[TokenBatch]) -> Iterator[torch.Tensor]:
        """Computes this rank's share of the policy loss for each microbatch when it is asked for; the answers to several microbatches are
        sampled together."""
        num_answers = sum(batch.num_sequences for batch in batches) * self.runtime.data_degree * self.posttrain.samples
        for numbers in round_parts(len(batches), self.runtime.round_sizes.answers):
            requests, prefixes = zip(*(self.ask(batches[i], i) for i in numbers))
            sampled = sample_together(self.inner.engine, self.inner.metrics, requests, prefixes, engine_sleeps=True, stage="outer")
            parts = deque(zip((batches[i] for i in numbers), requests, prefixes, sampled))
            del requests, prefixes, sampled
            while parts:  # a microbatch's graph must end with its backward
                yield self.reward_loss(*parts.popleft()) / num_answers

    def ask(self, batch: TokenBatch, microbatch: int) -> tuple[RolloutRequest, PrefixStates]:
        """Reads a microbatch's prompts; returns the request for `samples` answers to each of this rank's, and the states from which they go
        on."""
        inner, posttrain, shard = self.inner, self.posttrain, self.runtime.shard_of(batch)
        own = own_prompts(batch, shard)
        with inner.metrics.stage("outer"):
            # A rank without prompts answers one that counts for nothing: all ranks must make equally many forwards.
            ends = [batch.cu_sequences[i + 1] for i in own] or [shard.end]
            prefix = self.read_prompts(batch, shard, ends)
        starts = tuple(end for end in ends for _ in range(posttrain.samples))
        names = [inner.sequence_name(batch, microbatch, i) for i in own] or [""]
        seeds = tuple(derive_seed(inner.seed, "answer", inner.number, name, i) for name in names for i in range(posttrain.samples))
        request = RolloutRequest(
            batch.tokens_T, batch.cu_seqlens, starts, seeds, posttrain.answer_tokens, posttrain.temperature, inner.update_count
        )
        return request, prefix

    def reward_loss(self, batch: TokenBatch, request: RolloutRequest, prefix: PrefixStates, sampled: Rollouts) -> torch.Tensor:
        """Sums the policy loss over this rank's sampled answers to a microbatch: of each the mean over its tokens (GRPO, arXiv 2402.03300,
        equation 3). An answer ends with end-of-sequence, or after `answer_tokens`."""
        metrics, own = self.inner.metrics, own_prompts(batch, self.runtime.shard_of(batch))
        rollouts = check_rollouts(self.runtime, metrics, request, prefix, sampled, stage="outer")
        with metrics.stage("outer"):
            if not own:
                return 0.0 * rollouts.logits_nkV.sum()
            lengths, texts = self.read_answers(sampled)
            references = [batch.references[i] for i in own for _ in range(self.posttrain.samples)]
            reward_n = torch.tensor([self.scorer(*pair) for pair in zip(texts, references)])
            advantages_n = self.inner.in_groups(reward_n, self.posttrain.samples)
            loss = self.policy_loss(rollouts, lengths, advantages_n)
        metrics.add(
            answers=len(texts),
            answer_tokens=sum(lengths),
            answer_policy_loss=loss.detach(),
            task_reward=reward_n.sum(),
            task_reward_squared=reward_n.double().square().sum(),
        )
        metrics.add_answer_gap(sampled.logprobs_nk, rollouts.logprobs_nk)
        self.recorder.record_answers(self.inner.number, batch, request.starts, sampled, texts, references, reward_n, advantages_n)
        return loss

    def policy_loss(self, rollouts: CheckedRollouts, lengths: Sequence[int], advantages_n: torch.Tensor) -> torch.Tensor:
        """Sums over answers the mean over an answer's tokens of the clipped policy loss."""
        refine, posttrain, device = self.inner.refine, self.posttrain, self.runtime.device
        weights_nk = first_tokens(lengths, posttrain.answer_tokens, device)
        weights_nk = weights_nk / weights_nk.sum(1, keepdim=True)
        if rollouts.weights_nk is not None:
            weights_nk = weights_nk * rollouts.weights_nk
        # The weights that are trained are those that sampled: the ratio is 1, but its gradient is not 0.
        return policy_loss(
            chosen_logprobs(rollouts.logits_nkV, rollouts.tokens_nk, posttrain.temperature),
            rollouts.logprobs_nk,
            on_device(advantages_n, device)[:, None],
            clip_low=refine.clip_low,
            clip_high=refine.clip_high,
            clip_dual=refine.clip_dual,
            weights=weights_nk,
        ).loss

    def read_prompts(self, batch: TokenBatch, shard: ContextShard, ends: Sequence[int]) -> PrefixStates:
        """Reads the prompts that end at `ends`, each without its last token; returns every state `samples` times."""
        positions = tuple(end - 1 - shard.begin for end in ends)
        layout = SharedPrefixLayout(shard.local_cu_seqlens, state_positions=positions, shard=shard)
        states = self.runtime.forward(batch.tokens_T[shard.tokens], layout).states
        copies = torch.arange(len(ends)).repeat_interleave(self.posttrain.samples)
        last_rows = on_device(torch.tensor(ends)[copies] - 1, batch.tokens_T.device)
        return PrefixStates(batch.tokens_T[last_rows], [layer.select(copies) for layer in states])

    def read_answers(self, rollouts: Rollouts) -> tuple[list[int], list[str]]:
        """Returns the number of tokens of each answer, end-of-sequence included, and its text without it."""
        lengths, texts = [], []
        for tokens in on_host(rollouts.tokens_nk)[0].tolist():
            answer = list(takewhile(lambda token: token not in self.stop_tokens, tokens))
            lengths.append(min(len(answer) + 1, len(tokens)))
            texts.append(self.tokenizer.decode(answer))
        return lengths, texts


def own_prompts(batch: TokenBatch, shard: ContextShard) -> list[int]:
    """Returns the sequences whose last token this rank holds."""
    return [i for i, end in enumerate(batch.cu_sequences[1:]) if shard.owns(end)]


def first_tokens(lengths: Sequence[int], num_tokens: int, device: torch.device) -> torch.Tensor:
    """Returns `[n, num_tokens]` float32: 1 for the first `lengths[i]` tokens of row i, else 0."""
    return on_device((torch.arange(num_tokens) < torch.tensor(lengths)[:, None]).float(), device)
