"""Compares our logits with those of transformers' own classes, loaded from folders that the converter exported, on a CPU. A script."""

import tests.without_fla  # noqa: F401  isort: skip  before transformers is imported

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
import transformers

from refine_titan.conversion.from_hf import from_hf
from refine_titan.conversion.to_hf import to_hf
from refine_titan.models import FAMILIES, build_decoder
from refine_titan.models.loading import load_hf_model
from refine_titan.models.shared_prefix import SharedPrefixLayout
from refine_titan.models.state_dict_adapter import DecoderStateDictAdapter
from tests.checkpoints import assert_same_bits, read_hf_folder, write_hf_folder
from tests.helpers import relative_rms

TEXT = dict(
    vocab_size=53,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    rope_parameters={"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]},
)
VISION = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, num_position_embeddings=16, out_hidden_size=32, patch_size=4)


def of_our_weights(folder: Path, family: str, **options) -> Path:
    """A Hugging Face folder of random weights under our names."""
    args = replace(FAMILIES[family].flavors["debug"], **options)
    torch.manual_seed(0)
    model = build_decoder(args)
    model.init_weights()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(p + 0.05 * torch.randn(p.shape) if name.endswith("norm.weight") else 2 * p)
    return write_hf_folder(folder, args, DecoderStateDictAdapter(args).to_hf(model.state_dict()))


def of_transformers(folder: Path) -> Path:
    """A Hugging Face folder of a model with a vision tower, as transformers writes it."""
    torch.manual_seed(0)
    config = transformers.Qwen3_5Config(text_config=TEXT | {"tie_word_embeddings": True}, vision_config=VISION, tie_word_embeddings=True)
    transformers.Qwen3_5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def check(name: str, hf: Path, library_class) -> None:
    from_hf(hf, hf.with_name("dcp"))
    to_hf(hf.with_name("dcp"), hf.with_name("back"))
    assert_same_bits(read_hf_folder(hf.with_name("back")), read_hf_folder(hf))
    ours, _ = load_hf_model(hf.with_name("back"))
    theirs, report = library_class.from_pretrained(hf.with_name("back"), output_loading_info=True, attn_implementation="eager")
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"], report
    tokens = torch.randint(0, ours.model_args.vocab_size, (70,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = ours(tokens, SharedPrefixLayout((0, 70)), logit_rows=torch.arange(70)).logits
        expected = theirs.eval()(tokens[None]).logits[0]
    error = relative_rms(found, expected)
    print(name, f"{error:.1e}", flush=True)
    if not error < 1e-5:
        sys.exit(f"{name}: logits differ by {error}")


def main() -> None:
    cases = {
        "qwen3_5": (lambda folder: of_our_weights(folder, "qwen3_5"), transformers.Qwen3_5ForCausalLM),
        "qwen3_5, untied": (lambda folder: of_our_weights(folder, "qwen3_5", tie_word_embeddings=False), transformers.Qwen3_5ForCausalLM),
        "qwen3_5 with a vision tower": (of_transformers, transformers.Qwen3_5ForConditionalGeneration),
        "olmo_hybrid": (lambda folder: of_our_weights(folder, "olmo_hybrid"), transformers.OlmoHybridForCausalLM),
        "olmo_hybrid, rotated": (
            lambda folder: of_our_weights(folder, "olmo_hybrid", rope_theta=1e4, n_v_heads=8),
            transformers.OlmoHybridForCausalLM,
        ),
    }
    for name, (make, library_class) in cases.items():
        with tempfile.TemporaryDirectory() as folder:
            check(name, make(Path(folder, "hf")), library_class)
    print("all equal")


main()
