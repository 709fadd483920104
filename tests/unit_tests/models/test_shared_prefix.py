"""One shared-prefix forward against separate forwards over every prefix: outputs and all gradients, in float64.

Also the second form of the same tree: snapshots, replay and continuation, with gradient and in decoding.
"""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refine_kernels.packing import forget_plans
from refine_titan.models import FAMILIES, build_decoder
from refine_titan.models.context_shard import ContextShard
from refine_titan.models.decoder import FastWeightDecoder
from refine_titan.models.delta_net import DeltaNetArgs
from refine_titan.models.gated_delta_net import GatedDeltaNetArgs
from refine_titan.models.gated_delta_product import GatedDeltaProductArgs
from refine_titan.models.kda import KDAArgs
from refine_titan.models.lact import LaCTArgs
from refine_titan.models.olmo_hybrid import OlmoHybridArgs
from refine_titan.models.qwen3_5 import Qwen35Args
from refine_titan.models.shared_prefix import SharedPrefixLayout, read_with_snapshots
from refine_titan.objective.losses import chosen_logprobs
from refine_titan.rollout.continuation import replay_prefixes, rescore_rollouts
from refine_titan.rollout.engine import EngineError, PrefixStates, RolloutRequest
from refine_titan.rollout.native import NativeEngine
from tests.helpers import packings, positions, relative_rms

COMMON = dict(vocab_size=13, dim=16, n_layers=2, intermediate_size=24)
SMALL = {
    "delta_net": DeltaNetArgs(n_heads=2, **COMMON),
    "gated_delta_net": GatedDeltaNetArgs(n_heads=2, head_dim=6, expand_v=1.5, **COMMON),
    "kda": KDAArgs(n_heads=2, head_dim=6, **COMMON),
    "gated_delta_product": GatedDeltaProductArgs(n_heads=2, head_dim=6, num_householder=2, use_forget_gate=True, **COMMON),
    "qwen3_5": Qwen35Args(
        layer_types=["linear_attention", "full_attention"],
        n_heads=1,
        n_v_heads=2,
        head_dim=6,
        head_v_dim=5,
        n_attn_heads=4,
        n_kv_heads=2,
        attn_head_dim=8,
        rope_theta=300.0,
        **COMMON,
    ),
    "olmo_hybrid": OlmoHybridArgs(
        n_heads=2, n_v_heads=2, head_dim=6, head_v_dim=10, n_attn_heads=2, n_kv_heads=2, rope_theta=None, **COMMON
    ),
    # Muon is left to a few chunks: over many, it amplifies rounding without bound.
    "lact": LaCTArgs(
        n_attn_heads=4,
        n_fast_heads=2,
        chunk_size=30,
        window_size=21,
        newton_schulz_dtype="float32",
        initializer_range=0.02,
        **COMMON,
    ),
}
VARIANTS = {
    "delta_net": [
        {"use_gate": True},
        {"use_short_conv": False},
        {"expand_v": 2.0},
        {"use_beta": False, "qk_norm": "sum", "qk_activation": "relu"},
        {"allow_neg_eigval": True, "qk_activation": "elu"},
        {"tie_word_embeddings": True},
        {"attn": {"layers": [0], "num_heads": 2}},
    ],
    "gated_delta_net": [
        {"attn": {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "qkv_bias": True, "rope_theta": 300.0}},
        {"n_v_heads": 4, "output_gate_activation": "sigmoid"},
        {"use_gate": False, "allow_neg_eigval": True},
        {"use_short_conv": False, "expand_v": 1.0},
    ],
    "kda": [
        {"n_v_heads": 4, "expand_v": 2.0},
        {"lower_bound": -3.0, "safe_gate": True},
        {"use_short_conv": False},
        {"attn": {"layers": [1], "num_heads": 4}},
    ],
    "gated_delta_product": [
        {"attn": [{"layers": [1], "num_heads": 2}, {"layers": [0], "num_heads": 4, "num_kv_heads": 1}]},
        {"use_forget_gate": False, "allow_neg_eigval": True, "num_householder": 3},
        {"use_output_gate": False, "num_householder": 1},
        {"use_short_conv": False},
    ],
    "qwen3_5": [
        {"layer_types": ["full_attention", "full_attention"], "partial_rotary_factor": 1.0, "tie_word_embeddings": True},
        {"layer_types": ["full_attention", "linear_attention"], "rope_theta": None},
        {"layer_types": ["linear_attention", "linear_attention"]},
    ],
    "olmo_hybrid": [
        {"rope_theta": 300.0, "n_kv_heads": 1, "n_v_heads": 4},
        {"layer_types": ["full_attention", "linear_attention"], "allow_neg_eigval": False},
    ],
    "lact": [
        {"use_muon": True, "chunk_size": 64, "ttt_nope": True, "use_fused_kernel": True},
        {"use_muon": True, "chunk_size": 64, "ttt_prenorm": True, "w0_w2_low_rank": 3},
        {"ttt_prenorm": True, "use_momentum": False, "learnable_ttt_scale": False, "attn_qk_norm": True},
        {"chunk_size": 1, "window_size": 1, "qkv_bias": True, "no_v_silu": True},
        {"chunk_size": 2, "window_size": 3, "inter_multi": 1.5},
        {"chunk_size": 500, "window_size": 400, "qkv_silu": False},
        {"lr_dim": 8, "n_attn_heads": 2, "tie_word_embeddings": True},
    ],
}


def build(family="delta_net", scale=5, **overrides) -> FastWeightDecoder:
    """A small model; larger weights than initial ones make states and gradients matter."""
    torch.manual_seed(0)
    model = build_decoder(dataclasses.replace(SMALL[family], **overrides))
    model.init_weights()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not name.endswith(("A_log", "dt_bias")):
                p.mul_(scale)
    return model.double()


def document_of(cu_seqlens, position):
    return next((s, e) for s, e in zip(cu_seqlens, cu_seqlens[1:]) if s < position <= e)


def separate_loss(model, tokens, rollouts, cu_seqlens, starts):
    """Loss of the trunk and log-probabilities of rollouts, every document and every prefix in a forward of its own."""
    loss, logprobs, hidden = 0.0, [], []
    for s, e in zip(cu_seqlens, cu_seqlens[1:]):
        labels = torch.cat([tokens[s + 1 : e], torch.tensor([-100])])
        loss = loss + model(tokens[s:e], SharedPrefixLayout((0, e - s)), labels=labels).losses.nll_sum
    for start, rollout in zip(starts, rollouts):
        begin, _ = document_of(cu_seqlens, start)
        stream = torch.cat([tokens[begin:start], rollout])
        rows = torch.arange(start - begin - 1, len(stream) - 1)
        out = model(stream, SharedPrefixLayout((0, len(stream))), logit_rows=rows)
        logprobs.append(chosen_logprobs(out.logits, rollout))
        hidden.append(out.hidden_TD[start - begin :])
    return loss, torch.stack(logprobs), torch.stack(hidden)


def labels_of(tokens, cu_seqlens):
    labels = torch.cat([tokens[1:], torch.tensor([-100])])
    labels[torch.tensor(cu_seqlens[1:]) - 1] = -100
    return labels


def shared_loss(model, tokens, rollouts, cu_seqlens, starts):
    """The same in one forward over the flat stream."""
    layout = SharedPrefixLayout(cu_seqlens, starts, rollouts.shape[1])
    out = model(
        torch.cat([tokens, rollouts.flatten()]),
        layout,
        labels=labels_of(tokens, cu_seqlens),
        logit_rows=layout.predicting_rows(),
    )
    return out.losses.nll_sum, chosen_logprobs(out.logits, rollouts), out.hidden_TD[layout.branch_rows()]


def continued_loss(model, tokens, rollouts, cu_seqlens, starts, stride):
    """The same with the scoring pass as the training forward: snapshots, replay, continuation."""
    shard = ContextShard.of_rank(cu_seqlens, None)
    out, bank = read_with_snapshots(model, tokens, shard, stride, labels=labels_of(tokens, cu_seqlens))
    evaluation = rescore_rollouts(model, replay_prefixes(model, bank, tokens, starts), rollouts)
    return out.losses.nll_sum, chosen_logprobs(evaluation.logits_nkV, rollouts), evaluation.hidden_nkD


def with_gradients(model, outputs):
    """Loss, log-probs and hidden states, and the gradient of every parameter through all of them."""
    loss, logprobs, hidden = outputs
    weights = torch.linspace(-1, 1, logprobs.numel(), dtype=torch.float64).view_as(logprobs)
    total = loss + (logprobs * weights).sum() + 0.1 * (hidden * hidden.detach().sin()).sum()
    return [x.detach() for x in outputs], torch.autograd.grad(total, list(model.parameters()))


def assert_same(model, found, expected):
    for name, a, b in zip(("loss", "logprobs", "hidden"), found[0], expected[0]):
        assert relative_rms(a, b) < 1e-11, name
    scale = sum(float(g.square().sum()) for g in expected[1]) ** 0.5
    for (name, _), a, b in zip(model.named_parameters(), found[1], expected[1]):
        assert float((a - b).norm()) < 1e-10 * max(float(b.norm()), 1e-3 * scale), name


def assert_both_forms_equal_separate_prefixes(model, tokens, rollouts, cu_seqlens, starts, stride):
    expected = with_gradients(model, separate_loss(model, tokens, rollouts, cu_seqlens, starts))
    found = with_gradients(model, shared_loss(model, tokens, rollouts, cu_seqlens, starts))
    assert_same(model, found, expected)
    found = with_gradients(model, continued_loss(model, tokens, rollouts, cu_seqlens, starts, stride))
    assert_same(model, found, expected)


def test_every_family_has_small_args_here():
    assert SMALL.keys() == VARIANTS.keys() == FAMILIES.keys()


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_shared_prefix_equals_separate_prefixes(family, data):
    model = build(family)
    cu_seqlens = data.draw(packings(max_documents=3))
    starts = data.draw(positions(cu_seqlens))
    k = data.draw(st.integers(1, 5))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    tokens = torch.randint(0, 13, (cu_seqlens[-1],), generator=g)
    rollouts = torch.randint(0, 13, (len(starts), k), generator=g)
    stride = data.draw(st.sampled_from([1, 7, 64, 100]))
    assert_both_forms_equal_separate_prefixes(model, tokens, rollouts, cu_seqlens, starts, stride)


@pytest.mark.parametrize("family, options", [(family, options) for family in VARIANTS for options in VARIANTS[family]])
def test_every_option_keeps_the_contract(family, options):
    model = build(family, **options)
    cu_seqlens, starts = (0, 90, 170), (1, 64, 90, 91, 150, 150, 170)
    tokens = torch.randint(0, 13, (170,), generator=torch.Generator().manual_seed(0))
    rollouts = torch.randint(0, 13, (len(starts), 3), generator=torch.Generator().manual_seed(1))
    assert_both_forms_equal_separate_prefixes(model, tokens, rollouts, cu_seqlens, starts, stride=32)


@pytest.mark.parametrize("family", FAMILIES)
def test_trunk_does_not_see_branches(family):
    model = build(family)
    tokens = torch.randint(0, 13, (100,))
    alone = model(tokens, SharedPrefixLayout((0, 100))).hidden_TD
    layout = SharedPrefixLayout((0, 100), (10, 100), 4)
    with_branches = model(torch.cat([tokens, torch.randint(0, 13, (8,))]), layout).hidden_TD[:100]
    # blocked matrix products may sum in another order when there are more rows
    assert relative_rms(with_branches, alone) < 1e-13


# LaCT's chunks end before, inside and after the rollouts, once or at every token; the window is full or not.
DECODED = [*((family, {}) for family in FAMILIES), *(("lact", options) for options in VARIANTS["lact"])]
DECODED += [(family, options) for family in VARIANTS for options in VARIANTS[family] if "attn" in options]


@pytest.mark.parametrize("family, options", DECODED)
@pytest.mark.parametrize("stride", [1, 5, 64])
def test_greedy_decoding_from_snapshots_equals_greedy_full_forwards(family, options, stride):
    model = build(family, **options)
    cu_seqlens, starts, k = (0, 80, 200), (1, 2, 40, 63, 81, 81, 145, 198, 200), 8
    tokens = torch.randint(0, 13, (200,), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        _, bank = read_with_snapshots(model, tokens, ContextShard.of_rank(cu_seqlens, None), stride)
        prefix = replay_prefixes(model, bank, tokens, starts)
        request = RolloutRequest(tokens, cu_seqlens, starts, (0,) * len(starts), k, temperature=0, weight_version=3)
        engine = NativeEngine(model)
        with pytest.raises(EngineError, match="synchronised at weights version None, not 3"):
            engine.generate(request, prefix)
        engine.sync_weights(3)
        rollouts = engine.generate(request, prefix)
        for start, found, logprobs in zip(starts, rollouts.tokens_nk, rollouts.logprobs_nk):
            sequence = tokens[document_of(cu_seqlens, start)[0] : start]
            for token, logprob in zip(found, logprobs):
                last = torch.tensor([len(sequence) - 1])
                logits = model(sequence, SharedPrefixLayout((0, len(sequence))), logit_rows=last).logits[0]
                assert token == logits.argmax()
                torch.testing.assert_close(logprob, logits.log_softmax(-1)[token])
                sequence = torch.cat([sequence, token[None]])


def test_lact_has_a_state_at_every_token_and_replays_nothing():
    model = build("lact")
    shard = ContextShard.of_rank((0, 80, 200), None)
    tokens = torch.randint(0, 13, (200,))
    stride = model.model_args.snapshot_stride(64)
    _, bank = read_with_snapshots(model, tokens, shard, stride)
    prefix = replay_prefixes(lambda *_, **__: pytest.fail("a forward"), bank, tokens, (200, 1, 81, 81, 37))
    assert [layer["seen"].tolist() for layer in prefix.layers] == [[119, 0, 0, 0, 36]] * 2
    assert prefix.last_tokens_n.tolist() == tokens[torch.tensor([199, 0, 80, 80, 36])].tolist()
    # The 199 states are the rows of the pass, and the weights of each of 8 chunks once.
    assert bank.layers[0].nbytes < 10 * bank.layers[0].select(torch.tensor([0])).compact().nbytes


@pytest.mark.parametrize("family", FAMILIES)
def test_pass_that_is_asked_for_no_states_keeps_none(family):
    """LaCT's states refer to the rows of all layers: an output that has them would keep these alive."""
    model, tokens = build(family), torch.randint(0, 13, (11,))
    assert all(not layer.tensors for layer in model(tokens, SharedPrefixLayout((0, 7), (5,), 4)).states)
    assert all(layer.tensors for layer in model(tokens, SharedPrefixLayout((0, 11), state_positions=())).states)


def test_decoding_leaves_the_states_that_it_began_with():
    """In one sequence's float32 nothing is cast, and with other hidden channels than inputs nothing is stacked: the weights that a
    chunk's end writes anew must not be the trunk's."""
    model = build("lact", chunk_size=4, window_size=4, inter_multi=0.5).float()
    tokens = torch.randint(0, 13, (11,), generator=torch.Generator().manual_seed(0))
    _, bank = read_with_snapshots(model, tokens, ContextShard.of_rank((0, 11), None), 1)
    prefix = replay_prefixes(model, bank, tokens, (6,))
    before = [layer["fast_w0"].detach().clone() for layer in prefix.layers]
    engine = NativeEngine(model)
    engine.sync_weights(0)
    request = RolloutRequest(tokens, (0, 11), (6,), (0,), 5, temperature=0, weight_version=0)
    tokens_nk = engine.generate(request, prefix).tokens_nk
    assert all(torch.equal(layer["fast_w0"], weight) for layer, weight in zip(prefix.layers, before))
    rescore_rollouts(model, prefix, tokens_nk).logits_nkV.sum().backward()


@pytest.mark.parametrize(
    "family, overrides", [*((f, {"chunk_size": 8} if f == "lact" else {}) for f in FAMILIES), ("lact", {"chunk_size": 8, "window_size": 1})]
)
def test_every_prefix_and_continuation_reach_the_same_parameters(family, overrides):
    """FSDP2 reduces what a pass has gradients of: ranks whose chunks end in different passes must have those of the same
    parameters. A prefix by one model, what goes on from it by another, tell the two passes' gradients apart."""
    reader, continuer = build(family, **overrides), build(family, **overrides)
    reached = set()
    # LaCT's chunk ends in neither pass, in the second (inside, at its first token), between them, in the first, in both.
    for length in (2, 7, 8, 9, 12, 23):
        tokens, rollouts = torch.randint(13, (length,)), torch.randint(13, (2, 3))
        layout = SharedPrefixLayout((0, length), state_positions=(length - 1,))
        states = reader(tokens, layout).states
        prefix = PrefixStates(tokens[-1:].repeat(2), [layer.select(torch.zeros(2, dtype=torch.long)) for layer in states])
        loss = chosen_logprobs(rescore_rollouts(continuer, prefix, rollouts).logits_nkV, rollouts).sum()
        parameters = {(part, name): p for part in (0, 1) for name, p in (reader, continuer)[part].named_parameters()}
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        reached.add(frozenset(place for place, gradient in zip(parameters, gradients) if gradient is not None))
    assert len(reached) == 1, frozenset.union(*reached) - frozenset.intersection(*reached)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_an_engine_in_inference_mode_has_planned_serves_training(family):
    model = build(family, **({"chunk_size": 4, "window_size": 4} if family == "lact" else {}))
    tokens, cu_seqlens, starts = torch.randint(0, 13, (23,)), (0, 11, 23), (7, 14)
    forget_plans()
    with torch.inference_mode():
        rollouts = torch.randint(0, 13, (2, 3))
        shared_loss(model, tokens, rollouts, cu_seqlens, starts)
        continued_loss(model, tokens, rollouts, cu_seqlens, starts, 4)
    rollouts = rollouts.clone()
    for loss, logprobs, _ in (
        shared_loss(model, tokens, rollouts, cu_seqlens, starts),
        continued_loss(model, tokens, rollouts, cu_seqlens, starts, 4),
    ):
        (loss + logprobs.sum()).backward()


def test_layout_refuses_what_it_cannot_mean():
    with pytest.raises(ValueError, match="positions"):
        SharedPrefixLayout((0, 10), (11,), 3)
    with pytest.raises(ValueError, match="length"):
        SharedPrefixLayout((0, 10), (5,), 0)
    with pytest.raises(ValueError, match="empty sequences"):
        SharedPrefixLayout((0, 5, 5))
    with pytest.raises(ValueError, match="stream of 16 tokens"):
        build()(torch.zeros(15, dtype=torch.long), SharedPrefixLayout((0, 10), (3, 4), 3))
