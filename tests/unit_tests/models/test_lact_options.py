"""LaCT's options in random combinations against another implementation of the whole model, branches included."""

import importlib.util
import random

import pytest
import torch

from refine_titan.models import build_decoder
from refine_titan.models.lact import LaCTArgs
from refine_titan.models.shared_prefix import SharedPrefixLayout
from refine_titan.models.state_dict_adapter import DecoderStateDictAdapter
from tests.helpers import relative_rms


@pytest.fixture(scope="module")
def other(oracles):
    path = oracles.parent / "probes" / "shared_prefix" / "lact.py"
    if not path.is_file():
        pytest.skip(f"the other implementation is not at {path}")
    spec = importlib.util.spec_from_file_location("other_lact", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def draw_args(rng: random.Random) -> LaCTArgs:
    def coin() -> bool:
        return rng.random() < 0.5

    heads = rng.choice([1, 2, 3])
    return LaCTArgs(
        vocab_size=17,
        dim=heads * rng.choice([16, 24, 32]),
        n_layers=2,
        intermediate_size=rng.choice([24, None]),
        n_fast_heads=heads,
        n_attn_heads=heads * rng.choice([1, 2]),
        inter_multi=rng.choice([1, 2]),
        chunk_size=rng.choice([16, 29, 32, 200]),
        window_size=rng.choice([4, 32, 33, 300]),
        rope_theta=rng.choice([1e4, 1e6]),
        attn_qk_norm=coin(),
        qkv_silu=coin(),
        learnable_ttt_scale=coin(),
        use_momentum=coin(),
        use_muon=coin(),
        ttt_prenorm=coin(),
        ttt_nope=coin(),
        w0_w2_low_rank=rng.choice([-1, 3]),
        initializer_range=0.1,
        newton_schulz_dtype="float32",
    )


@pytest.mark.parametrize("seed", range(16))
@torch.no_grad()
def test_hidden_states_are_equal(other, seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    args = draw_args(rng)
    model = build_decoder(args)
    model.init_weights()
    for parameter in model.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))  # biases and offsets begin at zero
    T, n, k = rng.choice([40, 61, 97]), 3, 4
    starts = sorted(rng.sample(range(1, T + 1), n))
    tokens, rollouts = torch.randint(0, 17, (T,)), torch.randint(0, 17, (n, k))
    layout = SharedPrefixLayout((0, T), tuple(starts), k)
    ours = model(torch.cat([tokens, rollouts.flatten()]), layout).hidden_TD
    weights = DecoderStateDictAdapter(args).to_hf(model.state_dict())
    theirs = other.forward(weights, args.to_hf_config(), tokens, starts, rollouts)
    # Muon on chunks of few tokens amplifies rounding; a wrong option shows at 1e-2 and more.
    assert relative_rms(ours, theirs) < 1e-4
