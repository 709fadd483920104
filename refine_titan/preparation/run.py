"""Prepares data, from inputs to shards. The steps, top to bottom: inventory, units, layout, shards, manifest.

Everything is written into a hidden folder beside the output, `.NAME.partial`, which is renamed to the output at the end, so that the
output is either complete or not there. A killed run leaves the hidden folder, and the same call continues with the units and shards
in it.
"""

import importlib.metadata
import json
import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torchtitan.components.tokenizer import BaseTokenizer

from refine_titan.data.chat import ChatTemplate
from refine_titan.data.shards import FORMAT, MANIFEST, VERSION, manifest_sha256, read_manifest
from refine_titan.data.tokenizer import load_tokenizer, tokenizer_sha256
from refine_titan.errors import UserError
from refine_titan.files.renaming import rename
from refine_titan.files.whole_files import new_file
from refine_titan.hub.names import name_of_folder
from refine_titan.preparation.continuation import WORK_FOLDER, check_continues, differences, keep, work_folder
from refine_titan.preparation.inputs import InputFile, Inventory, find_inputs, is_unchanged, take_inventory
from refine_titan.preparation.layout import Layout, plan_layout
from refine_titan.preparation.pool import Pool
from refine_titan.preparation.settings import UNIT_BYTES, Settings
from refine_titan.preparation.units import Unit, UnitReport, finished_unit, plan_units, process_unit
from refine_titan.preparation.writing import Shard, finished_shard, write_shard
from refine_titan.progress import Progress

PACKAGES = ("tokenizers", "pyarrow")  # another version of these may change the output

# Titles of progress bars below each other.
READING, TOKENIZING, WRITING = "reading inputs", "tokenizing    ", "writing shards"


@dataclass(frozen=True)
class Tokenization:
    """Counts of the work that one call did.

    Attributes:
        units: number of all units.
        resumed_units: number of units that an earlier call had finished.
        seconds, tokens: time and tokens of the other units.
    """

    units: int
    resumed_units: int
    seconds: float
    tokens: int


@dataclass(frozen=True)
class Outcome:
    """The result of a call: the manifest of the prepared data, and what was tokenized, or None if the data were already complete."""

    manifest: dict[str, Any]
    tokenization: Tokenization | None = None


def prepare(
    inputs: list[Path],
    tokenizer_folder: str,
    output: Path,
    settings: Settings,
    *,
    workers: int = 1,
    unit_bytes: int = UNIT_BYTES,
) -> Outcome:
    """Prepares data. The bytes of the output depend only on inputs, tokenizer, settings and package versions.

    Args:
        inputs: files and folders, in the order in which their documents are wanted.
        tokenizer_folder: folder of a Hugging Face tokenizer; empty for bytes.
        output: a path that does not exist, an empty folder, or the complete result of the same call.
        workers: number of processes.
        unit_bytes: about how many bytes of input a process takes at a time.

    Raises:
        UserError: inputs, tokenizer or output cannot be used; there is unfinished work of a call with other inputs or settings; or
            nothing is left after filtering.
        OSError: the output cannot be written; finished parts stay.
    """
    output = Path(os.path.abspath(output))
    files = find_inputs(inputs, settings)
    for path in inputs:
        if output.is_relative_to(os.path.abspath(path)):
            raise UserError(f"--output {output} lies inside --input {path}, which is only read; give a path elsewhere")
    tokenizer = load_tokenizer(tokenizer_folder, "--tokenizer")
    plan = _plan(settings, tokenizer, tokenizer_folder)
    if (output / MANIFEST).is_file():
        return _check_complete(output, plan, files, settings, workers, unit_bytes)
    if output.is_symlink() or (output.exists() and not (output.is_dir() and not any(output.iterdir()))):
        raise UserError(f"--output {output} is neither an empty folder nor prepared data; give a path where nothing is")

    partial = partial_folder(output)
    with work_folder(partial) as work, Pool(workers) as pool:
        call = plan | {"unit_bytes": unit_bytes, "format": VERSION}
        check_continues(work, call)
        inventories = _take_inventories(pool, files, settings, unit_bytes)
        call["inputs"] = _identity(inventories)
        check_continues(work, call)
        keep(work, call)

        units = plan_units(files, inventories, unit_bytes)
        report, tokenization = _run_units(pool, units, settings, (tokenizer_folder, plan["tokenizer"]["sha256"]), work)
        changed = [file.path for file, inventory in zip(files, inventories) if not is_unchanged(file, inventory)]
        if changed:
            shutil.rmtree(partial)
            raise UserError(f"{changed[0]} has changed while it was read; nothing is kept, start again")
        if not report.kept_rows:
            shutil.rmtree(partial)
            raise UserError(_nothing_kept(report, settings))
        layout = plan_layout(work, len(units), settings)
        shards = _write_shards(pool, layout, work, partial)

        manifest = _manifest(plan, call["inputs"], report, layout, shards)
        with new_file(partial / MANIFEST) as file:
            file.write((json.dumps(manifest, indent=1) + "\n").encode("utf-8"))
        _sync_folder(partial)
        rename(partial, output)
        _sync_folder(output.parent)
    shutil.rmtree(output / WORK_FOLDER)
    return Outcome(manifest, tokenization)


def partial_folder(output: Path) -> Path:
    """The hidden folder in which `output` is made."""
    return output.with_name(f".{output.name}.partial")


def _plan(settings: Settings, tokenizer: BaseTokenizer, folder: str) -> dict[str, Any]:
    """Everything besides the inputs on which the output depends."""
    name = str(name_of_folder(folder) or Path(os.path.abspath(folder)).name) if folder else "bytes"
    chat = ChatTemplate.of_tokenizer(tokenizer) if settings.kind == "questions" else None
    return {
        "settings": settings.to_json(),
        "tokenizer": {
            "name": name,
            "sha256": tokenizer_sha256(tokenizer),
            "vocab_size": tokenizer.get_vocab_size(),
            "package": importlib.metadata.version("tokenizers"),
        },
        **({"chat_template": chat.sha256} if chat else {}),
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
    }


def _identity(inventories: list[Inventory]) -> list[dict[str, Any]]:
    return [{"name": i.name, "bytes": i.nbytes, "sha256": i.sha256, "rows": i.rows} for i in inventories]


def _take_inventories(pool: Pool, files: list[InputFile], settings: Settings, unit_bytes: int) -> list[Inventory]:
    found: dict[int, Inventory] = {}
    with Progress(READING, sum(file.path.stat().st_size for file in files), "share") as progress:
        for number, inventory in pool.run(take_inventory, [(file, settings, unit_bytes) for file in files]):
            found[number] = inventory
            progress.advance(inventory.nbytes)
    return [found[i] for i in range(len(files))]


def _run_units(
    pool: Pool, units: list[Unit], settings: Settings, tokenizer: tuple[str, str], work: Path
) -> tuple[UnitReport, Tokenization]:
    """Processes the units that are not finished; returns the sum of all reports, and what this call tokenized."""
    reports = {unit.number: report for unit in units if (report := finished_unit(work, unit.number)) is not None}
    resumed, left = len(reports), [unit for unit in units if unit.number not in reports]
    done = sum(unit.nbytes for unit in units if unit.number in reports)
    begin, tokens = time.monotonic(), 0
    with Progress(TOKENIZING, done + sum(unit.nbytes for unit in left), "share", done=done) as progress:
        for i, report in pool.run(process_unit, [(unit, work, settings, tokenizer) for unit in left]):
            reports[left[i].number] = report
            tokens += report.tokens_read
            progress.advance(left[i].nbytes, tokens=report.tokens_read)
    total = UnitReport()
    for report in reports.values():
        total.add(report)
    return total, Tokenization(len(units), resumed, time.monotonic() - begin, tokens)


def _write_shards(pool: Pool, layout: Layout, work: Path, partial: Path) -> list[Shard]:
    shards = {plan.number: shard for plan in layout.shards if (shard := finished_shard(plan.number, work)) is not None}
    left = [plan for plan in layout.shards if plan.number not in shards]
    done = sum(shard.tokens for shard in shards.values())
    with Progress(WRITING, done + sum(int(plan.tokens.sum()) for plan in left), "share", done=done) as progress:
        for _, shard in pool.run(write_shard, [(plan, work, work, partial) for plan in left]):
            shards[int(shard.name.removeprefix("shard-").removesuffix(".parquet"))] = shard
            progress.advance(shard.tokens, tokens=shard.tokens)
    return [shards[i] for i in range(len(layout.shards))]


def _manifest(
    plan: dict[str, Any], inputs: list[dict[str, Any]], report: UnitReport, layout: Layout, shards: list[Shard]
) -> dict[str, Any]:
    skipped = dict(report.skipped) | ({"duplicate": layout.duplicate_rows} if layout.duplicate_rows else {})
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "kind": plan["settings"]["kind"],
        **plan,
        "inputs": inputs,
        "counts": {
            "rows": report.rows,
            "kept_rows": report.kept_rows - layout.duplicate_rows,
            "skipped": dict(sorted(skipped.items())),
            "tokens_read": report.tokens_read,
            "records": sum(shard.rows for shard in shards),
            "tokens": sum(shard.tokens for shard in shards),
        },
        "lengths": {"shortest": min(shard.shortest for shard in shards), "longest": max(shard.longest for shard in shards)},
        "shards": [{name: asdict(shard)[name] for name in ("name", "rows", "tokens", "bytes", "sha256")} for shard in shards],
    }
    return manifest | {"manifest_sha256": manifest_sha256(manifest)}


def _check_complete(
    output: Path,
    plan: dict[str, Any],
    files: list[InputFile],
    settings: Settings,
    workers: int,
    unit_bytes: int,
) -> Outcome:
    """The outcome if the output is there already. Raises UserError if it is not the result of the same call."""
    manifest = read_manifest(output)
    found = differences(manifest, plan)
    if not found:
        with Pool(workers) as pool:
            inventories = _take_inventories(pool, files, settings, unit_bytes)
        found = differences(manifest, {"inputs": _identity(inventories)})
    if found:
        raise UserError(f"--output {output} holds prepared data of another call: {'; '.join(found)}. Give another path")
    shutil.rmtree(output / WORK_FOLDER, ignore_errors=True)  # left by a call that was killed after the output was complete
    return Outcome(manifest)


def _nothing_kept(report: UnitReport, settings: Settings) -> str:
    counts = ", ".join(f"{count:,} {reason}" for reason, count in sorted(report.skipped.items())) or "the inputs are empty"
    what = "document" if settings.kind == "documents" else "question"
    return f"no {what} is left of {report.rows:,} rows: {counts}. Change the settings, or give other inputs"


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
