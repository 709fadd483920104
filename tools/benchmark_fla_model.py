"""Measures a next-token step of flash-linear-attention's own model, with the sizes of a run's model, on a GPU.

    python tools/benchmark_fla_model.py CONFIG.toml [--repeats N] [--section.key value ...]

Builds the model that flash-linear-attention makes of the run's `config.json`, with float32 weights and AdamW as the run has them, and
takes steps on one sequence of `training.seq_len` random tokens under autocast. Prints JSON: `seconds` (median), `tokens_per_second`,
`mfu` and `peak_bytes`, to be read beside the next-token step of `tools/benchmark_step.py`.
"""

import math
import statistics
import sys
import time

import refine_titan  # noqa: F401  # isort: skip  announces the device before torchtitan is imported
import torch
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.tools.utils import get_peak_flops
from trainer_benchmark import describe, run
from transformers import AutoConfig, AutoModelForCausalLM

from refine_titan.errors import UserError
from refine_titan.models import build_decoder
from refine_titan.models.sizes import resolve_args


def benchmark(config, repeats: int) -> dict:
    if not torch.cuda.is_available():
        raise UserError("flash-linear-attention's models need a GPU, and this machine has none")
    import fla.models  # noqa: F401  registers its model types with transformers

    args, seq_len, device = resolve_args(config.model), config.training.seq_len, torch.device("cuda", 0)
    settings = dict(args.to_hf_config())
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings)).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optimizer.lr, weight_decay=config.optimizer.weight_decay, fused=True)
    tokens = torch.randint(args.vocab_size, (1, seq_len), generator=torch.Generator().manual_seed(config.debug.seed)).to(device)

    def step() -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        with torch.autocast("cuda", TORCH_DTYPE_MAP[config.training.mixed_precision_param]):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.training.max_norm)
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        if not math.isfinite(loss.item()):
            raise UserError(f"the loss is {loss.item()}: nothing to time")
        return time.perf_counter() - begin

    for _ in range(2):
        step()
    torch.cuda.reset_peak_memory_stats()
    seconds = statistics.median(step() for _ in range(repeats))
    with torch.device("meta"):
        _, flops = args.get_nparams_and_flops(build_decoder(args), seq_len)
    return {
        "seconds": round(seconds, 4),
        "tokens_per_second": round(seq_len / seconds, 1),
        "mfu": round(seq_len / seconds * flops / get_peak_flops(torch.cuda.get_device_name()), 4),
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "parameters": sum(p.numel() for p in model.parameters()),
        **describe(config),
    }


if __name__ == "__main__":
    sys.exit(run(benchmark, __doc__, repeats=5))
