"""Measures a checkpoint on held-out documents, from configuration to a record of its measures."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from refine_titan.config.sections import JobConfig
from refine_titan.errors import UserError
from refine_titan.evaluation.checkpoints import with_tokenizer
from refine_titan.evaluation.held_out import held_out_source
from refine_titan.evaluation.identity import weights_sha256
from refine_titan.evaluation.text.reading import SequenceMeter
from refine_titan.evaluation.text.sequences import DrawnDocuments, draw_sequences
from refine_titan.evaluation.text.sums import SequenceSums, measures_of, terms_of
from refine_titan.files.whole_files import write_atomically
from refine_titan.hub.names import name_of_folder
from refine_titan.inference import Inference
from refine_titan.monitoring.run_folder import versions
from refine_titan.objective.positions import MARGIN
from refine_titan.progress import Progress
from refine_titan.rollout.engine import EngineError
from refine_titan.seeding import derive_seed

MEASURES_FILE = "measures.json"


@dataclass(frozen=True)
class TextOptions:
    """What is measured beside the settings of the run.

    Attributes:
        sequences: number of sequences, of `training.seq_len` tokens each.
        ngram, beyond: which tokens are recall tokens, as in `recall.py`.
    """

    sequences: int = 64
    ngram: int = 3
    beyond: int = 256

    def __post_init__(self):
        for name, least in (("sequences", 1), ("ngram", 2), ("beyond", 0)):
            if getattr(self, name) < least:
                raise UserError(f"--{name} is {getattr(self, name)}; allowed: at least {least}")


def measure_text(config: JobConfig, checkpoint: Path, options: TextOptions) -> dict[str, Any]:
    """Measures a checkpoint; returns the content of `measures.json`, but for the command.

    Raises:
        UserError: if settings, checkpoint or documents are wrong.
        EngineError: if the model's numbers are not finite.
    """
    if config.refine.phase == "ttt":
        raise UserError(
            "refine.phase is 'ttt'; held-out text is measured with the weights of the checkpoint; allowed: 'midtrain', 'posttrain'"
        )
    if config.refine.rollout_length > MARGIN:
        raise UserError(f"refine.rollout_length is {config.refine.rollout_length}; allowed: 1 to {MARGIN}")
    config = with_tokenizer(config, checkpoint)
    seed, length = config.evaluation.seed, config.training.seq_len
    with Inference.from_config(config, checkpoint) as inference:
        own = config.evaluation.perplexity_source
        min_tokens = config.data.min_document_tokens or length
        source, note = held_out_source(config, inference.tokenizer, length, derive_seed(seed, "held-out documents"), min_tokens)
        stream = DrawnDocuments(
            source,
            inference.tokenizer,
            seq_len=length,
            min_tokens=min_tokens,
            split_long=config.data.long_documents == "split",
            seed=seed,
        )
        sequences = draw_sequences(stream, options.sequences, f"{own or config.data.source!r}")
        meter = SequenceMeter(inference, seed=seed, ngram=options.ngram, beyond=options.beyond)
        sums = _measure_all(meter, sequences, config.training.local_batch_size)
        measures = measures_of(sums)
        if not math.isfinite(measures["loss"]):
            raise EngineError(f"the loss is {measures['loss']}: the model's outputs are not finite")
        found = versions()
        return {
            "checkpoint": str(name_of_folder(checkpoint) or checkpoint),
            "weights_sha256": weights_sha256(inference.model),
            "source": own or config.data.source,
            "held_out_percent": source.holdout_percent,
            "sequences": len(sequences),
            "length": length,
            "seed": seed,
            "ngram": options.ngram,
            "beyond": options.beyond,
            "refine": asdict(config.refine),
            "documents": sum(len(sequence.documents) for sequence in sequences),
            "skipped": stream.skipped,
            "notes": [note] if note else [],
            "versions": found["packages"] | {"python": found["python"], "git_commit": found["git_commit"]},
            "measures": measures,
            "terms": terms_of(sums),
            "absent": absent(measures, meter, options),
        }


def _measure_all(meter: SequenceMeter, sequences: list, batch_size: int) -> list[SequenceSums]:
    """Measures the sequences in batches, and says from time to time how far it is."""
    sums = []
    with Progress("measuring", len(sequences), "samples") as progress:
        for first in range(0, len(sequences), batch_size):
            batch = sequences[first : first + batch_size]
            sums += meter.measure(batch, first)
            progress.advance(len(batch), tokens=sum(len(tokens) for sequence in batch for tokens, _ in sequence.documents))
    return sums


def absent(measures: dict[str, float], meter: SequenceMeter, options: TextOptions) -> dict[str, str]:
    """Why measures are missing, by their names."""
    no_tokens = f"no recall token: no {options.ngram} tokens in a row came again after more than {options.beyond} tokens"
    reasons = dict.fromkeys(("recall_loss", "recall_accuracy", "recall_probability"), no_tokens) | dict.fromkeys(
        ("fresh_loss", "fresh_accuracy", "fresh_probability"), "all are recall"
    )
    for k in meter.lengths:
        reasons |= dict.fromkeys((f"match_recall_{k}", f"exact_recall_{k}"), f"no row of {k} recall tokens")
    return {name: reason for name, reason in reasons.items() if name not in measures}


def write_measures(folder: Path, record: dict[str, Any]) -> Path:
    """Writes `measures.json` into a folder; returns its path."""
    path = folder / MEASURES_FILE
    write_atomically(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return path


def measures_table(record: dict[str, Any]) -> str:
    """The measures for a terminal: each with the number of its terms; below them what is missing and why."""
    measures, terms = record["measures"], record["terms"]
    width = max(map(len, (*measures, *record["absent"])))
    lines = [f"{'measure':{width}}  {'mean':>9}  {'of':>9}"]
    lines += [f"{name:{width}}  {value:9.4f}  {terms[name]:9,}" for name, value in measures.items()]
    lines += [f"{name:{width}}  absent: {reason}" for name, reason in record["absent"].items()]
    return "\n".join([*lines, *(f"note: {note}" for note in record["notes"])])
