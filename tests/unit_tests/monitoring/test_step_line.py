"""The line of a step fits, keeps its columns, and shows no number that is not there."""

import pytest

from refine_titan.monitoring.step_line import MOST_COLUMNS, StepLine

NTP = {
    "loss_metrics/global_avg_loss": 2.24771,
    "refine/ntp_loss": 2.24771,
    "refine/pg_loss": None,
    "grad_norm": 1.2264,
    "timing/tokens_per_second": 2929.4,
    "timing/data": 0.002,
    "timing/score": 0.51,
    "timing/update": 1.333,
    "timing/total": 1.9,
}
ROLLOUTS = {
    "refine/pg_loss": -1.2e-8,
    "refine/clip_fraction": 0.0,
    "refine/advantage_std": 0.935,
    "rollout/reward_mean": 0.5391,
    "rollout/reward_std": 0.1449,
    "rollout/match_mean": 0.2,
}
SFT = {"refine/answer_loss": 3.2}
REWARD = {"rollout/task_reward": 0.125, "rollout/task_reward_std": 0.33, "refine/answer_pg_loss": -0.01}


def test_lines_at_common_widths():
    line = StepLine(180)
    assert line.text(120, NTP, "1:27") == "step 120/180  loss 2.2477  grad 1.226  2,929 tok/s  eta 1:27"
    refine = NTP | ROLLOUTS
    assert StepLine(180).text(120, refine, "1:27") == (
        "step 120/180  loss 2.2477  reward 0.539±0.145  match 0.200  grad 1.226  2,929 tok/s  eta 1:27"
    )
    assert StepLine(180).text(120, refine, "1:27", width=80) == (
        "step 120/180  loss 2.2477  reward 0.539±0.145  grad 1.226  2,929 tok/s  eta 1:27"
    )
    assert StepLine(180).text(120, refine, "1:27", width=120) == StepLine(180).text(120, refine, "1:27")


@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
@pytest.mark.parametrize("extra", [{}, ROLLOUTS, ROLLOUTS | SFT, ROLLOUTS | REWARD, SFT, REWARD])
def test_lines_of_long_runs_fit(width, extra):
    large = {"loss_metrics/global_avg_loss": 12.34567, "grad_norm": 123.4567, "timing/tokens_per_second": 1234567.8}
    for log_stages in (False, True):
        text = StepLine(100_000, log_stages).text(99_999, NTP | large | extra, "123:04:05", width)
        least = len("step  99999/100000  loss 12.3457  grad 123.457  1,234,568 tok/s  eta 123:04:05")
        assert all(len(line) <= max(min(width, MOST_COLUMNS), least) for line in text.splitlines())
        assert "-0.0000" not in text and "nan" not in text and "None" not in text


def test_number_of_nearly_0_has_no_sign():
    text = StepLine(9).text(1, NTP | ROLLOUTS | {"rollout/reward_mean": -1.2e-8}, "0:01")
    assert "  reward 0.000±0.145  " in text


def test_columns_do_not_come_back():
    """The time left shrinks from hours to minutes; a column that has been left out for it stays out."""
    line = StepLine(18_000)
    metrics = NTP | ROLLOUTS
    assert "±" not in line.text(1, metrics, "123:27:00")
    assert "±" not in line.text(2, metrics, "1:27")


def test_stages_follow_where_asked():
    text = StepLine(180, log_stages=True).text(120, NTP, "1:27")
    assert text.splitlines()[1:] == ["    seconds:  data 0.00  score 0.51  update 1.33"]


def test_step_without_an_update_says_so():
    assert "  grad non-finite  " in StepLine(9).text(1, NTP | {"grad_norm": None}, "0:01")
