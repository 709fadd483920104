"""Settings of the vLLM engine: what is refused before anything is built, and how its memory is counted."""

import importlib.util
from dataclasses import replace

import pytest
import torch

from refine_titan.errors import UserError
from refine_titan.models import FAMILIES, build_decoder
from refine_titan.models.sizes import resolve_flavor
from refine_titan.rollout import engine_memory
from refine_titan.rollout.build import resolve_evaluation_engine
from refine_titan.rollout.engine_memory import check_memory, memory_needs
from refine_titan.rollout.vllm_settings import cache_bytes, engine_settings, sequence_bytes
from tests.unit_tests.config.test_config import load

VLLM = "[rollout]\nengine = 'vllm'\n"
SMALL = "[model]\nflavor = 'debug'\n[training]\nseq_len = 2048\nlocal_batch_size = 2\nmixed_precision_param = 'float32'\n"


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    """As where vllm is installed, whether it is or not: settings are judged without it."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: True if name == "vllm" else find(name, *rest))


@pytest.mark.parametrize(
    "toml, message",
    [
        ("max_num_seqs = 0", "rollout.max_num_seqs is 0; allowed: at least 1"),
        ("block_tokens = -1", "rollout.block_tokens is -1; allowed: at least 1"),
        ("max_num_batched_tokens = 32", r"rollout.max_num_batched_tokens is 32; allowed: at least rollout.max_num_seqs \(64\)"),
        ("max_logprob_gap = 0.0", "rollout.max_logprob_gap is 0.0; allowed: above 0"),
        ("importance_ratio_cap = 0.5", "rollout.importance_ratio_cap is 0.5; allowed: 0 or at least 1"),
        ("cache_gib = -1.0", "rollout.cache_gib is -1.0"),
        ("prefixes = 'copied'", "rollout.prefixes is 'copied'; allowed: 'handed_over', 'cached', 'recomputed'"),
        ("dtype = 'float16'", "rollout.dtype is 'float16'; allowed: 'auto', 'float32', 'bfloat16'"),
        (
            "prefixes = 'cached'\ncache_gib = 0.001",
            r"which holds 3 state\(s\) of 0.29 MiB each; one rollout needs 4: allowed: at least 0.002,",
        ),
    ],
)
def test_wrong_settings_are_named_with_what_is_allowed(tmp_path, toml, message):
    with pytest.raises(UserError, match=message):
        load(tmp_path, f"{SMALL}{VLLM}{toml}\n")


def test_missing_vllm_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    with pytest.raises(UserError, match=r"rollout.engine is 'vllm', but vllm is not installed; allowed without it: 'native'.*'.\[gpu\]'"):
        load(tmp_path, SMALL + VLLM)
    load(tmp_path, SMALL)
    load(tmp_path, SMALL + VLLM + "[refine]\nobjective = 'ntp'\n")  # no rollouts, no engine


@pytest.mark.parametrize("family, on_gpu", [("delta_net", "vllm"), ("qwen3_5", "native")])
def test_engine_of_an_evaluation_runs_the_model(tmp_path, family, on_gpu):
    config, args = load(tmp_path, SMALL), resolve_flavor(family, "debug")
    assert resolve_evaluation_engine(config, args, torch.device("cuda")) == on_gpu
    assert resolve_evaluation_engine(config, args, torch.device("cpu")) == "native"
    asks_for_vllm = replace(config, evaluation=replace(config.evaluation, engine="vllm"))
    if args.has_attention:
        with pytest.raises(UserError, match="evaluation.engine is 'vllm', .* layers of attention here; allowed: 'auto', 'native'"):
            resolve_evaluation_engine(asks_for_vllm, args, torch.device("cuda"))
    else:
        assert resolve_evaluation_engine(asks_for_vllm, args, torch.device("cpu")) == "vllm"


def test_engine_that_does_not_fit_is_refused_with_the_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(engine_memory, "total_memory_bytes", lambda: 2**30)
    args = resolve_flavor("delta_net", "debug")
    check_memory(load(tmp_path, SMALL + VLLM), args, num_ranks=1)
    message = (
        r"the run does not fit: this machine has 1.00 GiB for its rank; a rank needs at least 2.0\d GiB: "
        r"\S+ MiB for weights, gradients, optimizer and block inputs, 0.00 MiB for the engine's weights, 2.00 GiB for its states"
    )
    with pytest.raises(UserError, match=message):
        check_memory(load(tmp_path, SMALL + VLLM + "cache_gib = 2.0\n"), args, num_ranks=1)


def test_needs_are_counted_from_the_models_sizes(tmp_path):
    args = resolve_flavor("delta_net", "debug")
    config = load(tmp_path, SMALL + VLLM + "prefixes = 'cached'\n[refine]\nnum_chunks = 4\n")
    # 4 layers of 4 heads with a 64 x 64 float32 state, and 3 rows of 768 channels
    state = 4 * (4 * 64 * 64 * 4 + 3 * 768 * 4)
    assert sequence_bytes(config, args) == state
    # 8 rollouts at once with 3 pages each, the last prefix of 2 sequences, vLLM's own page
    assert cache_bytes(config, args, 1) == state * (3 * 8 + 2 + 1)
    handed_over = replace(config, rollout=replace(config.rollout, prefixes="handed_over"))
    assert cache_bytes(handed_over, args, 1) == state * 9
    assert cache_bytes(handed_over, args, 4) == state * 33 and cache_bytes(handed_over, args, 99) == state * 65  # max_num_seqs and one
    few = replace(config, rollout=replace(config.rollout, max_num_seqs=5))
    assert cache_bytes(few, args, 1) == state * (3 * 5 + 2 + 1)

    parameters = sum(p.numel() for p in build_decoder(args).parameters())
    one, two = memory_needs(config, args, 1, gpu=False), memory_needs(config, args, 2, gpu=False)
    inputs = 2 * 2048 * 256 * 4 * 4
    assert one.trainer == 16 * parameters + inputs and one.engine_weights == 0
    assert two.trainer == 8 * parameters + inputs and two.engine_weights == 4 * parameters
    low = replace(config, rollout=replace(config.rollout, dtype="bfloat16"))
    assert memory_needs(low, args, 1, gpu=False).engine_weights == 2 * parameters
    assert one.total == one.trainer + one.engine_cache


def test_recorded_steps_keep_one_layers_states(tmp_path):
    args = resolve_flavor("delta_net", "debug")
    config = load(tmp_path, SMALL + "[rollout]\nengine = 'vllm'\n[refine]\nnum_chunks = 3\n")  # 2 sequences, 6 rollouts: as 8
    recorded, plain = (memory_needs(config, args, 1, gpu=gpu).engine_cache for gpu in (True, False))
    assert recorded - plain == 8 * sequence_bytes(config, args) // args.n_layers
    off = replace(config, rollout=replace(config.rollout, cuda_graph=False))
    assert memory_needs(off, args, 1, gpu=True).engine_cache == plain


def test_recorded_rounds_keep_their_states_and_cast_weights(tmp_path):
    args = resolve_flavor("delta_net", "debug")
    config = load(tmp_path, SMALL + "[rollout]\nengine = 'native'\n[refine]\nnum_chunks = 4\n")
    parameters = sum(p.numel() for p in build_decoder(args).parameters())
    # float32 without autocast keeps no copies; of 2 sequences 4 rollouts each
    needs = memory_needs(config, args, 1, gpu=True)
    assert (needs.engine_weights, needs.engine_cache) == (0, 8 * sequence_bytes(config, args))
    low = replace(config, training=replace(config.training, mixed_precision_param="bfloat16"))
    assert memory_needs(low, args, 1, gpu=True).engine_weights == 2 * parameters
    # answers are a round of their own, unless it has too many steps to be recorded
    posttrain = replace(config.posttrain, outer="reward", samples=3, answer_tokens=10)
    answers = replace(config, refine=replace(config.refine, phase="posttrain"), posttrain=posttrain)
    assert memory_needs(answers, args, 1, gpu=True).engine_cache == (8 + 2 * 3) * sequence_bytes(config, args)
    long = replace(answers, posttrain=replace(posttrain, answer_tokens=1000))
    assert memory_needs(long, args, 1, gpu=True).engine_cache == 8 * sequence_bytes(config, args)
    for changed, ranks, gpu in (
        (replace(config, rollout=replace(config.rollout, cuda_graph=False)), 1, True),
        (replace(config, refine=replace(config.refine, objective="ntp")), 1, True),
        (config, 2, True),
        (config, 1, False),
    ):
        needs = memory_needs(changed, args, ranks, gpu)
        assert needs.engine_weights == needs.engine_cache == 0


WITHOUT_ATTENTION = [name for name, family in FAMILIES.items() if not family.flavors["debug"].has_attention]


def test_models_with_attention_are_refused(tmp_path):
    with pytest.raises(UserError, match="layers of attention here; allowed: 'native'"):
        load(tmp_path, "[model]\nname = 'qwen3_5'\nflavor = 'debug'\n[rollout]\nengine = 'vllm'\n")


@pytest.mark.parametrize("family", WITHOUT_ATTENTION)
def test_every_family_has_engine_settings(tmp_path, family):
    config = load(tmp_path, f"[model]\nname = '{family}'\nflavor = 'debug'\n[rollout]\nengine = 'vllm'\n")
    settings = engine_settings(config, resolve_flavor(family, "debug"), 1)
    assert settings.dtype == torch.bfloat16 and settings.max_model_len == 16384 + 5
    assert settings.cache_bytes % sequence_bytes(config, resolve_flavor(family, "debug")) == 0
