"""Next-token training in which the tokens after chosen positions count more (`objective = "weighted_ntp"`): no rollouts."""

from collections.abc import Sequence

import torch

from refine_titan.data.dataloader import TokenBatch
from refine_titan.models.context_shard import ContextShard
from refine_titan.models.shared_prefix import SharedPrefixLayout
from refine_titan.objective.losses import chosen_logprobs
from refine_titan.steps.experience import TrainingPass
from refine_titan.steps.runtime import StepRuntime


def weighted_pass(runtime: StepRuntime, batch: TokenBatch, shard: ContextShard, starts: Sequence[int], length: int) -> TrainingPass:
    """Runs one forward over the shard of the trunk, which gives the next-token loss of all tokens, and once more that of the `length`
    tokens from each of `starts` on. A token that follows two positions counts once."""
    layout = SharedPrefixLayout(shard.local_cu_seqlens, shard=shard)
    tokens_T, labels_T = batch.tokens_T[shard.tokens], batch.labels_T[shard.tokens]
    rows = torch.tensor(predicting_tokens(starts, length, shard), dtype=torch.long) - shard.begin
    out = runtime.forward(tokens_T, layout, labels=labels_T, logit_rows=rows if len(rows) else None)
    if out.logits is None:
        return TrainingPass(out.losses.nll_sum, None, None)
    position_nll = -chosen_logprobs(out.logits, labels_T[rows]).sum()
    return TrainingPass(out.losses.nll_sum, None, None, position_nll, len(rows))


def predicting_tokens(starts: Sequence[int], length: int, shard: ContextShard) -> list[int]:
    """The shard's tokens that predict one of the `length` tokens from a start on, as positions in the whole trunk."""
    return sorted({t for start in starts for t in range(start - 1, start - 1 + length) if shard.begin <= t < shard.end})
