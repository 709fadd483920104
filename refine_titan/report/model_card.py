"""The card of a model that is pushed to the Hugging Face Hub: what it started from, how and on what it was trained, what it scores."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from refine_titan.config.reading import DATASET_PREFIX
from refine_titan.errors import UserError
from refine_titan.hub.names import HubName, parse_name
from refine_titan.hub.upload import CARD_MARK
from refine_titan.models import FAMILIES
from refine_titan.monitoring.run_folder import read_settings
from refine_titan.report.escaping import as_text
from refine_titan.report.paper_layout import length_label, percent_with_interval
from refine_titan.report.records import Record
from refine_titan.report.result_tables import perplexity_with_interval
from refine_titan.report.results import read_results
from refine_titan.report.tables import markdown_table

# What of a run's settings says how a model was trained. Paths are left out: they say where files lay on a machine.
SETTINGS = {
    "refine": "phase objective reward selection num_chunks rollout_length rollouts_per_position num_mini_batches ntp_coef rl_coef".split(),
    "training": "seq_len global_batch_size steps dtype mixed_precision_param max_norm".split(),
    "optimizer": "name lr beta1 beta2 weight_decay".split(),
    "lr_scheduler": "warmup_steps decay_ratio min_lr_factor".split(),
    "data": "split subset min_document_tokens long_documents".split(),
    "rollout": ["engine"],
    "debug": ["seed"],
}


@dataclass
class TrainedModel:
    """What a card tells of.

    Attributes:
        repository: `owner/name`.
        family: `model.name`.
        settings: the run's settings by section; empty if the checkpoint lies in no run's folder.
        checkpoint: name of the checkpoint's folder, such as `step-180`.
        evaluations: results of evaluations of its weights.
    """

    repository: str
    family: str
    settings: dict[str, Any] = field(default_factory=dict)
    checkpoint: str = ""
    evaluations: list[Record] = field(default_factory=list)


def trained_model(
    repository: str, family: str, dcp_folder: Path, evaluations: Sequence[Path], weights_sha256: Callable[[str], str]
) -> TrainedModel:
    """Collects what is known of a checkpoint.

    Args:
        evaluations: folders of evaluations of its weights.
        weights_sha256: gives the digest of its weights in a precision, which is that of an evaluation.

    Raises:
        UserError: an evaluation is of other weights, or cannot be read.
    """
    dcp_folder = dcp_folder.resolve()
    found = TrainedModel(repository, family, read_settings(dcp_folder.parent.parent), dcp_folder.name)
    for folder in evaluations:
        results = read_results(folder)
        dtype = results["config"].get("training", {}).get("dtype", "float32")
        if results["weights_sha256"] != weights_sha256(dtype):
            raise UserError(f"--evaluation {folder} is of other weights ({results['checkpoint']}) than {dcp_folder}; name one of these")
        found.evaluations.append(results)
    return found


def model_card(model: TrainedModel) -> str:
    """Makes the card, Markdown after a head in YAML that the Hub reads."""
    name = model.repository.partition("/")[2]
    base, data = base_model(model.settings), _data(model.settings)
    parts = [_head(model, base, data), CARD_MARK, f"# {as_text(name)}"]
    step = f" (checkpoint {as_text(model.checkpoint)})" if model.settings else ""
    parts.append(
        f"A {as_text(model.family)} language model, trained with [refine_titan](https://arxiv.org/abs/2602.16704) (ReFINE: next-sequence "
        f"prediction for fast-weight models){step}."
    )
    started = f"The weights of [{base.repository}](https://huggingface.co/{base.repository})" if base else _start_in_words(model.settings)
    at = f", commit {base.revision}" if base else ""
    parts.append(f"| | |\n|---|---|\n| started from | {started}{at} |\n| trained on | {_data_in_words(model.settings, data)} |")
    parts.append("## Use\n\n" + _use(model))
    if model.evaluations:
        parts.append("## Scores\n\nPercent, with half the width of the 95 % confidence interval; perplexity as it is.\n\n" + _scores(model))
    if model.settings:
        parts.append("## Settings\n\n" + markdown_table(["setting", "value"], _settings(model.settings), left=2))
    return "\n\n".join(parts) + "\n"


def base_model(settings: dict[str, Any]) -> HubName | None:
    """The model of the Hub from whose weights a run started; None if it was none of the Hub, or is not known."""
    checkpoint = settings.get("checkpoint", {})
    start = checkpoint.get("initial_load_path") or (
        settings.get("model", {}).get("hf_assets_path") if checkpoint.get("initial_load_in_hf") else None
    )
    return _pinned(start)


def _pinned(value: Any) -> HubName | None:
    """The name that a run has recorded, always with a commit; a relative path looks like a name without one."""
    name = parse_name(value) if isinstance(value, str) else None
    return name if name is not None and name.is_pinned else None


def _start_in_words(settings: dict[str, Any]) -> str:
    if not settings:
        return "not known"
    checkpoint = settings.get("checkpoint", {})
    started = checkpoint.get("initial_load_path") or checkpoint.get("initial_load_in_hf")
    return "a local checkpoint" if started else "random weights"


def _data(settings: dict[str, Any]) -> HubName | None:
    source = settings.get("data", {}).get("source")
    return _pinned(source.removeprefix(DATASET_PREFIX)) if isinstance(source, str) else None


def _data_in_words(settings: dict[str, Any], data: HubName | None) -> str:
    if data is not None:
        return f"[{data.repository}](https://huggingface.co/datasets/{data.repository}), commit {data.revision}"
    source = settings.get("data", {}).get("source")
    if not isinstance(source, str):
        return "not known"
    named = {"python-stdlib": "the sources of Python's standard library", "synthetic": "generated key-value retrieval"}
    return named.get(source, "local files")


def _head(model: TrainedModel, base: HubName | None, data: HubName | None) -> str:
    values: dict[str, Any] = {"pipeline_tag": "text-generation", "tags": ["refine_titan", "refine", model.family]}
    library = FAMILIES[model.family].args_class.hf_format.library
    values |= {"library_name": "transformers" if library == "transformers" else "refine_titan"}
    values |= {"base_model": base.repository} if base else {}
    values |= {"datasets": [data.repository]} if data else {}
    return "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in values.items()), "---"])  # JSON is YAML


def _use(model: TrainedModel) -> str:
    serve = f"```bash\nvllm serve {model.repository} --host 127.0.0.1     # with refine_titan installed, whose plugin vLLM finds\n```"
    library = FAMILIES[model.family].args_class.hf_format.library
    if library == "LaCT":
        return serve
    imports = ["import fla  # flash-linear-attention"] if library == "flash-linear-attention" else []
    lines = [*imports, "from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    lines += [f'{name} = {kind}.from_pretrained("{model.repository}")' for name, kind in _CLASSES]
    return f"{serve}\n\n```python\n" + "\n".join(lines) + "\n```"


_CLASSES = (("model", "AutoModelForCausalLM"), ("tokenizer", "AutoTokenizer"))


def _scores(model: TrainedModel) -> str:
    rows = []
    for results in model.evaluations:
        for row in results["tasks"]:
            if not row["num_samples"]:
                continue
            is_perplexity = row["benchmark"] == "perplexity"
            score = perplexity_with_interval(row) if is_perplexity else percent_with_interval(row["score"], row["ci95"])
            task = f"{row['benchmark']}/{row['task']}"
            rows.append([task, length_label(row["length"]), str(row["metric"]), score, f"{row['num_samples']:,}"])
    return markdown_table(["task", "length", "metric", "score", "samples"], rows, left=3)


def _settings(settings: dict[str, Any]) -> list[list[str]]:
    found = []
    for section, names in SETTINGS.items():
        values = settings.get(section, {})
        found += [
            [f"{section}.{name}", json.dumps(values[name], ensure_ascii=False)] for name in names if values.get(name) not in (None, "")
        ]
    return found
