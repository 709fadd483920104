"""The mathematics of ReFINE (arXiv 2602.16704, section 3) as functions of tensors, which know neither models nor engines.

Symbols: x the tokens of a sequence, z the logits, h the hidden states of the final norm, k tokens of a rollout y that starts at x_r.

| equation | where |
|---|---|
| H_t = logsumexp(z_t) - softmax(z_t) . z_t, and the next-token loss NTP | `refine_kernels.linear_head`, in the scoring pass |
| mean of H over a window of k tokens | `positions.smooth_entropy` |
| one token a chunk, drawn from softmax(H / tau); r is the next one | `positions.entropy`, `positions.select_positions` |
| log p(y_j given x_<r, y_<j) | `losses.chosen_logprobs` |
| R = mean_j cos(h(y_j), h(x_{r+j})), or mean_j 1[y_j = x_{r+j}], or their sum | `rewards.cosine`, `rewards.binary`, `rewards.hybrid` |
| A = (R - mean(R)) / (std(R) + 1e-6) within a group | `advantages.group_advantages` |
| the policy loss PG, clipped on both sides | `losses.policy_loss` |
| ntp_coef NTP + rl_coef PG | `steps.refine_step`, which sums over tokens and ranks |

`extensions.py` finds the rewards and selections of installed packages.
"""
