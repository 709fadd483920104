"""The forwards of a ReFINE step on a small model, in both of their forms, as one loss."""

import torch

from refine_titan.models.context_shard import ContextShard
from refine_titan.models.decoder import FastWeightDecoder
from refine_titan.models.shared_prefix import SharedPrefixLayout, read_with_snapshots
from refine_titan.rollout.continuation import replay_prefixes, rescore_rollouts

FORMS = ("separate", "training")


def step_loss(model: FastWeightDecoder, form: str, starts=(3, 40, 40, 90), cu_seqlens=(0, 38, 101), length=4) -> torch.Tensor:
    """Next-token loss of a trunk plus the mean log-probability of branch tokens: `separate`, one flat stream; `training`,
    branches that continue from the states of the trunk's own forward."""
    draw = torch.Generator().manual_seed(1)
    vocabulary = model.model_args.vocab_size
    tokens = torch.randint(vocabulary, (cu_seqlens[-1],), generator=draw)
    labels = torch.randint(vocabulary, (cu_seqlens[-1],), generator=draw)
    branches = torch.randint(vocabulary, (len(starts), length), generator=draw)
    if form == "separate":
        layout = SharedPrefixLayout(cu_seqlens, tuple(starts), length)
        out = model(torch.cat([tokens, branches.flatten()]), layout, labels=labels, logit_rows=layout.predicting_rows())
        logits = out.logits
    else:
        shard = ContextShard.of_rank(cu_seqlens, None)
        out, bank = read_with_snapshots(model, tokens, shard, 16, labels=labels, entropy=True)
        logits = rescore_rollouts(model, replay_prefixes(model, bank, tokens, starts), branches).logits_nkV
    return out.losses.nll_sum / len(labels) + logits.log_softmax(-1).gather(-1, branches[..., None]).mean()


def gradients(model: FastWeightDecoder) -> dict[str, torch.Tensor]:
    """By the names that the parameters have without any wrapper; leaves none behind."""
    found = {name.replace("_checkpoint_wrapped_module.", ""): p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found
