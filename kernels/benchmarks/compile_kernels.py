"""Compiles our Triton kernels for GPUs that need not be present, and prints registers, spills and shared memory as JSON.

    python kernels/benchmarks/compile_kernels.py [--architectures 90,100] [--key-channels 128] [--value-channels 128]

Inputs are bfloat16. The script compiles every configuration that the autotuner tries, or the only one. A register spill means memory
traffic in the innermost loop; at least one configuration of each kernel should have none.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from refine_kernels.delta_rule import state_scan, step_kernel
from refine_kernels.lact import elementwise_kernels
from refine_kernels.rotary import rotary_kernels
from refine_kernels.short_conv import convolution_kernels

# Arguments that point to elements of another dtype than bfloat16.
FLOAT32 = {
    "cos",
    "sin",
    "g",
    "lr",
    "grad_lr",
    "grad_scale",
    "grad_offset",
    "initial",
    "snapshots",
    "grad_snapshots",
    "grad_initial",
    "grad_taps",
    "state",
    "weights",
    "grad_weights",
    "lengths",
    "grad_lengths",
    "total",
    "read",
    "grad_read",
}
INT64, INT32 = {"cu_seqlens", "chunk_offsets"}, {"snapshot_of_chunk", "tokens"}
SCALARS = {"scale": "fp32", "R": "i32", "D": "i32", "T": "i32", "H": "i32", "N": "i32", "OWN": "i32", "ROWS": "i32"}


def compile_kernel(function: triton.JITFunction, config: triton.Config, constants: dict, architecture: int) -> dict:
    """Compiles one configuration and returns its registers, spilled bytes and bytes of shared memory."""
    constants = constants | config.kwargs

    def type_of(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in SCALARS:
            return SCALARS[name]
        return "*fp32" if name in FLOAT32 else "*i64" if name in INT64 else "*i32" if name in INT32 else "*bf16"

    signature = {name: type_of(name) for name in function.arg_names}
    # As at run time, where torch aligns memory to 16 bytes.
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(function.arg_names) if signature[name].startswith("*")}
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    report = assemble(compiled.asm["ptx"])
    return {**config.kwargs, **options, **report, "shared_bytes": compiled.metadata.shared}


def assemble(ptx: str) -> dict[str, int]:
    """Runs NVIDIA's assembler on PTX and returns the registers and spilled bytes that it reports."""
    architecture = re.search(r"\.target (sm_\w+)", ptx).group(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        ptxas = (triton.knobs.nvidia.ptxas_blackwell if architecture.startswith("sm_10") else triton.knobs.nvidia.ptxas).path
        command = [ptxas, "-v", f"--gpu-name={architecture}", str(path), "-o", str(Path(folder, "kernel.cubin"))]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    found = result.stderr + result.stdout
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", found)]
    return {"registers": int(re.search(r"Used (\d+) registers", found).group(1)), "spilled_bytes": sum(spills)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", default="90,100", help="compute capabilities (90,100)")
    parser.add_argument("--key-channels", type=int, default=128)
    parser.add_argument("--value-channels", type=int, default=128)
    parser.add_argument("--configurations", type=int, help="compile at most so many configurations of each delta-rule kernel")
    arguments = parser.parse_args()
    K, V = arguments.key_channels, arguments.value_channels
    sizes = dict(H=16, HV=16, K=K, V=V, C=64, BK=max(16, triton.next_power_of_2(K)), USE_INITIAL=True)
    gates = {True: {"USE_G": True}, False: {"USE_G": False, "g": None}}
    kernels = {"states": state_scan._scan_kernel, "gradients": state_scan._gradient_kernel}
    architectures = [int(sm) for sm in arguments.architectures.split(",")]
    rows = [
        {"kernel": name, "sm": sm, "gated": gated, **compile_kernel(kernel.fn, config, sizes | gates[gated], sm)}
        for sm in architectures
        for name, kernel in kernels.items()
        for gated in (False, True)
        for config in state_scan.fitting(kernel.configs, sizes)[: arguments.configurations]
    ]
    BK, BV = step_kernel.block_sizes(K, V)
    step = dict(HK=16, H=16, K=K, V=V, BK=BK, BV=BV, ACC=tl.float32)
    config = triton.Config({}, num_warps=step_kernel.NUM_WARPS)
    for decay in ("none", "per head", "per channel"):
        decays = {"HEAD_DECAY": decay == "per head", "CHANNEL_DECAY": decay == "per channel"} | ({"g": None} if decay == "none" else {})
        rows += [
            {"kernel": "step", "sm": sm, "decay": decay, **compile_kernel(step_kernel._step_kernel, config, step | decays, sm)}
            for sm in architectures
        ]
    convolution = dict(
        W=4, SILU=True, PACKED=True, ACC=tl.float32, BR=convolution_kernels.BLOCK_TOKENS, BD=convolution_kernels.BLOCK_CHANNELS
    )
    config = triton.Config({}, num_warps=convolution_kernels.NUM_WARPS)
    rows += [
        {"kernel": name, "sm": sm, **compile_kernel(kernel, config, convolution, sm)}
        for sm in architectures
        for name, kernel in (
            ("convolution", convolution_kernels._forward_kernel),
            ("convolution, gradients", convolution_kernels._backward_kernel),
        )
    ]
    convolution = {name: convolution[name] for name in ("W", "SILU", "ACC")} | dict(BD=convolution_kernels.STEP_CHANNELS)
    rows += [
        {"kernel": "convolution, step", "sm": sm, **compile_kernel(convolution_kernels._step_kernel, config, convolution, sm)}
        for sm in architectures
    ]
    rotation = dict(R=32, ACC=tl.float32, **rotary_kernels.block_sizes(24, 32))
    config = triton.Config({}, num_warps=rotary_kernels.NUM_WARPS)
    rows += [
        {"kernel": "rotation", "sm": sm, **compile_kernel(rotary_kernels._rotation_kernel, config, rotation | {"BACK": False}, sm)}
        for sm in architectures
    ]
    unit, factors = (dict(zip(names, elementwise_kernels.block_sizes(384, 2048))) for names in (("BT", "BD"), ("BN", "BM")))
    unit |= dict(D=384, SILU=True, EPS=1e-5, ACC=tl.float32, SUMMED=elementwise_kernels.SUMMED_TOKENS)
    factors |= dict(M=384, ACC=tl.float32)
    rescale = factors | dict(EPS=1e-5, HAS_CHANGE=True, HAS_TOTAL=False, READ_TWICE=True)
    config = triton.Config({}, num_warps=elementwise_kernels.NUM_WARPS)
    rows += [
        {"kernel": name, "sm": sm, **compile_kernel(kernel, config, {n: c for n, c in sizes.items() if n in kernel.arg_names}, sm)}
        for sm in architectures
        for name, kernel, sizes in (
            ("unit vectors", elementwise_kernels._unit_kernel, unit),
            ("unit vectors, gradients", elementwise_kernels._unit_gradient_kernel, unit),
            ("writing factors", elementwise_kernels._factors_kernel, factors),
            ("writing factors, gradients", elementwise_kernels._factors_gradient_kernel, factors),
            ("hidden activations", elementwise_kernels._hidden_kernel, factors),
            ("hidden activations, gradients", elementwise_kernels._hidden_gradient_kernel, factors),
            ("rescaled rows", elementwise_kernels._rescale_kernel, rescale),
            ("rescaled rows, gradients", elementwise_kernels._rescale_gradient_kernel, rescale),
        )
    ]
    print(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
