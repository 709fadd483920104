"""Loads exports as the documents say, by AutoModelForCausalLM and AutoTokenizer, with what is to be imported before. A script.

auto_model_check.py fla | transformers
"""

import importlib
import sys
import tempfile
from pathlib import Path


def main(library: str) -> None:
    importlib.import_module({"fla": "fla", "transformers": "tests.without_fla"}[library])
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from refine_titan.conversion.to_hf import BYTES
    from refine_titan.models import FAMILIES
    from tests.checkpoints import export, random_weights

    for name, family in FAMILIES.items():
        args = family.flavors["debug"]
        if args.hf_format.library != {"fla": "flash-linear-attention"}.get(library, library):
            continue
        with tempfile.TemporaryDirectory() as folder:
            weights = random_weights(args)
            exported = export(Path(folder), args, weights, tokenizer=BYTES)
            model, report = AutoModelForCausalLM.from_pretrained(exported, output_loading_info=True)
            assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"], report
            assert type(model).__name__ == args.hf_format.architecture, type(model)
            # All numbers, whatever tensor they are in: OLMo-Hybrid's class joins and renames some of those in its files.
            found, expected = (torch.cat([p.detach().flatten() for p in part]).sort()[0] for part in (model.parameters(), weights.values()))
            assert found.equal(expected), name
            assert AutoTokenizer.from_pretrained(exported).encode("é") == [0xC3, 0xA9]
        print(name, flush=True)
    print("all equal")


main(sys.argv[1])
