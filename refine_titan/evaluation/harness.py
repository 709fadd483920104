"""Runs tasks of lm-evaluation-harness on a checkpoint. Needs the extra `harness`.

Log-likelihoods come from the model's forward, over texts that are packed without padding. Texts of any length are read whole,
since a fast-weight model has no longest context. Generated text comes from the engine.
"""

import json
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torchtitan.components.tokenizer import BaseTokenizer, HuggingFaceTokenizer

from refine_titan.conversion.byte_tokenizer import byte_tokenizer_files
from refine_titan.errors import UserError
from refine_titan.evaluation.perplexity import token_losses
from refine_titan.inference import Inference
from refine_titan.models.hf_files import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE
from refine_titan.models.shared_prefix import SharedPrefixLayout
from refine_titan.rollout.completion import CompletionEngine, CompletionRequest
from refine_titan.rollout.continuation import Model
from refine_titan.rollout.native_completion import READ_TOKENS
from refine_titan.seeding import derive_seed

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
except ImportError as error:
    raise UserError(f"lm-evaluation-harness is not installed ({error}): pip install -e '.[harness]'") from error

# Most tokens of a forward that need logits: 256 MiB in float32 for a vocabulary of 32,000.
LOGIT_TOKENS = 2048
GENERATION_OPTIONS = ("until", "max_gen_toks", "do_sample", "temperature", "top_k")
# Options of other programs that change nothing: with these values, and with any value if nothing is sampled.
WITHOUT_EFFECT = {
    "top_p": 1,
    "min_p": 0,
    "typical_p": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1,
    "length_penalty": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
}
ONLY_OF_SAMPLING = ("top_p", "min_p", "typical_p")
# The keys of --metadata under which the harness looks for the tokenizer that measures synthetic tasks.
TOKENIZER_KEYS = ("tokenizer", "pretrained", "model")


class Continuation(NamedTuple):
    """Tokens of which the last `num_scored` are scored, each given all tokens before it; at least one token is not scored."""

    tokens: tuple[int, ...]
    num_scored: int


class Likelihood(NamedTuple):
    """Sum of a continuation's log-probabilities, and whether greedy decoding would give this continuation."""

    logprob: float
    is_greedy: bool


@torch.no_grad()
def likelihoods(model: Model, requests: Sequence[Continuation], device: torch.device) -> list[Likelihood]:
    """Computes the likelihood of each continuation, in order.

    Requests are sorted by length and packed into forwards of at most READ_TOKENS tokens; longer requests are read in pieces.
    """
    found: list[Likelihood | None] = [None] * len(requests)
    for pack in _packs(requests):
        if len(pack) == 1:
            found[pack[0]] = _likelihood(model, requests[pack[0]], device)
        else:
            for i, likelihood in zip(pack, _packed_likelihoods(model, [requests[i] for i in pack], device)):
                found[i] = likelihood
    return found


def _packs(requests: Sequence[Continuation]) -> Iterator[list[int]]:
    pack, num_tokens, num_scored = [], 0, 0
    for i in sorted(range(len(requests)), key=lambda i: len(requests[i].tokens)):
        size, scored = len(requests[i].tokens), requests[i].num_scored
        if pack and (num_tokens + size > READ_TOKENS or num_scored + scored > LOGIT_TOKENS):
            yield pack
            pack, num_tokens, num_scored = [], 0, 0
        pack.append(i)
        num_tokens, num_scored = num_tokens + size, num_scored + scored
    if pack:
        yield pack


def _packed_likelihoods(model: Model, requests: list[Continuation], device: torch.device) -> list[Likelihood]:
    # Nothing after a request's last token is scored, so the forward leaves that token out.
    streams = [torch.tensor(request.tokens[:-1]) for request in requests]
    ends = tuple(accumulate(len(stream) for stream in streams))
    scored = torch.cat([torch.arange(end - request.num_scored, end) for request, end in zip(requests, ends)])
    out = model(torch.cat(streams).to(device), SharedPrefixLayout((0, *ends)), logit_rows=scored)
    targets = [torch.tensor(request.tokens[-request.num_scored :], device=device) for request in requests]
    sizes = [request.num_scored for request in requests]
    return [_score([pair]) for pair in zip(out.logits.split(sizes), targets)]


def _likelihood(model: Model, request: Continuation, device: torch.device) -> Likelihood:
    tokens = torch.tensor(request.tokens, device=device)
    first = len(tokens) - request.num_scored  # the first token that is scored
    states, scored, begin = None, [], 0
    while begin < len(tokens) - 1:
        # The context is read in large pieces, the continuation in pieces whose logits fit into memory.
        end = min(begin + READ_TOKENS, first - 1) if begin < first - 1 else min(begin + LOGIT_TOKENS, len(tokens) - 1)
        layout = SharedPrefixLayout((0, end - begin), state_positions=(end - begin,))
        positions = torch.arange(end - begin) if begin >= first - 1 else None
        out = model(tokens[begin:end], layout, initial_states=states, logit_rows=positions)
        states = out.states
        if positions is not None:
            scored.append((out.logits, tokens[begin + 1 : end + 1]))
        begin = end
    return _score(scored)


def _score(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> Likelihood:
    """Scores (logits `[S, V]`, target tokens `[S]`) of the pieces of a continuation: S scored tokens, V tokens of vocabulary."""
    total, is_greedy = 0.0, True
    for logits_SV, targets_S in pairs:
        logprobs_SV = logits_SV.log_softmax(-1)
        total += float(logprobs_SV.gather(-1, targets_S[:, None]).double().sum())
        is_greedy = is_greedy and bool((logits_SV.argmax(-1) == targets_S).all())
    return Likelihood(total, is_greedy)


class RefineTitanLM(TemplateLM):
    """A checkpoint as an `lm_eval.api.model.LM`.

    A text without a context is scored after the end-of-sequence token, as is usual in the harness. Texts are tokenized without BOS.

    Args:
        inference: the model.
        engine: answers `generate_until`.
        batch_size: answers that the engine decodes at once.
        seed: seed of sampling, for tasks that ask for it.

    Raises:
        UserError: if there is no end-of-sequence token.
    """

    def __init__(self, inference: Inference, engine: CompletionEngine, batch_size: int, seed: int = 0):
        super().__init__()
        self.inference, self.engine, self.batch_size, self.seed = inference, engine, batch_size, seed
        self._device = inference.device
        if not inference.stop_tokens:
            raise UserError(
                f"the tokenizer ({inference.config.model.hf_assets_path!r}) and the checkpoint name no end-of-sequence token, after "
                "which lm-evaluation-harness scores texts without a context; name it in tokenizer_config.json (eos_token)"
            )

    @property
    def eot_token_id(self) -> int:
        return self.inference.stop_tokens[0]

    @property
    def tokenizer_name(self) -> str:
        return self.inference.config.model.hf_assets_path or "bytes"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.inference.tokenizer.encode(string)

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs: Any) -> list[tuple[float, bool]]:
        for (context, continuation), _, tokens in requests:
            if not tokens:
                raise UserError(f"the continuation {continuation!r} has no tokens of its own after {context[-40:]!r}")
        wanted = [Continuation((*context, *tokens), len(tokens)) for _, context, tokens in requests]
        found = [tuple(likelihood) for likelihood in likelihoods(self.inference.forward, wanted, self._device)]
        for (texts, _, _), likelihood in zip(requests, found):
            self.cache_hook.add_partial("loglikelihood", texts, likelihood)
        return found

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        found = []
        for (text,) in (request.args for request in requests):
            tokens = torch.tensor([self.prefix_token_id, *self.tok_encode(text)], device=self._device)
            total = -float(token_losses(self.inference.forward, tokens).double().sum()) if len(tokens) > 1 else 0.0
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
            found.append(total)
        return found

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        asked = [(request.args[0], _generation_options(request.args[1])) for request in requests]
        prompts = [tuple(self.tok_encode(context)) or (self.prefix_token_id,) for context, _ in asked]
        # Requests with the same options share a batch; longest prompts come first.
        order = sorted(range(len(asked)), key=lambda i: (repr(asked[i][1]), -len(prompts[i]), i))
        found = [""] * len(asked)
        while order:
            options = asked[order[0]][1]
            batch = [i for i in order[: self.batch_size] if asked[i][1] == options]
            order = order[len(batch) :]
            completions = self.engine.complete(
                CompletionRequest(
                    prompts=tuple(prompts[i] for i in batch),
                    max_tokens=(options.max_tokens,) * len(batch),
                    seeds=tuple(derive_seed(self.seed, "harness", asked[i][0], requests[i].repeats, i) for i in batch),
                    stop_strings=options.until,
                    stop_tokens=self.inference.stop_tokens,
                    temperature=options.temperature,
                    top_k=options.top_k,
                ),
                self.inference.tokenizer.decode,
            )
            for i, completion in zip(batch, completions):
                found[i] = completion.text
                self.cache_hook.add_partial("generate_until", requests[i].args, completion.text)
        return found


class GenerationOptions(NamedTuple):
    """Settings of generation that a task asks for."""

    until: tuple[str, ...]
    max_tokens: int
    temperature: float
    top_k: int


def _generation_options(asked: dict[str, Any]) -> GenerationOptions:
    """Reads a task's generation options; raises UserError if the engines do not have one."""
    options = normalize_gen_kwargs(asked)
    temperature = float(options.get("temperature", 1.0)) if options["do_sample"] else 0.0
    for name, value in options.items():
        changes_nothing = value == WITHOUT_EFFECT.get(name) or (temperature == 0 and name in ONLY_OF_SAMPLING)
        if name not in GENERATION_OPTIONS and not changes_nothing:
            without = f", {name} = {WITHOUT_EFFECT[name]}" if name in WITHOUT_EFFECT else ""
            raise UserError(f"the task's generation_kwargs ask for {name} = {value!r}; allowed: {', '.join(GENERATION_OPTIONS)}{without}")
    until = tuple(string for string in options["until"] if string)
    return GenerationOptions(until, int(options["max_gen_toks"]), temperature, int(options.get("top_k") or 0))


class HarnessTasks(NamedTuple):
    """Tasks of the harness with their data, and the manager that loaded them."""

    tasks: list[Any]
    manager: Any


def load_harness_tasks(
    names: Sequence[str],
    tokenizer: BaseTokenizer,
    *,
    include_path: Path | None = None,
    metadata: dict[str, Any] | None = None,
    seed: int = 0,
) -> HarnessTasks:
    """Loads tasks and their data, which needs no model; synthetic tasks such as `ruler` are generated.

    Args:
        tokenizer: measures the prompts of synthetic tasks, unless `metadata` names another.
        include_path: folder with further tasks.
        metadata: values for the tasks, such as `{"max_seq_lengths": [4096]}` for `ruler`.
        seed: of the generated tasks.

    Raises:
        UserError: the harness does not know a task, lacks a package or data for it, or a task asks for generation that no engine has.
    """
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory() as folder:
        values = dict(metadata or {})
        if not any(values.get(key) for key in TOKENIZER_KEYS):
            write_tokenizer(tokenizer, Path(folder))
            values["tokenizer"] = folder
        manager = TaskManager(include_path=include_path and str(include_path), metadata=values)
        unknown = [task for task in names if task not in manager.all_tasks]
        if unknown:
            where = f" and {include_path}" if include_path else ""
            raise UserError(f"--tasks: lm-evaluation-harness{where} has no task {unknown[0]!r}; `lm_eval ls tasks` lists its own")
        random.seed(seed)
        np.random.seed(seed)
        groups, tasks = {}, {}
        for name in names:
            with _naming(name):
                loaded = manager.load([name])
            groups, tasks = groups | loaded["groups"], tasks | loaded["tasks"]
    for name, task in tasks.items():
        if task.get_config("output_type") == "generate_until":
            try:
                _generation_options(task.get_config("generation_kwargs") or {})
            except UserError as error:
                raise UserError(f"--tasks: {name}: {error}") from error
    # Groups hold their tasks and the groups below them.
    inner = {name for group in groups.values() for name in group.child_names}
    outermost = [group for name, group in groups.items() if name not in inner]
    grouped = {task.task_name for group in outermost for task in group.get_all_tasks()}
    return HarnessTasks([*outermost, *(task for name, task in tasks.items() if name not in grouped)], manager)


@contextmanager
def _naming(task: str) -> Iterator[None]:
    """Turns what keeps the harness from loading a task into a UserError that names the task, and the package if one is missing."""
    try:
        yield
    except ImportError as error:
        missing = error.name or getattr(error.__cause__ or error.__context__, "name", None)
        package = f" needs the package {missing!r}, which is not installed" if missing else " cannot be imported"
        raise UserError(f"--tasks: {task}{package}; lm-evaluation-harness says: {error}") from error
    except (OSError, LookupError, ValueError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"--tasks: lm-evaluation-harness cannot load {task}: {reason}") from error


def write_tokenizer(tokenizer: BaseTokenizer, folder: Path) -> None:
    """Writes a tokenizer's vocabulary without anything else that its folder may hold: the harness would run code that lies there."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        tokenizer.tokenizer.save(str(folder / TOKENIZER_FILE))
        (folder / TOKENIZER_CONFIG_FILE).write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    else:
        for name, content in byte_tokenizer_files().items():
            (folder / name).write_bytes(content)


def evaluate_harness_tasks(
    inference: Inference,
    engine: CompletionEngine,
    loaded: HarnessTasks,
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> dict[str, Any]:
    """Runs tasks that `load_harness_tasks` loaded; returns what `lm_eval.simple_evaluate` returns.

    Args:
        limit: samples of each task; None for all.
    """
    import lm_eval

    return lm_eval.simple_evaluate(
        RefineTitanLM(inference, engine, batch_size, seed),
        tasks=loaded.tasks,
        task_manager=loaded.manager,
        num_fewshot=num_fewshot,
        limit=limit,
        batch_size=batch_size,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
