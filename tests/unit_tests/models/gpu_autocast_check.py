"""Every family's step under the autocast of a GPU, which computes more operators in float32 than a CPU's. A script: it registers them."""

from dataclasses import replace
from functools import partial

import torch
from torch._C import DispatchKey, DispatchKeySet, _ExcludeDispatchKeyGuard

from refine_titan.models import FAMILIES, build_decoder
from refine_titan.models.context_shard import ContextShard
from refine_titan.models.shared_prefix import read_with_snapshots
from refine_titan.objective.losses import chosen_logprobs
from refine_titan.rollout.continuation import replay_prefixes, rescore_rollouts
from refine_titan.rollout.engine import RolloutRequest
from refine_titan.rollout.native import NativeEngine

ATEN = torch.ops.aten
# Of AT_FORALL_FP32 in torch 2.13.0's ATen/autocast_mode.h those that a model could use.
FLOAT32_ON_A_GPU = [
    ATEN.exp.default,
    ATEN.expm1.default,
    ATEN.log.default,
    ATEN.log1p.default,
    ATEN.rsqrt.default,
    ATEN.reciprocal.default,
    ATEN.softplus.default,
    ATEN.rms_norm.default,
    ATEN.pow.Tensor_Scalar,
    ATEN.pow.Tensor_Tensor,
    ATEN.logsumexp.default,
]
T = 200


def in_float32(operator, *args, **kwargs):
    def cast(x):
        return x.float() if isinstance(x, torch.Tensor) and x.dtype in (torch.bfloat16, torch.float16) else x

    with _ExcludeDispatchKeyGuard(DispatchKeySet(DispatchKey.AutocastCPU)):
        return operator(*map(cast, args), **{name: cast(x) for name, x in kwargs.items()})


library = torch.library.Library("aten", "IMPL")
for operator in FLOAT32_ON_A_GPU:
    library.impl(operator.name().removeprefix("aten::"), partial(in_float32, operator), "AutocastCPU")
precision = partial(torch.autocast, "cpu", torch.bfloat16)
with precision():
    assert torch.nn.functional.rms_norm(torch.ones(2, 4, dtype=torch.bfloat16), (4,)).dtype == torch.float32

for family in FAMILIES:
    args = FAMILIES[family].flavors["debug"]
    if family == "lact":
        args = replace(args, attn_qk_norm=True, chunk_size=64, window_size=16)
    torch.manual_seed(0)
    model = build_decoder(args)
    model.init_weights()

    def forward(*args, model=model, **kwargs):
        with precision():
            return model(*args, **kwargs)

    tokens = torch.randint(0, 256, (T,))
    shard, stride = ContextShard.of_rank((0, T), None), args.snapshot_stride(64)
    out, bank = read_with_snapshots(forward, tokens, shard, stride, labels=tokens, entropy=True)
    starts = (5, 70, 100, 150)
    prefix = replay_prefixes(forward, bank, tokens, starts)
    engine = NativeEngine(model, precision)
    engine.sync_weights(0)
    rollouts = engine.generate(RolloutRequest(tokens, (0, T), starts, (0,) * 4, 3, 1.0, 0), prefix)
    evaluation = rescore_rollouts(forward, prefix, rollouts.tokens_nk)
    logprobs = chosen_logprobs(evaluation.logits_nkV, rollouts.tokens_nk)
    gap = float((logprobs - rollouts.logprobs_nk).detach().abs().max())
    (out.losses.nll_sum + logprobs.sum()).backward()
    assert gap < 0.1, (family, gap)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters()), family
    print(f"runs: {family}, log-probabilities of engine and trainer {gap:.4f} apart", flush=True)
