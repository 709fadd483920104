"""Compares the forward and backward of a Hugging Face checkpoint, computed in one shared-prefix pass, with golden outputs.

    python tools/check_parity.py HF_DIR EXPECTED.safetensors [--dtype bfloat16] [--tolerance X]

Loads the checkpoint through its family's adapter, runs trunk and rollouts of EXPECTED in one forward and one backward on the GPU, or on
the CPU without one, and prints one JSON object: the relative RMS error of every tensor, that of all gradients together
(`all_gradients`), `worst`, and `ok`. The exit status is 0 only if all errors are within the tolerance: 1e-5 for outputs and 1e-4 for
gradients, unless --tolerance gives one for both.

It computes in float32 (LaCT's Newton-Schulz iterations too), or with `--dtype bfloat16` under autocast, as training does, with
Newton-Schulz in float32 still. On a GPU, matrix products inside Triton kernels take float32 numbers as TF32, and the delta rule without
decay runs in bfloat16: the default tolerance is for a CPU.

The error of a gradient is divided by its norm or by 1e-3 of the norm of all gradients, whichever is larger, so that a gradient that
cancels to almost nothing is judged on the scale of all gradients.

Golden tensors in float32 have rounding errors, too. flash-linear-attention's kernels compute the gradient of a decay as a difference of
sums of order one. Where decays are strong (`A_log`, `dt_bias` of GatedDeltaNet), this gradient is uncertain by about 1e-7 per token,
which may exceed the tolerance. For a small model whose heads decay by e^-7 and e^-9 per token, the library's own gradient of `A_log`
changed by 2e-4 to 5e-4 when the embeddings changed by 1e-7; another way to compute it may differ as much.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import refine_titan  # noqa: F401  # isort: skip  announces the device before torchtitan is imported
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torchtitan.tools.utils import device_type

from refine_titan.errors import UserError
from refine_titan.models.loading import load_hf_model
from refine_titan.models.shared_prefix import SharedPrefixLayout
from refine_titan.objective.losses import chosen_logprobs, policy_loss
from refine_titan.objective.rewards import RewardInputs, cosine

NTP_COEF, RL_COEF = 1.0, 0.2
CLIP = dict(clip_low=0.2, clip_high=0.2, clip_dual=3.0)
OUTPUT_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4
INPUTS = ("input_ids", "positions", "rollout_ids", "ground_truth_ids", "old_logprobs", "advantages")


def compute(model, adapter, expected: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Computes the tensors of EXPECTED with one forward and one backward of our model."""
    tokens_T, rollouts_nk = expected["input_ids"][0], expected["rollout_ids"]
    T, (n, k) = tokens_T.shape[0], rollouts_nk.shape
    device = tokens_T.device
    starts = expected["positions"].tolist()
    layout = SharedPrefixLayout((0, T), tuple(starts), k)
    labels_T = torch.cat([tokens_T[1:], tokens_T.new_tensor([-100])])
    logit_rows = torch.cat([torch.arange(T, device=device), layout.predicting_rows().flatten().to(device)])
    stream = torch.cat([tokens_T, rollouts_nk.flatten()])
    out = model(stream, layout, labels=labels_T, entropy=True, logit_rows=logit_rows)

    hidden_TD, rollout_hidden_nkD = out.hidden_TD[:T], out.hidden_TD[T:].view(n, k, -1)
    logprobs_nk = chosen_logprobs(out.logits[T:].view(n, k, -1), rollouts_nk)
    ntp_loss = out.losses.nll_sum / (T - 1)
    pg_loss = policy_loss(logprobs_nk, expected["old_logprobs"], expected["advantages"][:, None], **CLIP).loss / (n * k)
    loss = NTP_COEF * ntp_loss + RL_COEF * pg_loss
    loss.backward()
    truth_rows = (torch.tensor(starts)[:, None] + torch.arange(k)).to(device)
    reward_inputs = RewardInputs(rollouts_nk, tokens_T[truth_rows], rollout_hidden_nkD, hidden_TD[truth_rows], logprobs_nk, decode=str)
    gradients = adapter.to_hf({name: p.grad for name, p in model.named_parameters()})
    return {
        "logits": out.logits[None, :T],
        "hidden_final_norm": hidden_TD[None],
        "ntp_loss": ntp_loss,
        "entropy": out.losses.entropy_T[None],
        "rollout_logprobs": logprobs_nk,
        "rollout_hidden": rollout_hidden_nkD,
        "cosine_reward": cosine(reward_inputs),
        "pg_loss": pg_loss,
        "loss": loss,
        **{f"grad.{name}": gradient for name, gradient in gradients.items()},
    }


def errors(computed: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """The relative RMS error of each computed tensor, and of all gradients together (`all_gradients`).

    Raises:
        UserError: EXPECTED has a tensor that was not computed, lacks one that was, or has another shape.
    """
    wanted = {name for name in expected if name not in INPUTS}
    if wanted != computed.keys():
        lacking, unknown = sorted(computed.keys() - wanted), sorted(wanted - computed.keys())
        raise UserError(f"EXPECTED lacks {lacking or 'nothing'} and has unknown tensors: {unknown or 'none'}")
    gradients = [tensor for name, tensor in expected.items() if name.startswith("grad.")]
    scale = math.hypot(*(float(g.double().norm()) for g in gradients))
    result, of_gradients = {}, []
    for name, tensor in computed.items():
        reference = expected[name].double()
        if tensor.shape != reference.shape:
            raise UserError(f"{name} has shape {list(tensor.shape)}, EXPECTED has {list(reference.shape)}")
        norm = float(reference.norm())
        difference = float((tensor.detach().double() - reference).norm())
        if name.startswith("grad."):
            norm = max(norm, 1e-3 * scale)
            of_gradients.append(difference)
        result[name] = difference / norm if norm else (0.0 if difference == 0 else math.inf)
    return result | {"all_gradients": math.hypot(*of_gradients) / scale if scale else 0.0}


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hf_dir", type=Path, help="folder with config.json and safetensors weights")
    parser.add_argument("expected", type=Path, help="safetensors file of inputs and golden outputs")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="precision of the forward (float32)")
    parser.add_argument("--tolerance", type=float, help="largest error allowed for every tensor")
    arguments = parser.parse_args(words)
    try:
        if not arguments.expected.is_file():
            raise UserError(f"{arguments.expected} does not exist")
        try:
            expected = load_file(arguments.expected)
        except SafetensorError as error:
            raise UserError(f"{arguments.expected} cannot be read as safetensors: {error}") from error
        missing = [name for name in INPUTS if name not in expected]
        if missing:
            raise UserError(f"{arguments.expected} lacks {', '.join(missing)}")
        model, adapter = load_hf_model(arguments.hf_dir)
        model.model_args.compute_in_float32()
        model, expected = model.to(device_type), {name: tensor.to(device_type) for name, tensor in expected.items()}
        with torch.autocast(device_type, torch.bfloat16, enabled=arguments.dtype == "bfloat16"):
            found = errors(compute(model, adapter, expected), expected)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    ok = True
    for name, error in found.items():
        default = GRADIENT_TOLERANCE if "grad" in name else OUTPUT_TOLERANCE
        ok = ok and error <= (default if arguments.tolerance is None else arguments.tolerance)
    print(json.dumps({**found, "worst": max(found.values()), "ok": ok}, indent=1))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
