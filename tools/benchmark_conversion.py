"""Measures memory and time of converting a large checkpoint, each direction in a process of its own.

    python tools/benchmark_conversion.py [--family delta_net] [--flavor 1.3B] [--dtype bfloat16] [--folder DIR]

Writes a synthetic Hugging Face checkpoint of the flavor shard by shard, converts it to DCP and back, and prints one JSON object:
the bytes of the weights, and for each direction the seconds and the peak of resident memory in MB, less what the process held after
its imports. Compares the converted weights with the original, bit by bit. Exit status 1 if they differ or a peak is above
`--limit-mb`. DIR needs room for three copies of the checkpoint.
"""

import argparse
import json
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import refine_titan  # noqa: F401  # isort: skip  announces the device before torchtitan is imported
import torch
from safetensors.torch import save_file

from refine_titan.conversion.from_hf import from_hf
from refine_titan.conversion.to_hf import to_hf
from refine_titan.distributed.device import peak_resident_bytes, resident_bytes
from refine_titan.models import FAMILIES
from refine_titan.models.hf_weights import INDEX_FILE, HFWeights
from refine_titan.models.model_config import empty_state_dict
from refine_titan.models.state_dict_adapter import DecoderStateDictAdapter
from refine_titan.models.stored_tensors import same_bits

SHARD_BYTES = 500 * 10**6


def write_checkpoint(folder: Path, family: str, flavor: str, dtype: torch.dtype) -> int:
    """Writes a Hugging Face folder of random weights in shards of about `SHARD_BYTES`; returns the bytes of the weights."""
    args = FAMILIES[family].flavors[flavor]
    weight_map, shard, total = {}, {}, 0
    (folder / "config.json").write_text(json.dumps(args.to_hf_config()))

    def flush() -> None:
        name = f"part-{len(set(weight_map.values()))}.safetensors"
        save_file(shard, folder / name)
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, tensor in DecoderStateDictAdapter(args).to_hf(empty_state_dict(args)).items():
        shard[name] = torch.randn(tensor.shape, dtype=dtype)
        total += shard[name].nbytes
        if sum(t.nbytes for t in shard.values()) > SHARD_BYTES:
            flush()
    if shard:
        flush()
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    return total


def measure(convert: Callable[[Path, Path], object], source: Path, out: Path) -> dict[str, float]:
    """Runs the conversion in a fresh process and returns its seconds and its peak memory, less what it held at the beginning."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_measure_here, args=(sender, convert, source, out))
    child.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise SystemExit(f"{convert.__name__} failed") from None
    finally:
        child.join()


def _measure_here(sender, convert: Callable[[Path, Path], object], source: Path, out: Path) -> None:
    # Not `ru_maxrss`, which would start from what the parent had when it started this process.
    before, start = resident_bytes(), time.perf_counter()
    convert(source, out)
    seconds, peak = time.perf_counter() - start, peak_resident_bytes() - before
    sender.send({"seconds": round(seconds, 1), "baseline_mb": round(before / 1e6), "peak_above_baseline_mb": round(peak / 1e6)})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, default="delta_net")
    parser.add_argument("--flavor", default="1.3B")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--folder", type=Path, help="where to work; default: the system's folder for temporary files")
    parser.add_argument("--limit-mb", type=float, default=2000, help="largest peak above the baseline; default: 2000")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="conversion-", dir=arguments.folder))
    try:
        (folder / "hf").mkdir()
        nbytes = write_checkpoint(folder / "hf", arguments.family, arguments.flavor, getattr(torch, arguments.dtype))
        report = {
            "weights_bytes": nbytes,
            "from_hf": measure(from_hf, folder / "hf", folder / "dcp"),
            "to_hf": measure(to_hf, folder / "dcp", folder / "back"),
        }
        before, after = HFWeights(folder / "hf"), HFWeights(folder / "back")
        is_same = before.tensors.keys() == after.tensors.keys() and all(
            same_bits(before.read(name), after.read(name)) for name in before.tensors
        )
    finally:
        shutil.rmtree(folder)
    peak = max(report[direction]["peak_above_baseline_mb"] for direction in ("from_hf", "to_hf"))
    report |= {"bitwise": is_same, "ok": is_same and peak <= arguments.limit_mb}
    print(json.dumps(report, indent=1))
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
