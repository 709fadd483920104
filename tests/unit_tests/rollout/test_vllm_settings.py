"""Settings of the vLLM engine: what is refused before anything is built, and how its memory is counted."""

import importlib.util
from dataclasses import replace

import pytest
import torch

from refine_titan.errors import UserError
from refine_titan.models import FAMILIES, build_decoder
from refine_titan.models.sizes import resolve_flavor
from refine_titan.rollout import engine_memory
from refine_titan.rollout.build import check_engine, engine_dtype, resolve_evaluation_engine
from refine_titan.rollout.engine_memory import check_memory, memory_needs
from refine_titan.rollout.page_pool import PagePool
from refine_titan.rollout.vllm_settings import cache_bytes, engine_settings, page_pool
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


ONLY_ATTENTION = ["full_attention"] * 4


@pytest.mark.parametrize(
    "family, options, on_gpu", [("delta_net", {}, "vllm"), ("qwen3_5", {}, "vllm"), ("qwen3_5", {"layer_types": ONLY_ATTENTION}, "native")]
)
def test_engine_of_an_evaluation_runs_the_model(tmp_path, family, options, on_gpu):
    config, args = load(tmp_path, SMALL), replace(resolve_flavor(family, "debug"), **options)
    assert resolve_evaluation_engine(config, args, torch.device("cuda")) == on_gpu
    assert resolve_evaluation_engine(config, args, torch.device("cpu")) == "native"
    asks_for_vllm = replace(config, evaluation=replace(config.evaluation, engine="vllm"))
    if on_gpu == "native":
        with pytest.raises(UserError, match="evaluation.engine is 'vllm', .* attention in every layer, .*; allowed: 'auto', 'native'"):
            resolve_evaluation_engine(asks_for_vllm, args, torch.device("cuda"))
    else:
        assert resolve_evaluation_engine(asks_for_vllm, args, torch.device("cpu")) == "vllm"


def test_test_time_training_answers_with_the_engine_of_its_rollouts(tmp_path, monkeypatch):
    adapting, args = SMALL + "[refine]\nphase = 'ttt'\n", resolve_flavor("delta_net", "debug")
    for toml, engine in [(adapting, "native"), (adapting + VLLM, "vllm"), (adapting + VLLM + "[evaluation]\nengine = 'vllm'\n", "vllm")]:
        for device in ("cuda", "cpu"):
            assert resolve_evaluation_engine(load(tmp_path, toml), args, torch.device(device)) == engine
    with pytest.raises(UserError, match="evaluation.engine is 'vllm' with rollout.engine = 'native' .* or rollout.engine = 'vllm' too"):
        load(tmp_path, adapting + "[evaluation]\nengine = 'vllm'\n")
    with pytest.raises(UserError, match="evaluation.engine is 'native' with rollout.engine = 'vllm' .* allowed: 'auto', 'vllm', or"):
        load(tmp_path, adapting + VLLM + "[evaluation]\nengine = 'native'\n")
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    with pytest.raises(UserError, match="rollout.engine is 'vllm', but vllm is not installed"):
        load(tmp_path, adapting + "objective = 'ntp'\n" + VLLM)


def test_settings_of_an_engine_that_is_not_asked_for_are_warned_of(tmp_path, caplog):
    fewer = SMALL + "[rollout]\nmax_num_seqs = 8\n"
    load(tmp_path, fewer)
    assert "rollout.max_num_seqs has no effect on rollouts with rollout.engine = 'native'" in caplog.text
    caplog.clear()
    load(tmp_path, fewer + "[evaluation]\nengine = 'vllm'\n")
    assert "has no effect" not in caplog.text


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
    assert page_pool(config, args).block_bytes == state
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
    assert recorded - plain == 8 * page_pool(config, args).page_bytes
    off = replace(config, rollout=replace(config.rollout, cuda_graph=False))
    assert memory_needs(off, args, 1, gpu=True).engine_cache == plain


def test_recorded_rounds_keep_their_states_and_cast_weights(tmp_path):
    args = resolve_flavor("delta_net", "debug")
    config = load(tmp_path, SMALL + "[rollout]\nengine = 'native'\n[refine]\nnum_chunks = 4\n")
    parameters = sum(p.numel() for p in build_decoder(args).parameters())
    # float32 without autocast keeps no copies; of 2 sequences 4 rollouts each
    needs = memory_needs(config, args, 1, gpu=True)
    assert (needs.engine_weights, needs.engine_cache) == (0, 8 * page_pool(config, args).block_bytes)
    low = replace(config, training=replace(config.training, mixed_precision_param="bfloat16"))
    assert memory_needs(low, args, 1, gpu=True).engine_weights == 2 * parameters
    # answers are a round of their own, unless it has too many steps to be recorded
    posttrain = replace(config.posttrain, outer="reward", samples=3, answer_tokens=10)
    answers = replace(config, refine=replace(config.refine, phase="posttrain"), posttrain=posttrain)
    assert memory_needs(answers, args, 1, gpu=True).engine_cache == (8 + 2 * 3) * page_pool(config, args).block_bytes
    long = replace(answers, posttrain=replace(posttrain, answer_tokens=1000))
    assert memory_needs(long, args, 1, gpu=True).engine_cache == 8 * page_pool(config, args).block_bytes
    for changed, ranks, gpu in (
        (replace(config, rollout=replace(config.rollout, cuda_graph=False)), 1, True),
        (replace(config, refine=replace(config.refine, objective="ntp")), 1, True),
        (config, 2, True),
        (config, 1, False),
    ):
        needs = memory_needs(changed, args, ranks, gpu)
        assert needs.engine_weights == needs.engine_cache == 0


HYBRID = SMALL.replace("flavor", "name = 'qwen3_5'\nflavor") + VLLM


def test_pages_of_hybrids_are_counted(tmp_path):
    """Three layers with states and one of attention make groups of one layer each."""
    args = resolve_flavor("qwen3_5", "debug")
    config = load(tmp_path, HYBRID + "[refine]\nnum_chunks = 4\n")
    # The state has 4 value heads of 64 x 64 float32 numbers and 3 rows of 512 channels: the keys and values, 2 heads of 64 channels each,
    # of 70 tokens; pages have a multiple of 32.
    page = 96 * 2 * 2 * 64 * 4
    pool = page_pool(config, args)
    assert (pool.page_bytes, pool.group_layers, pool.state_groups, pool.attention_groups, pool.block_tokens) == (page, 1, 3, 1, 96)
    # 8 rollouts at once: 2 states in each of 3 groups, the page in which a rollout of 5 tokens begins and one more; of 2 sequences of 2,048
    # tokens 21 full pages each; vLLM's own.
    assert cache_bytes(config, args, 1) == page * (8 * (2 * 3 + 2) + 2 * 21 + 1)
    recomputed = replace(config, rollout=replace(config.rollout, prefixes="recomputed"))
    assert cache_bytes(recomputed, args, 1) == page * (8 * (3 + 22) + 1)
    cached = replace(config, rollout=replace(config.rollout, prefixes="cached", block_tokens=200))
    assert page_pool(cached, args).block_tokens == 224
    assert engine_settings(config, args, 1).block_tokens == 96 and engine_settings(cached, args, 1).block_tokens == 224
    shared = replace(config, parallelism=replace(config.parallelism, tensor_parallel_degree=2))
    assert page_pool(shared, args).page_bytes == page / 2
    assert memory_needs(config, args, 1, gpu=True).engine_cache == cache_bytes(config, args, 1)  # its steps are not recorded


@pytest.mark.parametrize(
    "family, flavor, options, expected",
    [
        ("qwen3_5", "4B", {}, (8, 3, 1, 544)),
        ("qwen3_5", "27B", {}, (16, 3, 1, 800)),
        ("olmo_hybrid", "7B", {}, (8, 3, 1, 160)),
        ("delta_net", "debug", {"attn": {"layers": [0, 3], "num_heads": 4}}, (2, 1, 1, 96)),
        ("delta_net", "debug", {"n_layers": 5, "attn": {"layers": [0, 3], "num_heads": 4}}, (2, 2, 1, 96)),
        # Nearly as many of one kind as of the other: groups of the larger number.
        ("delta_net", "debug", {"n_layers": 7, "attn": {"layers": [0, 3, 4], "num_heads": 4}}, (4, 1, 1, 96)),
    ],
)
def test_groups_of_layers(family, flavor, options, expected):
    pool = PagePool.of(replace(resolve_flavor(family, flavor), **options), torch.bfloat16)
    assert (pool.group_layers, pool.state_groups, pool.attention_groups, pool.block_tokens) == expected


def test_shared_keys_and_values_take_less_memory(tmp_path):
    """Qwen3.5-4B at 131,072 tokens with 8 rollouts."""
    args = resolve_flavor("qwen3_5", "4B")
    toml = "[model]\nname = 'qwen3_5'\nflavor = '4B'\n[training]\nseq_len = 131072\n[rollout]\nengine = 'vllm'\nprefixes = '{}'\n"
    handed_over, recomputed = (cache_bytes(load(tmp_path, toml.format(p)), args, 1) / 2**30 for p in ("handed_over", "recomputed"))
    assert handed_over < 5.1 < 30 < recomputed


@pytest.mark.parametrize(
    "toml, message",
    [
        ("cache_gib = 0.001", r"which holds 10 block\(s\) of 0.09 MiB each; one rollout needs 29: allowed: at least 0.003,"),
        ("max_num_batched_tokens = 90", r"allowed: at least .* and the tokens of a page of this model \(96\)"),
    ],
)
def test_wrong_settings_of_hybrids_are_named(tmp_path, toml, message):
    with pytest.raises(UserError, match=message):
        load(tmp_path, f"{HYBRID}{toml}\n")


@pytest.mark.parametrize(
    "attn, message",
    [
        ({"layers": [0, 1, 2, 3], "num_heads": 4}, "the model has attention in every layer, which does not run there; allowed: 'native'"),
        ([{"layers": [0], "num_heads": 4}, {"layers": [2], "num_heads": 2}], "the model has layers of attention with different heads"),
    ],
)
def test_models_that_do_not_run_are_refused_by_name(tmp_path, attn, message):
    args = replace(resolve_flavor("delta_net", "debug"), attn=attn)
    with pytest.raises(UserError, match=message):
        check_engine(load(tmp_path, SMALL + VLLM), args)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_engine_settings(tmp_path, family):
    config = load(tmp_path, f"[model]\nname = '{family}'\nflavor = 'debug'\n[rollout]\nengine = 'vllm'\n")
    settings = engine_settings(config, resolve_flavor(family, "debug"), 1)
    assert settings.dtype == torch.bfloat16 and settings.max_model_len == 16384 + 5
    assert settings.cache_bytes % page_pool(config, resolve_flavor(family, "debug")).block_bytes == 0


@pytest.mark.parametrize(
    "rollout, expected",
    [("", torch.float32), ("engine = 'vllm'", torch.float32), ("engine = 'vllm'\ndtype = 'bfloat16'", torch.bfloat16)],
)
def test_the_engines_dtype_is_known(tmp_path, rollout, expected):
    assert engine_dtype(load(tmp_path, f"{SMALL}[rollout]\n{rollout}")) == expected
