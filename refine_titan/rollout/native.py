"""Decodes the rollouts of a microbatch together, with the trainer's own model. Legend: n rollouts, k tokens."""

from collections import OrderedDict, deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from refine_kernels.packing import on_device
from refine_titan.models.decoder import FastWeightDecoder
from refine_titan.models.decoding import DecodingClock
from refine_titan.models.shared_prefix import LayerState, SharedPrefixLayout
from refine_titan.objective.losses import chosen_logprobs
from refine_titan.rollout.decode_graph import Record
from refine_titan.rollout.engine import EngineError, PrefixStates, RolloutRequest, Rollouts
from refine_titan.rollout.sampling import sample_tokens, uniform_draws

# Graphs that are kept. Rounds differ in their number of rollouts or their length: rollouts, and answers in post-training.
MAX_GRAPHS = 2
# Sizes that are remembered, because a round is recorded when its size comes for the second time.
MAX_SIZES = 8
# Most layers times tokens of a round that is recorded. A graph has 20 to 50 operators for each.
MAX_LAYER_STEPS = 1024


class NativeEngine:
    """An engine that decodes with the trainer's own model: it has no copy of the weights, and nothing to synchronise.

    End-of-sequence is an ordinary token: it neither ends a rollout nor is suppressed, in sampling and in
    log-probabilities alike, so every rollout has exactly k tokens and the two agree.

    Args:
        model: the trainer's model.
        precision: returns the context in which the model computes. It is entered once per round, so that autocast casts a weight once.
        record: records the operators of a round whose size comes for the second time, for later rounds (`decode_graph.py`). The
            model's weights must then be whole and stay where they are. None runs every round without a graph.
    """

    name = "native"
    takes_states = True

    def __init__(
        self,
        model: FastWeightDecoder,
        precision: Callable[[], AbstractContextManager] = nullcontext,
        record: Record | None = None,
    ):
        self.model, self.precision, self.record = model, precision, record
        self.weight_version: int | None = None
        self._rounds: OrderedDict[tuple, _RecordedRound] = OrderedDict()
        self._sizes: deque[tuple] = deque(maxlen=MAX_SIZES)

    @torch.no_grad()
    def generate(self, request: RolloutRequest, prefix: PrefixStates) -> Rollouts:
        if self.weight_version != request.weight_version:
            raise EngineError(f"the engine was synchronised at weights version {self.weight_version}, not {request.weight_version}")
        device = prefix.last_tokens_n.device
        uniforms_nk = on_device(uniform_draws(request.seeds, request.length), device)
        recorded = self._recorded_round(prefix, uniforms_nk, request.temperature)
        if recorded is None:
            decoded = _Round(self.model, self.precision, prefix.last_tokens_n, uniforms_nk, request.temperature)
            results = decoded.run([layer.detach() for layer in prefix.layers])
        else:
            results = recorded.run(prefix, uniforms_nk)
        return Rollouts(*results, self.name, self.weight_version)

    def _recorded_round(self, prefix: PrefixStates, uniforms_nk: torch.Tensor, temperature: float) -> "_RecordedRound | None":
        """Returns the recorded round of this size; None if the round is to run without a graph."""
        if self.record is None or len(prefix.layers) * uniforms_nk.shape[1] > MAX_LAYER_STEPS:
            return None
        addresses = tuple(parameter.data_ptr() for parameter in self.model.parameters())
        key = (*uniforms_nk.shape, temperature, addresses)
        if key not in self._rounds:
            if key not in self._sizes:
                self._sizes.append(key)
                return None
            while len(self._rounds) >= MAX_GRAPHS:
                self._rounds.popitem(last=False)
            decoded = _Round(self.model, self.precision, prefix.last_tokens_n.clone(), uniforms_nk.clone(), temperature)
            self._rounds[key] = _RecordedRound(decoded, self.record)
        self._rounds.move_to_end(key)
        return self._rounds[key]

    def sync_weights(self, version: int) -> None:
        self.weight_version = version

    def sleep(self) -> None:
        """Does nothing: between rounds the engine holds only the buffers of recorded rounds, which have to stay where they are."""

    def close(self) -> None:
        self._rounds.clear()


class _Round:
    """Decodes n rollouts of k tokens, any number of times, from the last tokens of their prefixes and numbers in [0, 1)."""

    def __init__(
        self,
        model: FastWeightDecoder,
        precision: Callable[[], AbstractContextManager],
        last_tokens_n: torch.Tensor,
        uniforms_nk: torch.Tensor,
        temperature: float,
    ):
        n, k = uniforms_nk.shape
        self.model, self.precision, self.temperature = model, precision, temperature
        self.last_tokens_n, self.uniforms_nk = last_tokens_n, uniforms_nk
        self.clock = DecodingClock(tokens_to_come=k)
        self._layout = SharedPrefixLayout.decoding_step(n, self.clock)
        self._rows = torch.arange(n, device=last_tokens_n.device)

    def run(self, states: list[LayerState]) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns tokens and their log-probabilities, `[n, k]`."""
        token_n, tokens, logprobs = self.last_tokens_n, [], []
        with self.precision():
            for uniforms_n in self.uniforms_nk.unbind(1):
                out = self.model(token_n, self._layout, initial_states=states, logit_rows=self._rows)
                self.clock.advance()
                states = out.states
                token_n = sample_tokens(out.logits, uniforms_n, self.temperature)
                tokens.append(token_n)
                logprobs.append(chosen_logprobs(out.logits[:, None], token_n[:, None], self.temperature)[:, 0])
        return torch.stack(tokens, 1), torch.stack(logprobs, 1)


class _RecordedRound:
    """A round with buffers of its own, whose operators are recorded when it first runs."""

    def __init__(self, decoded: _Round, record: Record):
        self._decoded, self._record = decoded, record
        self._states: list[LayerState] | None = None
        self._replay: Callable[[], None] | None = None

    def run(self, prefix: PrefixStates, uniforms_nk: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self._load(prefix, uniforms_nk)
        decodings = [layer.tensors["decoding"] for layer in self._states]
        if not all(decoding.is_uniform() for decoding in decodings):
            # The operators that a sequence runs only at the end of a chunk are not recorded.
            results = self._decoded.run(self._states)
            for decoding in decodings:
                decoding.release()
            return results
        if self._replay is None:
            self._replay = self._record(self._run_in_buffers)
            self._load(prefix, uniforms_nk)  # recording has run the round, which changed the buffers
        self._replay()
        tokens_nk, logprobs_nk = self._results
        return tokens_nk.clone(), logprobs_nk.clone()

    def _run_in_buffers(self) -> None:
        self._results = self._decoded.run(self._states)

    def _load(self, prefix: PrefixStates, uniforms_nk: torch.Tensor) -> None:
        decoded = self._decoded
        decoded.last_tokens_n.copy_(prefix.last_tokens_n)
        decoded.uniforms_nk.copy_(uniforms_nk)
        decoded.clock.reset()
        before = [None] * len(prefix.layers) if self._states is None else [s.tensors["decoding"] for s in self._states]
        mixers = [block.mixer for block in decoded.model.layers.values()]
        with decoded.precision():
            decodings = [
                mixer.begin_decoding(layer.detach(), decoded.clock, into) for mixer, layer, into in zip(mixers, prefix.layers, before)
            ]
        self._states = [LayerState({"decoding": decoding}) for decoding in decodings]
