"""Test-time training: what is restored, what an answer depends on, and what is refused."""

import json
import random
from dataclasses import replace

import pytest
import torch

from refine_titan.conversion.from_hf import from_hf
from refine_titan.errors import UserError
from refine_titan.inference import Inference
from refine_titan.models.state_dict_adapter import DecoderStateDictAdapter
from refine_titan.models.stored_tensors import same_bits
from refine_titan.rollout.completion import CompletionRequest
from refine_titan.steps.test_time import TestTimeTrainer
from refine_titan.validation import load_config
from tests.checkpoints import random_weights, write_hf_folder
from tests.helpers import two_layers

WIDTH = 2


def tiny_args(family: str = "delta_net"):
    args = replace(two_layers(family), dim=64, intermediate_size=64)
    return replace(args, newton_schulz_dtype="float32") if family == "lact" else args


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Makes configs of a tiny model, and lets no process group or rank of one test reach the next."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that what joining a process group sets is taken back
        monkeypatch.delenv(name)

    def make(*overrides: str, family: str = "delta_net", phase: str = "ttt"):
        folder = tmp_path / family
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(tiny_args(family).to_hf_config()))
        common = {
            "model.name": family,
            "model.flavor": folder,
            "refine.phase": phase,
            "refine.reward": "hybrid",
            "refine.rl_coef": 0.4,
            "refine.num_chunks": 4,
            "refine.snapshot_stride": 32,
            "training.mixed_precision_param": "float32",
            "optimizer.lr": 5e-3,
            "training.seq_len": 400,
            "activation_checkpoint.mode": "none",
        }
        return load_config([*(f"--{name}={value}" for name, value in common.items()), *overrides])

    return make


def prompts(count: int, seed: int = 0) -> list[tuple[int, ...]]:
    draw = random.Random(seed)
    return [tuple(draw.choices(range(32, 127), k=draw.randrange(50, 160))) for _ in range(count)]


def answer(trainer: TestTimeTrainer, prompt: tuple[int, ...]) -> tuple[int, ...]:
    request = CompletionRequest((prompt,), (10,), (11,), temperature=1.0)
    return trainer.completions.complete(request, trainer.inference.tokenizer.decode)[0].tokens


def answers(config, asked, engine="native") -> dict:
    """The answer to each prompt of `asked`, in that order, each after an adaptation to it."""
    found = {}
    with TestTimeTrainer.from_config(config, width=WIDTH, max_tokens=200, engine=engine) as trainer:
        for prompt in asked:
            trainer.adapt([prompt])
            found[prompt] = answer(trainer, prompt)
            trainer.restore()
    return found


def weights(trainer: TestTimeTrainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.inference.model.state_dict().items()}


def assert_same_weights(found: dict, expected: dict) -> None:
    assert all(same_bits(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("family", ["delta_net", "lact", "qwen3_5"])
@pytest.mark.parametrize("objective", ["refine", "ntp"])
def test_weights_and_optimizer_are_restored_to_the_last_bit(job, family, objective):
    config = job("--refine.objective", objective, family=family)
    first, second = prompts(2)
    with TestTimeTrainer.from_config(config, width=WIDTH) as trainer:
        start, before = weights(trainer), answer(trainer, first)
        metrics = trainer.adapt([first])
        adapted = weights(trainer)
        assert metrics["optimizer_steps"] == 2 and metrics["ntp_loss"][1] < metrics["ntp_loss"][0]
        assert (metrics["reward_mean"][0] is None) == (objective == "ntp")
        changed = [name for name in start if not same_bits(adapted[name], start[name])]
        assert len(changed) > 0.9 * len(start)  # LaCT's momentum has no gradient within its first chunk
        optimizers = list(trainer.refine_step.runtime.optimizers)
        assert all(int(state["step"]) == 2 for o in optimizers for state in o.state.values()) and optimizers[0].state
        trainer.restore()
        assert_same_weights(weights(trainer), start)
        assert not any(o.state for o in optimizers) and answer(trainer, first) == before
        # An optimizer that went on with old moments would take other steps.
        trainer.adapt([second])
        trainer.restore()
        trainer.adapt([first])
        assert_same_weights(weights(trainer), adapted)


def test_twenty_prompts_in_any_order_give_the_same_answers_and_carrying_over_others(job):
    asked = prompts(20)
    shuffled = random.Random(1).sample(asked, 20)
    expected = answers(job(), asked)
    assert answers(job(), shuffled) == expected
    carried = answers(job("--ttt.carry_over"), asked)
    assert carried[asked[0]] == expected[asked[0]]  # nothing to carry over yet
    assert carried != expected
    assert {p: carried[p] for p in asked[:4]} != answers(job("--ttt.carry_over"), asked[3::-1])


def test_carrying_over_keeps_no_copy_and_restores_nothing(job):
    with TestTimeTrainer.from_config(job("--ttt.carry_over"), width=WIDTH) as trainer:
        trainer.adapt(prompts(1))
        adapted = weights(trainer)
        trainer.restore()
        assert_same_weights(weights(trainer), adapted)
        assert trainer._start is None


def test_a_batch_of_eight_in_two_mini_batches_takes_two_steps(job):
    """The paper's: two optimizer steps on four prompts each, all rollouts from the weights before them."""
    config = job("--ttt.batch_size", "8", "--training.local_batch_size", "2")
    asked = prompts(8)
    with TestTimeTrainer.from_config(config, width=WIDTH) as trainer:
        metrics = trainer.adapt(asked)
        assert metrics["optimizer_steps"] == 2 and len(metrics["ntp_loss"]) == 1
        trainer.restore()
        assert trainer.adapt(asked, steps=3)["optimizer_steps"] == 3  # a second round over its first half
        trainer.restore()
        assert trainer.adapt(asked[:5], steps=2)["optimizer_steps"] == 2  # four prompts, then one
        trainer.restore()
        one_a_microbatch = weights_after(job("--ttt.batch_size", "8", "--training.local_batch_size", "1"), asked)
        trainer.adapt(asked)
        # other sums of the same gradients, which Adam's first steps turn into signs
        for name, tensor in weights(trainer).items():
            assert (tensor - one_a_microbatch[name]).abs().mean() < 1e-4, name


def weights_after(config, asked) -> dict[str, torch.Tensor]:
    with TestTimeTrainer.from_config(config, width=WIDTH) as trainer:
        trainer.adapt(asked)
        return weights(trainer)


def test_equal_prompts_of_a_batch_draw_different_rollouts(job):
    prompt = prompts(1)[0]
    with TestTimeTrainer.from_config(job("--ttt.batch_size", "2"), width=WIDTH) as trainer:
        (batch,), _ = trainer._microbatches([prompt])
        names = [name for batch in trainer._microbatches([prompt, prompt])[0] for name in batch.document_names]
        assert len(set(names)) == 2 and batch.document_names[0] == names[0]


def test_prompts_too_short_to_learn_from_are_counted_and_answered(job):
    with TestTimeTrainer.from_config(job(), width=WIDTH) as trainer:
        start = weights(trainer)
        metrics = trainer.adapt([(1, 2, 3)])
        assert metrics["optimizer_steps"] == 0 and metrics["too_short"] == 1 and metrics["ntp_loss"] == []
        assert_same_weights(weights(trainer), start)
        assert len(answer(trainer, (1, 2, 3))) == 10
        trainer.restore()


def test_seed_and_prompt_decide_the_draws(job):
    (asked,) = prompts(1)
    with TestTimeTrainer.from_config(job(), width=WIDTH) as trainer:
        after = []
        for seed in (1, 1, 2):
            trainer.adapt([asked], seed=seed)
            after.append(weights(trainer)["output.weight"])
            trainer.restore()
    assert same_bits(after[0], after[1]) and not same_bits(after[0], after[2])


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["refine", "ntp"])
def test_vllm_engine_follows_the_weights_and_gives_the_native_answers(job, objective):
    pytest.importorskip("vllm", reason="needs the extra cpu or gpu")
    config, asked = job("--refine.objective", objective, "--refine.temperature", "0"), prompts(4)
    assert answers(config, asked, engine="vllm") == answers(config, asked)


def test_another_phase_and_float8_are_refused(job):
    with pytest.raises(UserError, match="refine.phase is 'midtrain'; test-time training needs 'ttt'"):
        TestTimeTrainer.from_config(job(phase="midtrain"))
    config = job()
    config.model.converters = ["quantize.linear.float8"]
    with pytest.raises(UserError, match="test-time training supports none"):
        TestTimeTrainer.from_config(config)


def test_checkpoint_is_read_from_either_format(job, tmp_path):
    folder = write_hf_folder(tmp_path / "hf", tiny_args(), random_weights(tiny_args()))
    from_hf(folder, tmp_path / "dcp")
    asked, found = prompts(1)[0], []
    for checkpoint in (folder, tmp_path / "dcp"):
        with Inference.from_config(job(), checkpoint) as inference:
            found.append({name: tensor.clone() for name, tensor in inference.model.state_dict().items()})
            engine = inference.build_engine("native", width=WIDTH, max_tokens=200)
            request = CompletionRequest((asked,), (5,), (1,))
            assert len(engine.complete(request, inference.tokenizer.decode)[0].tokens) == 5
    assert_same_weights(*found)
    expected = DecoderStateDictAdapter(tiny_args()).from_hf(random_weights(tiny_args()))
    assert_same_weights(found[0], expected)


def test_wrong_checkpoints_are_named(job, tmp_path, monkeypatch):
    other = write_hf_folder(tmp_path / "other", replace(tiny_args(), n_layers=1), random_weights(replace(tiny_args(), n_layers=1)))
    (tmp_path / "empty").mkdir()
    for checkpoint, message in [
        (tmp_path / "nowhere", "checkpoint: .*nowhere is not a folder"),
        (tmp_path / "empty", "holds neither .metadata .* nor config.json"),
        (other, "checkpoint: .* num_hidden_layers 1|checkpoint: .* n_layers 1"),
    ]:
        with pytest.raises(UserError, match=message):
            Inference.from_config(job(), checkpoint)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="this runs in one process, and torchrun has started 2"):
        Inference.from_config(job())
