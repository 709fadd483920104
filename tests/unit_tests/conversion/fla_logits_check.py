"""Compares our logits with those of flash-linear-attention's own model classes, which load a folder that the converter exported; for
hybrids with layers of attention also the gradients.

A script that tests run, on a CPU. With --all it also tries every option of the families.
"""

import tests.fla_interpreter  # noqa: F401  isort: skip  before fla is imported

import sys
import tempfile
from pathlib import Path

import fla.layers.attn
import fla.models
import torch
import torch.nn.functional as F

from refine_titan.models import FAMILIES, build_decoder
from refine_titan.models.decoder import FastWeightDecoder
from refine_titan.models.shared_prefix import SharedPrefixLayout
from refine_titan.models.state_dict_adapter import DecoderStateDictAdapter
from tests.checkpoints import export
from tests.helpers import relative_rms
from tests.unit_tests.models.test_shared_prefix import VARIANTS

# Head dims that fla's kernels take. The options of the exactness tests are applied on top of these sizes.
COMMON = dict(vocab_size=13, dim=64, n_layers=2, intermediate_size=48)
SIZES = {
    "delta_net": dict(n_heads=2),
    "gated_delta_net": dict(n_heads=2, head_dim=16, expand_v=2.0),
    "kda": dict(n_heads=2, head_dim=16),
    "gated_delta_product": dict(n_heads=2, head_dim=16, num_householder=2, use_forget_gate=True),
}


# Which layers of a model have attention: flash-linear-attention 0.6.0 takes flash-attn's kernel for it, which needs a GPU.
HYBRID = {"attn": {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "qkv_bias": True}}


def flash_attn_of_torch(q, k, v, causal, window_size):
    assert causal and window_size == (-1, -1)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


fla.layers.attn.flash_attn_func = flash_attn_of_torch


def our_model(family: str, options: dict) -> FastWeightDecoder:
    torch.manual_seed(0)
    model = build_decoder(FAMILIES[family].args_class(**(COMMON | SIZES[family] | options)))
    model.init_weights()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not name.endswith(("A_log", "dt_bias")):
                p.mul_(3)
    return model


def their_model(model: FastWeightDecoder, family: str, folder: Path):
    args = model.model_args
    weights = DecoderStateDictAdapter(args).to_hf(model.state_dict())
    exported = export(folder, args, weights)
    settings = dict(fuse_cross_entropy=False, fuse_swiglu=False)
    if hasattr(args, "safe_gate"):
        settings["safe_gate"] = False  # chooses another kernel for the same numbers, which the interpreter cannot run
    return getattr(fla.models, args.hf_format.architecture).from_pretrained(exported, **settings).eval()


def compare_gradients(model: FastWeightDecoder, theirs, tokens: torch.Tensor) -> float:
    """Largest difference of a parameter's gradients, on the scale of the larger of it and a thousandth of them all."""
    labels = torch.cat([tokens[1:], torch.tensor([-100])])
    model(tokens, SharedPrefixLayout((0, len(tokens))), labels=labels).losses.nll_sum.backward()
    F.cross_entropy(theirs.train()(tokens[None]).logits[0], labels, reduction="sum").backward()
    ours = DecoderStateDictAdapter(model.model_args).to_hf({name: p.grad for name, p in model.named_parameters()})
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    scale = sum(float(g.square().sum()) for g in gradients.values()) ** 0.5
    assert ours.keys() == gradients.keys()
    return max(float((ours[name] - g).norm()) / max(float(g.norm()), 1e-3 * scale) for name, g in gradients.items())


for family in SIZES:
    for options in [{}, HYBRID, *(VARIANTS[family] if "--all" in sys.argv else [])]:
        model = our_model(family, options)
        # fla runs up to 64 tokens without gradient through its recurrent kernels, which take float32 for every family.
        tokens = torch.randint(0, 13, (60,), generator=torch.Generator().manual_seed(1))
        with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
            ours = model(tokens, SharedPrefixLayout((0, 60)), logit_rows=torch.arange(60)).logits
            theirs_model = their_model(model, family, Path(folder))
            theirs = theirs_model(tokens[None]).logits[0]
        error = relative_rms(ours, theirs)
        print(family, options, f"{error:.1e}", flush=True)
        if error > 1e-5:
            sys.exit(f"{family} {options}: logits differ by {error}")
        if options is HYBRID and family in ("delta_net", "gated_delta_net"):
            error = compare_gradients(model, theirs_model, tokens)
            print(family, "gradients", f"{error:.1e}", flush=True)
            if error > 1e-4:
                sys.exit(f"{family} {options}: gradients differ by {error}")
print("all equal")
