"""Several microbatches a step are one big microbatch: losses, gradient norms, and the weights after the run."""

import pytest

from refine_titan.conversion.dcp_weights import DCPWeights
from tests.helpers import relative_rms
from tests.integration_tests.runs import assert_finished, losses, train

# Greedy rollouts from argmax positions: what is drawn does not depend on how sequences are numbered over ranks.
COMMON = [
    "--refine.temperature",
    "0",
    "--refine.selection",
    "argmax",
    "--training.steps",
    "3",
    "--optimizer.lr",
    "1e-4",
    "--data.shuffle_buffer",
    "1",
    "--checkpoint.interval",
    "100",
]
STEPS = {
    "ntp": ["--refine.objective", "ntp", "--refine.num_mini_batches", "1"],
    "training form": ["--refine.num_mini_batches", "1"],
    "separate form": ["--refine.num_mini_batches", "1", "--refine.scoring_pass", "separate"],
}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("step", STEPS)
def test_accumulated_gradients_are_those_of_one_microbatch(tmp_path, step, ranks):
    weights = {}
    for name, local in (("accumulated", 1), ("whole", 4 // ranks)):
        sizes = ["--training.global_batch_size", "4", "--training.local_batch_size", str(local)]
        assert_finished(train(tmp_path / name, *COMMON, *STEPS[step], *sizes, ranks=ranks))
        weights[name] = DCPWeights(tmp_path / name / "checkpoint" / "step-3")
    for ours, theirs in zip(losses(tmp_path / "accumulated"), losses(tmp_path / "whole"), strict=True):
        for key in (
            ("loss_metrics/global_avg_loss", "grad_norm")
            if step == "ntp"
            else ("loss_metrics/global_avg_loss", "grad_norm", "rollout/reward_mean")
        ):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4), (ours["step"], key)
    for name in weights["whole"].tensors:
        assert relative_rms(weights["accumulated"].read(name), weights["whole"].read(name)) < 1e-4, name
