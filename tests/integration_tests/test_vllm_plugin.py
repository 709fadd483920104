"""A checkpoint as the converter exports it, loaded by plain vLLM with the project installed: its plugin is all it needs."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("vllm", reason="needs the extra cpu or gpu")

from refine_titan.models.loading import load_hf_model
from refine_titan.models.shared_prefix import SharedPrefixLayout
from tests.checkpoints import export, random_weights
from tests.integration_tests.vllm_engines import small_args

# vLLM's own defaults: engine and workers in processes of their own, which find the plugin by themselves.
PROGRAM = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    folder, prompts, out = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
    llm = LLM(folder, skip_tokenizer_init=True, enforce_eager=True, dtype="float32", max_model_len=600, max_num_seqs=2,
              kv_cache_memory_bytes=2**28)
    parameters = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], parameters, use_tqdm=False)
    json.dump([list(output.outputs[0].token_ids) for output in outputs], open(out, "w"))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "family, options",
    [
        ("delta_net", {}),
        ("gated_delta_net", {}),
        ("lact", {}),
        ("gated_delta_net", {"attn": {"layers": [1], "num_heads": 4, "num_kv_heads": 2}}),
    ],
)
def test_exported_checkpoint_is_served_by_vllm(tmp_path, family, options):
    args = replace(small_args(family), **options)
    folder = export(tmp_path, args, random_weights(args))
    program = tmp_path / "serve.py"
    program.write_text(PROGRAM)
    prompts = [torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (1, 40, 520)]
    command = [sys.executable, str(program), str(folder), json.dumps(prompts), "found.json"]
    served = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert served.returncode == 0, served.stderr[-3000:]
    model, _ = load_hf_model(folder)
    for prompt, found in zip(prompts, json.loads((tmp_path / "found.json").read_text()), strict=True):
        stream = torch.tensor(prompt + found)
        rows = torch.arange(len(prompt) - 1, len(stream) - 1)
        with torch.no_grad():
            expected = model(stream, SharedPrefixLayout((0, len(stream))), logit_rows=rows).logits.argmax(-1)
        assert found == expected.tolist()
