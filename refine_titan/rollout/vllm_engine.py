"""Rollouts by vLLM in the trainer's own process, on its devices, with its weights.

Legend: n rollouts, k tokens.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn as nn

from refine_kernels.packing import sequence_of_token
from refine_titan.models.decoder import FastWeightDecoder
from refine_titan.rollout import vllm_runtime
from refine_titan.rollout.engine import EngineError, PrefixStates, RolloutRequest, Rollouts
from refine_titan.rollout.weight_sync import WeightSync


@dataclass(frozen=True)
class VLLMSettings:
    """How an engine is built.

    Attributes:
        dtype: of weights and arithmetic.
        max_model_len: longest prefix and continuation together, in tokens.
        max_num_seqs: sequences that run at once; further ones wait.
        max_num_batched_tokens: tokens of one engine step.
        prefixes: how a rollout gets the state of its prefix. `cached`: read, going on from the states of prefixes read before;
            `recomputed`: read from its document's start; `handed_over`: taken from the trainer's scoring pass, nothing is read.
        block_tokens: distance in tokens of the places at which cached states can be taken up.
        cache_bytes: memory for pages of state.
        tensor_parallel_degree: ranks that share one engine.
        sleep: whether the engine gives its memory back between rounds (GPU only).
    """

    dtype: torch.dtype
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    prefixes: Literal["cached", "recomputed", "handed_over"]
    block_tokens: int
    cache_bytes: int
    tensor_parallel_degree: int = 1
    sleep: bool = False


class VLLMEngine:
    """A `RolloutEngine` around `vllm.LLM`.

    End-of-sequence is an ordinary token, as in the native engine. A rollout's draws come from its own seed: what else is in
    the batch changes its log-probabilities by rounding only.
    """

    name = "vllm"

    def __init__(
        self, model: nn.Module, config_json: bytes, unwritten_args: dict[str, Any], settings: VLLMSettings, device: torch.device
    ):
        """Builds the engine; every rank must do so at the same time.

        Args:
            model: the trainer's; possibly sharded.
            config_json: its `config.json`.
            unwritten_args: fields of its args that a `config.json` does not have.

        Raises:
            EngineError: if vLLM cannot be built.
        """
        self._device = device
        self._sleeps = settings.sleep and device.type == "cuda"
        self._asleep: set[str] = set()
        self._folder = tempfile.TemporaryDirectory(prefix="refine_titan_engine_")
        Path(self._folder.name, "config.json").write_bytes(config_json)
        self._sync: WeightSync | None = None

        def fill_weights(decoder: FastWeightDecoder) -> None:
            self._sync = WeightSync(model, decoder, settings.dtype, device)

        self.takes_states = settings.prefixes == "handed_over"
        caching = {"block_size": settings.block_tokens, "mamba_block_size": settings.block_tokens}
        with _failures_named("could not be built"):
            self._llm = vllm_runtime.build_llm(
                Path(self._folder.name),
                fill_weights,
                unwritten_args=unwritten_args,
                dtype=str(settings.dtype).removeprefix("torch."),
                seed=0,
                max_model_len=settings.max_model_len,
                max_num_seqs=settings.max_num_seqs,
                max_num_batched_tokens=settings.max_num_batched_tokens,
                takes_states=self.takes_states,
                enable_prefix_caching=settings.prefixes == "cached",
                kv_cache_memory_bytes=settings.cache_bytes,
                tensor_parallel_size=settings.tensor_parallel_degree,
                enable_sleep_mode=self._sleeps,
                # At the temperature that was sampled with.
                logprobs_mode="processed_logprobs",
                disable_log_stats=True,
                **(caching if settings.prefixes == "cached" else {}),
            )

    @property
    def weights(self) -> WeightSync:
        """How the engine's weights are kept those of the trainer."""
        return self._sync

    def sync_weights(self, version: int) -> None:
        self._wake("weights")
        self._sync.sync(version)
        self._forget_states()

    def generate(self, request: RolloutRequest, prefix: PrefixStates | None) -> Rollouts:
        if self._sync.version != request.weight_version:
            held = "weights of an incomplete sync" if self._sync.version is None else f"weights version {self._sync.version}"
            raise EngineError(f"the engine holds {held}, wanted is version {request.weight_version}: stale rollouts are refused")
        if self._wake("kv_cache"):
            # Pages come back with whatever the memory held.
            vllm_runtime.clear_states(self._llm)
            self._forget_states()
        order = reuse_order(request.cu_seqlens, request.starts)
        tokens = request.tokens_T.tolist()
        prompts, parameters = [], []
        for i in order:
            start, seed = request.starts[i], request.seeds[i]
            begin = request.cu_seqlens[sequence_of_token(request.cu_seqlens, start - 1)]
            prompts.append({"prompt_token_ids": tokens[begin:start]})
            parameters.append(
                self._sampling(max_tokens=request.length, temperature=request.temperature, seed=seed, logprobs=0, rollout=i)
            )
        with _failures_named(f"failed in generate (weights version {request.weight_version})"):
            with vllm_runtime.private_random_state(), self._offered(prefix):
                finished = self._llm.generate(prompts, parameters, use_tqdm=False)
        sampled = dict(zip(order, finished))
        completions = [sampled[i].outputs[0] for i in range(len(order))]
        for start, completion in zip(request.starts, completions):
            if len(completion.token_ids) != request.length:
                raise EngineError(f"the rollout at {start} has {len(completion.token_ids)} tokens, wanted are {request.length}")
        logprobs = [[each[token].logprob for token, each in zip(c.token_ids, c.logprobs)] for c in completions]
        return Rollouts(
            torch.tensor([list(c.token_ids) for c in completions], device=self._device),
            torch.tensor(logprobs, dtype=torch.float32, device=self._device),
            self.name,
            request.weight_version,
            sum(len(r.prompt_token_ids) - r.num_cached_tokens for r in finished),
        )

    def sleep(self) -> None:
        if not self._sleeps or self._asleep:
            return
        with _failures_named("did not go to sleep"):
            # Level 2 keeps nothing: copies of weights are made anew at the next sync, shared ones are the trainer's.
            self._llm.sleep(level=2)
        self._asleep = {"weights", "kv_cache"}
        if not self._sync.shares_storage:
            self._sync.version = None

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()
        self._folder.cleanup()

    def _wake(self, part: str) -> bool:
        """Whether `part` was asleep. Weights come first: they are synchronised before the cache takes its memory."""
        if part not in self._asleep:
            return False
        with _failures_named("did not wake up"):
            self._llm.wake_up(tags=[part])
        self._asleep.remove(part)
        return True

    def _forget_states(self) -> None:
        """States of other weights, or lost in sleep, must not be continued."""
        if not self._llm.reset_prefix_cache():
            raise EngineError("vLLM did not drop its cached prefixes: some of its requests are still running")

    def _offered(self, prefix: PrefixStates | None) -> AbstractContextManager:
        if not self.takes_states:
            return nullcontext()
        from refine_titan.rollout.vllm_handover import StateHandover

        return StateHandover.offer(prefix.layers)

    def _sampling(self, *, rollout: int, **settings: Any):
        from vllm import SamplingParams

        if self.takes_states:
            settings["extra_args"] = {"kv_transfer_params": {"rollout": rollout}}
        return SamplingParams(ignore_eos=True, detokenize=False, **settings)


def reuse_order(cu_seqlens: Sequence[int], starts: Sequence[int]) -> list[int]:
    """Indices of rollouts in the order in which vLLM reuses most states: prefixes of a document ascending, so that each goes
    on from the one before; first prefixes of all documents, then second ones, so that none waits for its predecessor."""
    rank: dict[int, int] = {}
    order = []
    for i in sorted(range(len(starts)), key=lambda i: starts[i]):
        document = sequence_of_token(cu_seqlens, starts[i] - 1)
        rank[document] = rank.get(document, -1) + 1
        order.append((rank[document], document, i))
    return [i for _, _, i in sorted(order)]


@contextmanager
def _failures_named(what: str) -> Iterator[None]:
    """vLLM raises whatever its parts raise; to the trainer all of it is one failed engine."""
    try:
        yield
    except EngineError:
        raise
    except Exception as error:
        raise EngineError(f"the vLLM engine {what}: {type(error).__name__}: {error}") from error
