"""Samples rollouts with vLLM in the trainer's own process, on its devices, with its weights.

Legend: n rollouts, k tokens.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh

from refine_kernels.packing import on_device, on_host, sequence_of_token
from refine_titan.distributed.tensor_parallel import apply_tensor_parallel
from refine_titan.models.decoder import FastWeightDecoder
from refine_titan.rollout import vllm_runtime
from refine_titan.rollout.completion import Completion, CompletionRequest, Decode, StopStrings
from refine_titan.rollout.engine import EngineError, PrefixStates, RolloutRequest, Rollouts
from refine_titan.rollout.sampling import Draws, uniform_draws
from refine_titan.rollout.weight_sync import WeightSync


@dataclass(frozen=True)
class VLLMSettings:
    """Settings with which an engine is built.

    Attributes:
        dtype: dtype of weights and arithmetic.
        max_model_len: most tokens of a prefix and its continuation together.
        max_num_seqs: sequences that run at once; further ones wait.
        max_num_batched_tokens: most tokens of one engine step.
        prefixes: how a rollout gets the state of its prefix. `cached`: the engine reads the prefix, and continues from states of
            shorter ones; `recomputed`: it reads the prefix from the start of its document; `handed_over`: it takes the state of the
            trainer's scoring pass, and reads nothing.
        block_tokens: tokens of a page of keys and values, which is also the distance between cached states; None for vLLM's own number,
            in a model without attention that caches none.
        cache_bytes: memory for pages.
        sleep: whether the engine gives its memory back between rounds (GPU only).
        cuda_graph: whether decoding steps are recorded and started with one launch (GPU only).
    """

    dtype: torch.dtype
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    prefixes: Literal["cached", "recomputed", "handed_over"]
    block_tokens: int | None
    cache_bytes: int
    sleep: bool = False
    cuda_graph: bool = False


class VLLMEngine:
    """A `RolloutEngine` and `CompletionEngine` around `vllm.LLM`.

    End-of-sequence is an ordinary token and draws come from each rollout's own seed, as in the native engine: both engines
    draw the same rollouts as far as their log-probabilities are the same.
    """

    name = "vllm"

    def __init__(
        self,
        model: nn.Module,
        config_json: bytes,
        unwritten_args: dict[str, Any],
        settings: VLLMSettings,
        device: torch.device,
        replicas: dist.ProcessGroup | None = None,
        tensor_parallel_mesh: DeviceMesh | None = None,
    ):
        """Builds the engine; every rank must do so at the same time.

        Args:
            model: the trainer's model, possibly sharded.
            config_json: `config.json` of the model.
            unwritten_args: fields of the model's args that a `config.json` does not have.
            replicas: ranks whose engines hold the same weights.
            tensor_parallel_mesh: ranks that share this engine, as they share the trainer's heads. All of them must ask for the
                same rollouts.

        Raises:
            EngineError: if vLLM cannot be built.
        """
        self._device, self._max_model_len = device, settings.max_model_len
        self._sleeps = settings.sleep and device.type == "cuda"
        self._asleep: set[str] = set()
        self._folder = tempfile.TemporaryDirectory(prefix="refine_titan_engine_")
        trainer_model = _TrainerModel(model, settings.dtype, device, replicas, tensor_parallel_mesh)

        self.takes_states = settings.prefixes == "handed_over"
        caches = settings.prefixes == "cached" or (self.takes_states and model.model_args.has_attention)
        block_size = {} if settings.block_tokens is None else {"block_size": settings.block_tokens}
        if caches:
            block_size["mamba_block_size"] = settings.block_tokens
        with _failures_named(f"could not be built (states: {settings.cache_bytes / 2**30:.3f} GiB, rollout.cache_gib)"):
            self._llm = vllm_runtime.build_llm(
                Path(self._folder.name),
                config_json,
                trainer_model,
                unwritten_args=unwritten_args,
                dtype=str(settings.dtype).removeprefix("torch."),
                seed=0,
                max_model_len=settings.max_model_len,
                max_num_seqs=settings.max_num_seqs,
                max_num_batched_tokens=settings.max_num_batched_tokens,
                takes_states=self.takes_states,
                # Rollouts whose states are handed over share their prefixes' keys and values this way.
                enable_prefix_caching=caches,
                kv_cache_memory_bytes=settings.cache_bytes,
                tensor_parallel_size=1 if tensor_parallel_mesh is None else tensor_parallel_mesh.size(),
                enable_sleep_mode=self._sleeps,
                disable_log_stats=True,
                **block_size,
            )
        if settings.cuda_graph:
            vllm_runtime.record_decoding(self._llm)
        self._sync, self._vocab_size = trainer_model.sync, trainer_model.vocab_size

    @property
    def weight_version(self) -> int | None:
        return self._sync.version

    @property
    def weights(self) -> WeightSync:
        """The object that keeps the engine's weights equal to the trainer's."""
        return self._sync

    def sync_weights(self, version: int) -> None:
        self._wake("weights")
        with _failures_named(f"could not take the weights (version {version})"):
            self._sync.sync(version)
        self._forget_states()

    def generate(self, request: RolloutRequest, prefix: PrefixStates | None) -> Rollouts:
        self._sync.require(request.weight_version)
        if self.takes_states and prefix is None:
            raise EngineError("this engine starts from prefix states, and was given none")
        self._wake_cache()
        order = reuse_order(request.cu_seqlens, request.starts)
        tokens = on_host(request.tokens_T)[0].tolist()
        prompts = []
        for i in order:
            begin = request.cu_seqlens[sequence_of_token(request.cu_seqlens, request.starts[i] - 1)]
            prompts.append((i, tokens[begin : request.starts[i]], request.length))
        draws = Draws(uniform_draws(request.seeds, request.length), self._device, request.temperature)
        with self._run_named(f"failed in generate (weights version {request.weight_version})"), self._offered(prefix):
            finished = self._run(prompts, draws)
        sampled = [list(output.outputs[0].token_ids) for _, output in sorted(zip(order, finished), key=lambda pair: pair[0])]
        for start, row in zip(request.starts, sampled):
            if len(row) != request.length:
                raise EngineError(f"the rollout at {start} has {len(row)} tokens, wanted are {request.length}")
        return Rollouts(
            on_device(torch.tensor(sampled), self._device),
            draws.logprobs_nk,
            self.name,
            request.weight_version,
            sum(len(output.prompt_token_ids) - output.num_cached_tokens for output in finished),
        )

    @torch.no_grad()
    def complete(self, request: CompletionRequest, decode: Decode) -> list[Completion]:
        self._sync.require()
        for i, (prompt, max_tokens) in enumerate(zip(request.prompts, request.max_tokens)):
            if len(prompt) + max_tokens > self._max_model_len:
                raise EngineError(
                    f"prompt {i} has {len(prompt)} tokens and asks for up to {max_tokens} more; the engine was built for "
                    f"{self._max_model_len} together"
                )
            if not all(0 <= token < self._vocab_size for token in prompt):
                raise EngineError(f"prompt {i} has token ids outside 0..{self._vocab_size - 1}")
        self._wake_cache()
        stops = StopStrings(request.stop_strings, decode)
        draws = Draws(uniform_draws(request.seeds, max(request.max_tokens)), self._device, request.temperature, request.top_k)
        prompts = [(i, prompt, request.max_tokens[i]) for i, prompt in enumerate(request.prompts)]
        with self._run_named("failed in complete"):
            finished = self._run(prompts, draws, stops.ends, stop_token_ids=list(request.stop_tokens))
        completions = []
        for output in finished:
            tokens = tuple(output.outputs[0].token_ids)
            stopped = stops.ends(tokens)
            if tokens[-1] in request.stop_tokens:
                stopped, tokens = True, tokens[:-1]
            completions.append(Completion(tokens, stops.text(tokens), "stop" if stopped else "length"))
        return completions

    def sleep(self) -> None:
        if not self._sleeps or self._asleep:
            return
        with _failures_named("did not go to sleep"):
            # Level 2 keeps nothing: copies of weights are made anew at the next sync, shared ones are the trainer's.
            self._llm.sleep(level=2)
        self._asleep = {"weights", "kv_cache"}
        if not self._sync.shares_storage:
            self._sync.invalidate("it gave the memory of its copies away in its sleep")

    def close(self) -> None:
        vllm_runtime.close(self._llm)
        self._llm = self._sync = None
        self._folder.cleanup()

    def _wake(self, part: str) -> bool:
        """Wakes `part`; returns whether it was asleep. Weights come first: they are synchronised before the cache takes its memory."""
        if part not in self._asleep:
            return False
        with _failures_named("did not wake up"):
            self._llm.wake_up(tags=[part])
        self._asleep.remove(part)
        return True

    def _wake_cache(self) -> None:
        self._wake("weights")
        if self._wake("kv_cache"):
            # Pages come back with whatever the memory held.
            vllm_runtime.clear_pages(self._llm)
            self._forget_states()

    def _forget_states(self) -> None:
        """Drops cached states: those of other weights, or lost in sleep, must not be continued."""
        if not self._llm.reset_prefix_cache():
            raise EngineError("vLLM did not drop its cached prefixes: some of its requests are still running")

    def _offered(self, prefix: PrefixStates | None) -> AbstractContextManager:
        if not self.takes_states:
            return nullcontext()
        from refine_titan.rollout.vllm_handover import StateHandover

        return StateHandover.offer(prefix.layers)

    @contextmanager
    def _run_named(self, what: str) -> Iterator[None]:
        """Names what failed, and refuses to sample until the next sync: a failed run leaves wrong states in vLLM's cache."""
        try:
            with _failures_named(what):
                yield
        except BaseException:
            self._sync.invalidate("the last round failed, and its states are not to be trusted")
            raise

    def _run(
        self,
        prompts: list[tuple[int, Sequence[int], int]],
        draws: Draws,
        ends: Callable[[Sequence[int]], bool] = lambda tokens: False,
        **settings: Any,
    ) -> list[Any]:
        """Runs prompts, each as (number, tokens, most tokens of its output), with the random numbers of `draws`; returns vLLM's outputs."""
        from vllm import SamplingParams

        from refine_titan.rollout.vllm_sampling import NUMBER, SeededDraws

        requests = []
        for number, tokens, max_tokens in prompts:
            own = {NUMBER: number, "kv_transfer_params": {NUMBER: number}}
            # To vLLM all sampling is greedy: the draws leave one token possible.
            parameters = SamplingParams(
                temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, extra_args=own, **settings
            )
            requests.append((tokens, parameters))
        with vllm_runtime.running(self._llm), SeededDraws.use(draws):
            return vllm_runtime.run_requests(self._llm, requests, ends)


class _TrainerModel:
    """The trainer's model with the interface of `vllm_models.TrainerModel`."""

    sync: WeightSync
    vocab_size: int

    def __init__(self, model, dtype, device, replicas, mesh):
        self._model, self._dtype, self._device, self._replicas, self._mesh = model, dtype, device, replicas, mesh

    def shard(self, decoder: FastWeightDecoder) -> None:
        if self._mesh is not None:
            apply_tensor_parallel(decoder, self._mesh)

    def fill(self, decoder: FastWeightDecoder) -> None:
        self.vocab_size = decoder.model_args.vocab_size
        self.sync = WeightSync(self._model, decoder, self._dtype, self._device, self._replicas)


def reuse_order(cu_seqlens: Sequence[int], starts: Sequence[int]) -> list[int]:
    """Returns the order of rollouts in which vLLM reuses most states: the shortest prefix of every document, then the second shortest of
    every document, and so on. A prefix continues from the one before it in its document, and does not wait for it."""
    rank: dict[int, int] = {}
    order = []
    for i in sorted(range(len(starts)), key=lambda i: starts[i]):
        document = sequence_of_token(cu_seqlens, starts[i] - 1)
        rank[document] = rank.get(document, -1) + 1
        order.append((rank[document], document, i))
    return [i for _, _, i in sorted(order)]


@contextmanager
def _failures_named(what: str) -> Iterator[None]:
    """Turns whatever vLLM raises into an `EngineError` that says what failed."""
    try:
        yield
    except EngineError:
        raise
    except Exception as error:
        raise EngineError(f"the vLLM engine {what}: {type(error).__name__}: {error}") from error
